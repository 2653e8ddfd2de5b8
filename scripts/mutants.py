"""Show that every line of rlhf_core/functional is held by a test: flip each once, and each flip must be noticed.

Each module's syntax tree is changed at one place at a time, written into a temporary copy of the package, and the
module's own tests run on the copy in a forked child (torch is imported once, in the parent). A mutant is killed when
its tests fail or run out of time. Docstrings, annotations, imports and what a `raise` says are left alone.

    python scripts/mutants.py [--jobs 2] [module ...]          exit status 1 if a mutant survives
"""

import argparse
import ast
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("rlhf_core/functional")
TESTS = Path("tests/functional")
TIMEOUT = 60  # seconds a mutant

# Mutants that compute the same: (module, source line stripped, change) -> why. Keep this nearly empty.
EQUIVALENT: dict[tuple[str, str, str], str] = {}

COMPARISONS: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
SELECTED = {"where": 1, "zero_masked": 0}  # which argument remains when the mask is forgotten
SHAPES_ONLY = {"require_same_shape", "describe_shapes", "_ranks"}  # a mask's content does not matter to them,
SHAPE_ATTRIBUTES = {"shape", "dim"}  # nor to these


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    line: int
    text: str
    change: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.module}.py:{self.line}: {self.change}    in: {self.text}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    for parent, field, position, node in list(_sites(tree)):
        for change, replacement in list(_variants(node)):
            _put(parent, field, position, replacement)
            ast.fix_missing_locations(tree)
            line = getattr(node, "lineno", getattr(parent, "lineno", 0))
            yield Mutant(path.stem, line, lines[line - 1].strip(), change, ast.unparse(tree))
            _put(parent, field, position, node)


def _sites(node: ast.AST, inside: str = "") -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every place of a tree that may change, as (parent, field, index in the field or None, node)."""
    for field, value in ast.iter_fields(node):
        for position, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _left_alone(node, field, child):
                continue
            name = _called(child) if isinstance(child, ast.Call) else inside
            shape_only = inside in SHAPES_ONLY or (isinstance(node, ast.Attribute) and node.attr in SHAPE_ATTRIBUTES)
            if not (shape_only and isinstance(child, ast.Name)):
                yield node, field, position, child
            yield from _sites(child, name)


def _left_alone(parent: ast.AST, field: str, child: ast.AST) -> bool:
    if field in ("annotation", "returns", "decorator_list", "ctx"):
        return True
    if isinstance(child, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # docstring
        return True
    return isinstance(child, ast.Subscript) and isinstance(child.value, ast.Name) and child.value.id == "Literal"


def _put(parent: ast.AST, field: str, position: int | None, node: ast.AST) -> None:
    if position is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[position] = node


def _called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in a node's place, each with a word on the change."""
    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                for comparison in COMPARISONS[type(operator)]:
                    changed = [*node.ops[:i], comparison(), *node.ops[i + 1 :]]
                    yield _change(node, ast.Compare(node.left, changed, node.comparators))
        case ast.BinOp(left, operator, right) if type(operator) in ARITHMETIC:
            yield _change(node, ast.BinOp(left, ARITHMETIC[type(operator)](), right))
        case ast.BoolOp(operator, values):
            yield _change(node, ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values))
        case ast.UnaryOp(_, operand):
            yield _change(node, operand)
        case ast.AugAssign(target, operator, value):
            yield _change(node, ast.AugAssign(target, ARITHMETIC[type(operator)](), value))
        case ast.Constant(value):
            for other in _other_constants(value):
                yield _change(node, ast.Constant(other))
        case ast.If(test, body, orelse):
            yield f"if {ast.unparse(test)} -> if not", ast.If(_not(test), body, orelse)
        case ast.IfExp(test, body, orelse):
            yield _change(node, ast.IfExp(_not(test), body, orelse))
        case ast.Name(name, ast.Load()) if name.split("_")[0] == "mask":
            yield _change(node, ast.UnaryOp(ast.Invert(), node))
        case ast.keyword(arg, value) if arg in EXTREMES:
            yield _change(node, ast.keyword(EXTREMES[arg], value))
        case ast.Call():
            yield from _other_calls(node)


def _other_calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = _called(node)
    if name in EXTREMES:
        other = EXTREMES[name]
        swapped = ast.Attribute(node.func.value, other) if isinstance(node.func, ast.Attribute) else ast.Name(other)
        yield _change(node, ast.Call(swapped, node.args, node.keywords))
    if name in SELECTED:
        yield _change(node, node.args[SELECTED[name]])
    if name == "where":
        yield _change(node, ast.Call(node.func, [ast.UnaryOp(ast.Invert(), node.args[0]), *node.args[1:]], []))
    elif isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name | ast.Constant)
        and ast.unparse(node.func.value) in ("torch", "math", "', '")
    ):
        yield _change(node, node.func.value)  # x.method() -> x


