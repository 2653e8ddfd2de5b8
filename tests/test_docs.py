"""Documents are tests: what they name is there, what is there they name, and the figures in them are the real ones."""

import ast
import json
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command

from flows.cli import app
from rlhf_core.config import Params
from rlhf_core.gate import Rates
from rlhf_core.safety import CATEGORIES, RATES
from rlhf_core.statistics import Interval
from tasks.lineage import flat_metrics
from tasks.reward import PREFIX

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
DOCS = sorted((PROJECT / "docs").rglob("*.md"))
PAGES = [README, PROJECT / "CHANGELOG.md", *DOCS]
STAGES = ("prepare", "sft", "reward", "ppo", "dpo", "evaluate", "people")
TIMINGS = ("_per_second",)  # recorded in MLflow only

# What a placeholder of docs/metrics.md stands for.
PLACEHOLDERS = {
    "split": "train|validation|test|gold",
    "policy": "base|sft|ppo|dpo",
    "comparison": "ppo_vs_sft|sft_vs_base|dpo_vs_sft|ppo_vs_dpo",
    "n": "[0-9]+",
    "kind": "[^/]+",
    "bin": "[^/]+",
    "axis": "[^/]+",
    "member": "[0-9]+",
    "source": "[^/]+",
    "rate": "refusal_with_help|harmful_compliance|over_refusal",
    "who": "before|sft|ppo",
}


# The first words of each reward model's metrics.
MODELS = (*PREFIX.values(), "reward/members/<member>")


