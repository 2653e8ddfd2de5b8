"""Imports go down only: flows → tasks → rlhf_core, and each tool has one owner."""

import ast
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
OWNERS = {  # tool → where it may be imported
    "prefect": ("flows/",),
    "mlflow": ("tasks/tracking.py",),
    "dvc": ("tasks/pipeline.py", "tasks/lineage.py"),
    "dvc_data": ("tasks/lineage.py",),
    "typer": (
        "flows/campaigns.py",
        "flows/cli.py",
        "flows/constitutions.py",
        "flows/feedback.py",
        "flows/judge.py",
        "flows/listening.py",
    ),
    "fastapi": ("rlhf_core/feedback/",),
    "starlette": ("rlhf_core/feedback/",),
    "uvicorn": ("flows/feedback.py",),
    "sqlalchemy": ("rlhf_core/feedback/",),
    "alembic": ("rlhf_core/feedback/",),
    "itsdangerous": ("rlhf_core/feedback/",),
    "httpx": ("rlhf_core/feedback/chat.py", "flows/waiting.py"),  # the latter for what Prefect's client raises
    "sqlite3": ("rlhf_core/feedback/",),
    "jinja2": ("rlhf_core/report.py", "rlhf_core/safety_page.py", "rlhf_core/feedback/"),
}
FORBIDDEN = {"rlhf_core": ("tasks", "flows"), "tasks": ("flows",), "flows": ()}
FILES = sorted(path for layer in FORBIDDEN for path in (PROJECT / layer).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module named in an import statement, wherever in the file it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            whole = node.module in FORBIDDEN  # from rlhf_core import ppo: what is imported is the module
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PROJECT)) for path in FILES])
def test_imports_go_down_and_tools_have_one_owner(path: Path) -> None:
    name = path.relative_to(PROJECT).as_posix()
    modules = imports(path)
    tops = {module.partition(".")[0] for module in modules}
    assert not tops & set(FORBIDDEN[name.partition("/")[0]]), f"{name} imports upwards"
    for tool, owners in OWNERS.items():
        assert tool not in tops or name.startswith(owners), f"{name} imports {tool}, which belongs to {owners}"
    if name.startswith("rlhf_core/functional/"):
        outside = {module for module in modules if not module.startswith("rlhf_core.functional")}
        outside = {module.partition(".")[0] for module in outside} - set(sys.stdlib_module_names)
        assert outside <= {"torch"}, f"{name} is maths, and imports {outside - {'torch'}}"


# Modules of rlhf_core that decide no number of a stage, though it imports them, and why.
ALLOWED = {
    # Only where a model's folder is found.
    "prepare": {"models", "folding", "functional", "head", "matrices", "processes", "unpadding"},
    "sft": {"base"},  # what it did lies in artifacts/base; so for the stages after
    "reward": {"base"},
    # The code of judges: a run with the reward model, the usual one, need not be repeated for it. DVC watches the
    # section judge, and what a judge on this machine computes with.
    "ppo": {"base", "annotators", "chat", "endpoint", "judges", "local", "pairs", "quality", "scoring", "statistics"},
    "dpo": {"base"},
    "evaluate": {"base", "checkpoints", "optimisation"},  # the last two of the loops, whose other functions it uses
    "people": {
        "models",
        "folding",
        "functional",
        "head",
        "matrices",
        "processes",
        "base",
        "unpadding",
    },  # of reading rows, which loads no model
}
EVERYWHERE = {"config", "errors", "tracking"}  # values are DVC params; messages; what reports


def core_modules(path: Path, found: set[str]) -> set[str]:
    """Every module of rlhf_core that a file imports, and what those import; a package.s by its own name."""
    for module in imports(path):
        top, *parts = module.split(".")
        if top != "rlhf_core" or not parts:
            continue
        inside = PROJECT.joinpath("rlhf_core", *parts).with_suffix(".py")
        name = parts[0] if parts[0] == "functional" else parts[-1]
        if name not in found:
            found.add(name)
            if name != "functional":
                core_modules(inside, found)
    return found


@pytest.mark.parametrize("stage", ["prepare", "sft", "reward", "ppo", "dpo", "evaluate", "people"])
def test_dvc_watches_all_code_that_decides_a_stages_numbers(stage: str) -> None:
    deps = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    watched = {Path(dep).stem for dep in deps if dep.startswith("rlhf_core/")}
    needed = core_modules(PROJECT / "tasks" / f"{stage}.py", set()) - EVERYWHERE - ALLOWED.get(stage, set())
    assert watched - {"templates"} == needed
    assert f"tasks/{stage}.py" in deps


@pytest.mark.parametrize("stage", ["preferences", "gate"])
def test_dvc_watches_all_code_of_the_stages_of_online_rounds(stage: str) -> None:
    deps = yaml.safe_load((PROJECT / "recipes/online/stages.yaml").read_text())["stages"][stage]["deps"]
    watched = {Path(dep).stem for dep in deps if dep.startswith("rlhf_core/")}
    needed = core_modules(PROJECT / "tasks" / f"{stage}.py", set()) - EVERYWHERE - {"base"}
    assert watched == needed
    assert f"tasks/{stage}.py" in deps


@pytest.mark.parametrize("stage", ["constitution", "principles", "safety"])
def test_dvc_watches_all_code_of_the_stages_of_a_constitution(stage: str) -> None:
    deps = yaml.safe_load((PROJECT / "recipes/constitution/stages.yaml").read_text())["stages"][stage]["deps"]
    watched = {Path(dep).stem for dep in deps if dep.startswith("rlhf_core/")}
    needed = core_modules(PROJECT / "tasks" / f"{stage}.py", set()) - EVERYWHERE - {"base"}
    assert watched - {"templates"} == needed
    assert f"tasks/{stage}.py" in deps


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    text = "def f():\n    import mlflow.entities\n    from flows.rlhf import rlhf\n    from rlhf_core import ppo\n"
    (tmp_path / "late.py").write_text(text)
    assert imports(tmp_path / "late.py") == {"mlflow.entities", "flows.rlhf", "rlhf_core.ppo"}