def _other_constants(value: object) -> list[bool | int | float | str]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value > 0 else [value + 1]
    if isinstance(value, float):
        return [value * 2 or 1.0]
    return [f"{value}?"] if isinstance(value, str) else []


def _not(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _change(before: ast.AST, after: ast.AST) -> tuple[str, ast.AST]:
    return f"{ast.unparse(before)} -> {ast.unparse(ast.fix_missing_locations(after))}", after


def start(mutant: Mutant | None, module: str, folder: Path) -> int:
    """Fork a child that runs a module's tests on a copy of the package in `folder`; returns its process id."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / PACKAGE.parent / "__init__.py").touch()
    shutil.copytree(ROOT / TESTS, folder / TESTS, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        (folder / PACKAGE / f"{module}.py").write_text(mutant.source, encoding="utf-8")
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with contextlib.suppress(BaseException):
        signal.alarm(TIMEOUT)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        sys.dont_write_bytecode = True
        import pytest

        test = str(TESTS / f"test_{module}.py")
        options = ["-x", "-q", "--tb=short", "--assert=plain", "-c", os.devnull, f"--rootdir={folder}"]
        status = pytest.main([*options, "-p", "no:cacheprovider", test])
    os._exit(int(status))


def warm_up() -> None:
    """Import here, once, what every child would import for itself, torch's lazy modules included."""
    for name in ("pytest", "hypothesis.strategies"):
        importlib.import_module(name)
    import torch

    number = torch.ones(1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(torch.exp, (number,))
    with torch.autograd.set_detect_anomaly(True):
        torch.testing.assert_close(number.exp(), number.exp())


def run_all(mutants: list[Mutant], jobs: int) -> dict[Mutant, int]:
    """Run mutants, `jobs` at a time; returns each one's wait status."""
    results: dict[Mutant, int] = {}
    running: dict[int, tuple[Mutant, Path]] = {}
    waiting = list(reversed(mutants))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="mutant-"))
            running[start(mutant, mutant.module, folder)] = (mutant, folder)
        pid, status = os.wait()
        mutant, folder = running.pop(pid)
        results[mutant] = status
        shutil.rmtree(folder)
        print("S" if status == 0 else ".", end="", flush=True)
    print()
    return results


def check_tests_pass(module: str) -> None:
    """Exit with status 2 if a module's tests fail before anything is changed."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    _, status = os.waitpid(start(None, module, folder), 0)
    log = (folder / "log").read_text(encoding="utf-8") if (folder / "log").exists() else ""
    shutil.rmtree(folder)
    if status:
        print(f"{log}\nThe tests of {module} fail on the code as it is. Mend that first.", file=sys.stderr)
        raise SystemExit(2)


def main() -> int:
    modules = sorted(p.stem for p in (ROOT / PACKAGE).glob("*.py") if p.stem != "__init__")
    parser = argparse.ArgumentParser(description="Flip each line of rlhf_core/functional; every flip must fail a test.")
    parser.add_argument("modules", nargs="*", default=modules, help=f"any of {', '.join(modules)}; all of them if none")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    arguments = parser.parse_args()
    for unknown in sorted(set(arguments.modules) - set(modules)):
        parser.error(f"found no module {unknown}; expected {', '.join(modules)}")

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    warm_up()
    began = time.monotonic()
    mutants: list[Mutant] = []
    for module in arguments.modules:
        check_tests_pass(module)
        mutants += mutants_of(ROOT / PACKAGE / f"{module}.py")
    allowed = [m for m in mutants if (m.module, m.text, m.change) in EQUIVALENT]
    results = run_all([m for m in mutants if m not in allowed], arguments.jobs)

    for mutant, status in results.items():
        if os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) > 1:
            print(f"killed, by a crash or the time limit (status {status}): {mutant.name}")
        elif status:
            print(f"killed: {mutant.name}")
    survivors = [mutant for mutant, status in results.items() if status == 0]
    for mutant in allowed:
        print(f"equivalent ({EQUIVALENT[mutant.module, mutant.text, mutant.change]}): {mutant.name}")
    for mutant in survivors:
        print(f"SURVIVED: {mutant.name}")
    print(
        f"{len(results)} mutants: {len(results) - len(survivors)} killed, {len(survivors)} survived"
        f" ({len(allowed)} equivalent ones left out), {time.monotonic() - began:.0f} s"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