def shown(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def read(path: Path) -> str:
    assert path.is_file(), f"{shown(path)} is not there"
    return path.read_text(encoding="utf-8")


# ---- metrics: what the code logs


def dict_keys(tree: ast.AST) -> Iterator[list[ast.expr]]:
    """The keys of each dict display or comprehension and each key assigned to by subscript, in the source's order."""
    found: list[tuple[int, list[ast.expr]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            found.append((node.lineno, [key for key in node.keys if key is not None]))
        elif isinstance(node, ast.DictComp):
            found.append((node.lineno, [node.key]))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found.append((node.lineno, [node.slice]))
    yield from (keys for _, keys in sorted(found, key=lambda item: item[0]))


def curves_in(source: str) -> set[str]:
    """Names `stage/quantity` that are keys in the code; an f-string's first `{prefix}` is each model of stage reward.

    What an f-string holds further on is a placeholder of that name.
    """
    names = set()
    for keys in dict_keys(ast.parse(source)):
        for key in keys:
            if isinstance(key, ast.JoinedStr):
                words = ""
                for part in key.values:
                    assert isinstance(part, ast.Constant | ast.FormattedValue)
                    words += part.value if isinstance(part, ast.Constant) else f"<{ast.unparse(part.value)}>"
                if isinstance(key.values[0], ast.Constant) and isinstance(key.values[-1], ast.Constant):
                    names.add(words)
                elif (rest := words.partition(">")[2]).startswith("/"):
                    names |= {prefix + rest for prefix in MODELS}
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                names.add(key.value)
    return {name for name in names if re.fullmatch(rf"({'|'.join(STAGES)})(/[a-z0-9_]+|/<[a-z]+>)+", name)}


def logged_curves() -> set[str]:
    files = [PROJECT / "rlhf_core" / f"{stage}.py" for stage in STAGES[1:]] + sorted((PROJECT / "tasks").glob("*.py"))
    files.append(PROJECT / "rlhf_core" / "watch.py")
    (counted,), (taken,) = (
        words("rlhf_core/feedback/pairs.py", "counts"),
        words("rlhf_core/feedback/endpoint.py", "costs"),
    )
    return below(["judge"], [*counted, *taken]).union(*(curves_in(read(path)) for path in files))


def words(file: str, function: str) -> list[list[str]]:
    """The plain string keys of each dict display in a function that has some."""
    tree = next(
        node
        for node in ast.walk(ast.parse(read(PROJECT / file)))
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = [
        [key.value for key in node.keys if isinstance(key, ast.Constant) and "/" not in str(key.value)]
        for node in sorted(dicts, key=lambda node: node.lineno)
    ]
    return [names for names in keys if names]


# Logged only where params.yaml asks for it.
OPTIONAL = (
    {f"ppo/{name}" for name in ("gold_score", "repetition", "alarm", "alarms", "alarm_update", "kept_update")}
    | {f"{model}/length_coef" for model in MODELS}
    # The recorded run may be older than these.
    | {f"{model}/length_correlation" for model in MODELS}
    | {
        f"evaluate/<comparison>/{how}proxy_length_controlled_win_rate{end}"
        for how in ("", "greedy/")
        for end in ("", "_low", "_high")
    }
    | {"ppo/kl_loss", "ppo/score_spread", "reward/sources/<source>", "evaluate/cost_limit"}
    | {f"ppo/{name}" for name in ("cost", "mean_cost", "lambda", "cost_value_loss")}
    | {f"evaluate/<policy>/{cost}{end}" for cost in ("cost", "gold_cost") for end in ("", "_low", "_high")}
    | {f"evaluate/best_of_n/<n>/{name}" for name in ("reward", "gold_reward", "kl")}
    | {
        f"dpo/{name}"
        for name in ("validation_loss", "validation_accuracy", "best_epoch", "rankings", "pairs", "tokens")
    }
)


def optional(name: str) -> bool:
    """Whether a metric is logged only where params.yaml, or somebody who had people asked, wanted it."""
    return name in OPTIONAL or "<axis>" in name or "<member>" in name or name.startswith("people/")


def below(prefixes: Iterable[str], names: Iterable[str]) -> set[str]:
    return {f"{prefix}/{name}" for prefix in prefixes for name in names}


def logged_finals() -> set[str]:
    """Names of final metrics, with the placeholders of docs/metrics.md; read from the dicts that the code writes."""
    whole, split = words("rlhf_core/data.py", "summarise")
    names = below(["prepare"], whole)
    names |= below(["prepare/<split>"], set(split) - {"kinds"}) | {"prepare/<split>/kinds/<kind>"}

    *_, trained = words("rlhf_core/sft.py", "train_sft")
    names |= below(["sft"], trained)

    *_, trained = words("rlhf_core/reward.py", "train_reward")
    (quality,) = words("rlhf_core/reward.py", "measure")
    *_, statistics, gold, part = words("tasks/reward.py", "main")
    assert gold == ["gold"]
    correlation, axes = words("tasks/reward.py", "_numbers")
    assert axes == ["axes"]
    quality = [*quality, *correlation, "length_coef"]  # the last where length is regressed out: `_with_length`
    names |= below(MODELS, [*trained, *quality, *statistics, *below(["axes/<axis>"], quality)])
    names |= below(["reward/accuracy_by_length/<bin>"], part)
    (by_kind,) = words("rlhf_core/reward.py", "accuracy_by_kind")
    names |= below(["reward/accuracy_by_kind/<kind>"], by_kind)

    *_, trained = words("rlhf_core/dpo.py", "train_dpo")
    names |= below(["dpo"], trained)

    *_, ends = words("rlhf_core/ppo.py", "train_ppo")
    names |= below(["ppo"], ends)
    names |= {name for name in logged_curves() if name.startswith("ppo/") and not name.endswith(TIMINGS)}
    names |= below(["ppo"], [*set().union(*words("rlhf_core/watch.py", "final_watched")), "kept_update"])
    names -= {"ppo/alarm"}  # the final metric counts them

    each = [name for found in words("rlhf_core/evaluate.py", "_summary") for name in found]
    each += ["distinct_2", "reward_axes/<axis>", "gold_axes/<axis>"]
    _, compared = words("rlhf_core/evaluate.py", "compare")
    by_axis, _ = words("rlhf_core/evaluate.py", "_wins_by_axis")
    compared = [*compared, *below(["gold_axes/<axis>"], by_axis)]
    (perplexity, greedy), (again,) = words("rlhf_core/evaluate.py", "evaluate_policies")
    (picked,), ((kl,),) = words("rlhf_core/evaluate.py", "_best_of_n"), words("rlhf_core/best_of_n.py", "best_of_n")
    names |= below(["evaluate/best_of_n/<n>"], [*picked, kl])
    assert greedy == again == "greedy"
    names |= below(["evaluate/<policy>", "evaluate/<policy>/greedy"], each) | {f"evaluate/<policy>/{perplexity}"}
    names |= below(["evaluate/<comparison>", "evaluate/<comparison>/greedy"], compared)
    ends = [f"{judge}_axes_{end}/<axis>" for judge in ("reward", "gold") for end in ("low", "high")]
    costs = [f"{cost}{end}" for cost in ("cost", "gold_cost") for end in ("", "_low", "_high")]
    names |= below(["evaluate/<policy>"], [*ends, *costs]) | {"evaluate/cost_limit"}

    names |= {"reward/sources/<source>"} | below(["preferences"], words("tasks/preferences.py", "main")[-1])
    (counted,) = words("rlhf_core/constitution.py", "count_chains")
    names |= below(["constitution"], [*counted, "<rate>_before", "<rate>_after"])
    names |= below(["principles"], words("tasks/principles.py", "main")[-1])
    assert set(RATES) == set(PLACEHOLDERS["rate"].split("|"))
    shares = {f"<rate>{end}" for end in ("", "_low", "_high")}
    names |= below(["safety/<who>"], shares | {f"{category}_prompts" for category in CATEGORIES})
    names |= below(["safety/<who>_vs_before"], shares)
    (preferred,) = words("rlhf_core/safety.py", "prefers_declining")
    names |= below(["safety/prefers_declining/<category>"], preferred)
    rates = Rates(Interval(0, 0, 0), Interval(0, 0, 0)).metrics
    names |= below(["gate"], {*rates(), *rates("gold_")}.union(*words("rlhf_core/gate.py", "judge_round")))
    return names | below(["people", "gate/people"], set(rates()).union(*words("rlhf_core/people.py", "metrics")))


# ---- metrics: what docs/metrics.md has


def rows(heading: str) -> list[list[str]]:
    """The cells of each row in the tables under `### heading` of docs/metrics.md."""
    found = []
    for section in re.split(r"^##+ ", read(PROJECT / "docs" / "metrics.md"), flags=re.M):
        if section.startswith(heading):
            lines = [line for line in section.splitlines() if line.startswith("| `")]
            found += [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return found


def documented(heading: str) -> set[str]:
    names = [name for row in rows(heading) for name in re.findall(r"`([^`]+)`", row[0])]
    assert len(names) == len(set(names)), f"{heading}: {sorted({name for name in names if names.count(name) > 1})}"
    return set(names)


def covers(names: Iterable[str]) -> re.Pattern[str]:
    """Matches every real name that one of the documented names stands for."""
    each = [re.sub(r"<(\w+)>", lambda match: f"(?:{PLACEHOLDERS[match[1]]})", re.escape(name)) for name in names]
    return re.compile("|".join(each))


def test_every_curve_has_a_row_and_every_row_a_curve() -> None:
    assert documented("Curves") == logged_curves()


def test_every_final_metric_has_a_row_and_every_row_a_final_metric() -> None:
    assert documented("Final metrics") == logged_finals()


@pytest.mark.parametrize("heading", ["Curves", "Final metrics"])
def test_every_row_says_formula_unit_range_and_remedy(heading: str) -> None:
    assert not [row for row in rows(heading) if len(row) != 5 or not all(row)]


def test_the_metrics_of_the_last_run_are_those_documented() -> None:
    for path in sorted((PROJECT / "metrics").glob("*.json")):
        real = set(flat_metrics(json.loads(read(path)), path.stem))
        known = [name for name in documented("Final metrics") if name.startswith(f"{path.stem}/")]
        expected = [name for name in known if not optional(name)]
        assert not {name for name in real if not covers(known).fullmatch(name)}, shown(path)
        assert not {name for name in expected if not any(covers([name]).fullmatch(one) for one in real)}, shown(path)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_the_curves_of_the_last_run_are_those_documented(stage: str) -> None:
    path = PROJECT / "plots" / f"{stage}.csv"
    if path.is_file():  # DVC brings it; a fresh clone has none
        columns = set(path.read_text(encoding="utf-8").splitlines()[0].split(",")) - {"step"}
        known = {name for name in documented("Curves") if name.startswith(f"{stage}/") and not name.endswith(TIMINGS)}
        assert not {name for name in columns if not covers(known).fullmatch(name)}
        if columns or stage != "dpo":  # params.yaml may leave DPO out
            assert {name for name in known if not optional(name)} <= columns


def test_the_collector_sees_what_it_should() -> None:
    code = 'm = {"ppo/kl": 1, f"{prefix}/loss": 2, f"{prefix}/axes/{axis}/loss": 2}\nm["ppo/ratio"] = 3\n'
    code += 'm[f"ppo/axes/{axis}/score"] = 4\n'
    code += 'print(m["sft/loss"], "ppo/samples", {"kl": 4})'
    of_each = {f"{prefix}/{rest}" for prefix in MODELS for rest in ("loss", "axes/<axis>/loss")}
    assert curves_in(code) == {"ppo/kl", "ppo/ratio", "ppo/axes/<axis>/score"} | of_each


# ---- params.yaml


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description


@pytest.mark.parametrize(("key", "description"), list(fields(Params)), ids=[key for key, _ in fields(Params)])
def test_every_key_of_params_says_what_it_means(key: str, description: str | None) -> None:
    assert description, f"{key} has no description in rlhf_core/config.py"


# ---- README: the file map


def file_map() -> set[str]:
    """The paths of README's file map: a fenced block of lines `path  words`, `a/{b,c}.py` being two paths."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", read(README), flags=re.M | re.S):
        heads = re.findall(r"^([\w./*{},-]+?)/?  +\S", block, flags=re.M)
        if "flows/rlhf.py" in heads:
            return {path for head in heads for path in expanded(head)}
    pytest.fail("README.md has no fenced block with a line that starts with `flows/rlhf.py  `")


def expanded(path: str) -> list[str]:
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [match[1] + part.strip() + match[3] for part in match[2].split(",")] if match else [path]


def written_by_stages() -> set[str]:
    """Outputs of dvc.yaml, which a fresh clone does not have."""
    outputs: set[str] = set()
    for stage in yaml.safe_load(read(PROJECT / "dvc.yaml"))["stages"].values():
        for kind in ("outs", "metrics", "plots"):
            outputs |= {next(iter(out)) if isinstance(out, dict) else out for out in stage.get(kind, [])}
    return outputs


def test_every_path_of_the_file_map_exists() -> None:
    written = written_by_stages()
    missing = {path for path in file_map() if not (PROJECT / path).exists()}
    assert not {path for path in missing if not any(f"{out}/".startswith(f"{path}/") for out in written)}


def test_the_file_map_names_what_matters() -> None:
    modules = [path for folder in ("flows", "tasks", "rlhf_core") for path in (PROJECT / folder).glob("*.py")]
    needed = {shown(path) for path in modules if path.stem != "__init__"}
    needed |= {"params.yaml", "dvc.yaml", "prefect.yaml", "pyproject.toml", "constraints.txt", "Makefile"}
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    folders = {line.partition("/")[0] for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    needed |= folders - {path.partition("/")[0] for path in written_by_stages()} | {"data"}
    named = file_map()
    named |= {path.partition("/")[0] for path in named if "/" in path}  # a named file names its folder
    assert sorted(needed - named) == []


# ---- commands


def code_lines(text: str) -> list[str]:
    """Lines of fenced blocks, and code spans."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line for block in blocks for line in block.splitlines()] + spans


def commands(page: Path, tool: str) -> list[str]:
    """What follows the tool's name in each command line: up to a comment, a gap of two spaces, or the next command."""
    found = []
    for line in code_lines(read(page)):
        line = re.split(r"  +|\s#|&&|;|\|", line.strip().removeprefix("$ "))[0]
        if match := re.match(rf"(?:\S+=\S+ )*(?:\.venv/bin/)?{tool} (.+)", line):
            found.append(match[1])
    return found


def parse_error(command: Any, name: str, arguments: list[str]) -> Exception | None:
    """What a command says of its arguments; nothing is run."""
    try:
        command.make_context(name, arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_make_verb_exists(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+):", read(PROJECT / "Makefile"), flags=re.M))
    named = {word for words in commands(page, "make") for word in words.split() if re.fullmatch(r"[a-z-]+", word)}
    assert named <= verbs


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_rlhf_command_parses(page: Path) -> None:
    known = get_command(app).commands
    for line in commands(page, "rlhf"):
        name, *arguments = shlex.split(line)
        if name.startswith("-"):
            continue
        assert name in known, f"`rlhf {line}`: there is no such command"
        problem = parse_error(known[name], name, arguments)
        # A command may be named in passing, without its arguments; --help ends with Exit.
        assert type(problem).__name__ in ("NoneType", "MissingParameter", "Exit"), f"`rlhf {line}`: {problem}"


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_script_and_stage_exists(page: Path) -> None:
    for line in commands(page, "python"):
        assert line.startswith("-") or (PROJECT / line.split()[0]).is_file(), f"`python {line}`"
    for line in commands(page, "dvc"):
        if line.startswith("repro "):
            named = [word for word in line.split()[1:] if re.fullmatch(r"[a-z]+", word)]
            assert set(named) <= set(STAGES), f"`dvc {line}`"


# ---- links and words


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """(as written, file or folder, anchor) of each relative link."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield target, (page.parent / path).resolve() if path else page, anchor


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", read(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, path, anchor in links(page):
        assert path.exists(), f"{shown(page)} links to {target}"
        assert not anchor or anchor in anchors(path), f"{shown(page)} links to {target}; there is no such heading"


@pytest.mark.parametrize("page", [*DOCS, PROJECT / "CHANGELOG.md"], ids=shown)
def test_every_page_is_linked_from_another(page: Path) -> None:
    linked = {path for other in PAGES if other != page and other.is_file() for _, path, _ in links(other)}
    assert page in linked or page.parent in linked, f"nothing links to {shown(page)}"


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in sorted((PROJECT / "docs" / "decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_details_are_numbered_and_name_files_tests_and_values_that_are_there() -> None:
    page = PROJECT / "docs" / "details.md"
    entries = re.split(r"^(?=\d+\. )", read(page), flags=re.M)[1:]
    assert [int(entry.partition(".")[0]) for entry in entries] == list(range(1, len(entries) + 1))
    for entry in entries:
        title = entry.splitlines()[0]
        held = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", entry)
        assert len(held) == entry.count("::"), f"{title}: a test is not written as `tests/test_x.py::test_name`"
        assert held or "No test." in entry, f"{title} names no test, and does not say so"
        for file, name in held:
            tests = [node.name for node in ast.parse(read(PROJECT / file)).body if isinstance(node, ast.FunctionDef)]
            assert name in tests, f"{title} names {name}, which is not in {file}"
        assert re.search(r"\]\(\.\./\S+\.py\)", entry), f"{title} links to no file"
    for target, path, _ in links(page):
        assert path.is_file(), f"{shown(page)} links to {target}"
    params = yaml.safe_load(read(PROJECT / "params.yaml"))
    for section, key, value in re.findall(r"`(\w+)\.(\w+): ([^`]+)`", read(page)):
        assert params[section][key] == yaml.safe_load(value), f"{shown(page)} says {section}.{key}: {value}"


FORBIDDEN = {
    "a path of one machine": r"(?<![\w.~-])/(?:work|home|root|Users|mnt)/\w",
    "a temporary folder": r"(?<![\w.])/tmp/\w",
    "an address of one network": r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b",
    "a package index": r"--(?:extra-)?index-url|/simple/",
    "a ticket": r"(?i)\b(?:issue|ticket) #?\d",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_pages_and_settings_speak_of_the_project_alone(what: str) -> None:
    settings = [PROJECT / name for name in ("params.yaml", "dvc.yaml", "prefect.yaml", "pyproject.toml", "Makefile")]
    for path in [*PAGES, *settings, PROJECT / "constraints.txt"]:
        found = re.search(FORBIDDEN[what], read(path))
        assert not found, f"{shown(path)} names {what}: {found and found[0]}"


# ---- the data card


def test_the_data_cards_figures_are_those_of_the_data() -> None:
    script = runpy.run_path(str(PROJECT / "scripts" / "starter_figures.py"))
    assert f"```text\n{script['report']()}\n```" in read(PROJECT / "docs" / "data.md"), "run the command and paste"


def test_the_formats_examples_are_good_rows(tmp_path: Path) -> None:
    from rlhf_core.data import parse_demonstration, parse_prompt, parse_ranking, read_rows

    examples = re.findall(r"^```json\n(.*?)^```", read(PROJECT / "docs" / "data.md"), flags=re.M | re.S)
    (tmp_path / "examples.jsonl").write_text("".join(examples), encoding="utf-8")
    demonstration, *rankings, prompt = [row for _, row in read_rows(str(tmp_path / "examples.jsonl"))]
    assert parse_demonstration(demonstration).response
    assert [len(parse_ranking(row).responses) for row in rankings] == [3, 2, 2]
    assert parse_prompt(prompt).category == "explain"
