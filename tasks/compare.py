"""Two runs side by side as text: the parameters that differ first, then final metrics, then the data versions.

A run is an MLflow run (id or name), a git revision or a DVC experiment; `workspace` is what lies on disk.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from rlhf_core.errors import MissingArtifact, ResourceError
from tasks.lineage import find_revision, git, project_state
from tasks.tracking import RecordedRun, find_recorded_run, newest_pipeline_runs, tracking_uri

_NONE = "–"
CURVES = ("ppo/score", "ppo/kl")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Snapshot:
    """One side of a comparison."""

    name: str
    origin: str
    params: dict[str, str]
    metrics: dict[str, float]
    dependencies: dict[str, str]
    recorded: RecordedRun | None = None


def compare(a: str | None = None, b: str | None = None) -> str:
    """A table of what differs between two runs; by default the last one recorded, B, and the one before it, A.

    Raises:
        MissingArtifact: a name is no run, revision or experiment; lists the newest that are.
        ResourceError: MLflow does not answer, and the name is no revision either.
    """
    left, right = (find_snapshot(name) for name in ((a, b) if a and b else _last_two(a or b)))
    header = [("", "A", "B", ""), ("run", left.name, right.name, ""), ("from", left.origin, right.origin, "")]
    params = [
        (name, left.params.get(name, _NONE), right.params.get(name, _NONE), "")
        for name in sorted(left.params.keys() | right.params.keys())
        if left.params.get(name) != right.params.get(name)
    ]
    metrics = [
        _metric_row(name, left.metrics.get(name), right.metrics.get(name))
        for name in sorted(left.metrics.keys() | right.metrics.keys())
    ]
    paths = sorted(left.dependencies.keys() | right.dependencies.keys(), key=lambda path: (path[:5] != "data/", path))
    versions = [
        (path, _short(left.dependencies.get(path)), _short(right.dependencies.get(path)), "")
        for path in paths
        if left.dependencies.get(path) != right.dependencies.get(path)
    ]
    sections = [
        ("", header),
        ("Parameters that differ", params),
        ("Final metrics (the last column is B − A)", metrics),
        ("Versions of data, code and upstream results that differ", versions),
    ]
    text = _table(sections)
    if left.recorded and right.recorded and left.recorded.experiment == right.recorded.experiment:
        text += "\n\n" + _pages(left.recorded, right.recorded)
    return text


def _last_two(given: str | None) -> tuple[str, str]:
    """Run ids of the last two pipeline runs, or a given run and the last one that is another."""
    runs = [run for run in _ask_mlflow(newest_pipeline_runs) if given is None or not _is_called(run, given)]
    if len(runs) < (1 if given else 2):
        raise MissingArtifact("There are no two runs to compare yet; `rlhf run` makes one.")
    return (given, runs[0].run_id) if given else (runs[1].run_id, runs[0].run_id)


def _is_called(run: RecordedRun, name: str) -> bool:
    return run.name == name or run.run_id.startswith(name)


def _ask_mlflow(question: Callable[..., Answer], *arguments: str | int) -> Answer:
    try:
        return question(*arguments)
    except Exception as error:  # border: MLflow
        where = re.sub(r"//[^@/]*@", "//", tracking_uri())
        raise ResourceError(
            f"MLflow at {where} does not answer. Git revisions and DVC experiments can be compared without it."
        ) from error


def find_snapshot(name: str) -> Snapshot:
    """The run that a name stands for; revisions and experiments are tried before MLflow, which takes longer to ask."""
    if name == "workspace":
        return _from_state(name, "the files on disk", project_state())
    if not re.fullmatch(r"[0-9a-f]{32}", name) and (commit := find_revision(name)):
        return _from_state(name, f"git {commit[:8]}", project_state(rev=name))
    run = _ask_mlflow(find_recorded_run, name)
    if run is None:
        raise MissingArtifact(_unknown(name, _ask_mlflow(newest_pipeline_runs)))
    return _from_run(run)


def recorded_snapshots(count: int = 1000) -> list[Snapshot]:
    """Pipeline runs in MLflow, the oldest first.

    Raises:
        ResourceError: MLflow does not answer.
    """
    return [_from_run(run) for run in reversed(_ask_mlflow(newest_pipeline_runs, count))]


def _from_run(run: RecordedRun) -> Snapshot:
    return Snapshot(run.name, f"MLflow {run.run_id[:8]}", run.params, run.metrics, run.dependencies, run)


def _from_state(name: str, origin: str, state: dict[str, dict[str, Any]]) -> Snapshot:
    return Snapshot(name, origin, state["params"], state["metrics"], state["dependencies"])


def _unknown(name: str, newest: list[RecordedRun]) -> str:
    refs = git("for-each-ref", "--sort=-creatordate", "--count=5", "--format=%(refname)", "refs/exps") or ""
    experiments = [ref.rsplit("/", 1)[-1] for ref in refs.splitlines()]
    runs = [f"{run.name} ({run.run_id[:8]})" for run in newest]
    lines = [f"{name} is no MLflow run, git revision or DVC experiment."]
    if runs:
        lines.append(f"Newest runs: {', '.join(runs)}.")
    if experiments:
        lines.append(f"Newest experiments: {', '.join(experiments)}.")
    if not runs and not experiments:
        lines.append("Nothing has been recorded yet; `rlhf run` makes a run.")
    return " ".join(lines)


def _metric_row(name: str, a: float | None, b: float | None) -> tuple[str, str, str, str]:
    difference = f"{b - a:+.4g}" if a is not None and b is not None else ""
    return name, _number(a), _number(b), difference


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4g}"


def _short(value: str | None) -> str:
    return _NONE if value is None else value[:10]


def _table(sections: list[tuple[str, list[tuple[str, str, str, str]]]]) -> str:
    """Sections with a title each and the same column widths in all."""
    rows = [row for _, section in sections for row in section]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for title, section in sections:
        if title:
            lines += ["", title if section else f"{title}: none"]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in section
        ]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def _pages(a: RecordedRun, b: RecordedRun) -> str:
    """Where `rlhf ui` shows the same, and PPO's curves, which the runs of the stage have."""
    lines = ["While `rlhf ui` runs:", "  this table     /#/compare-runs?" + _query(a, runs=[a.run_id, b.run_id])]
    stages = [run.stages.get("ppo", "") for run in (a, b)]
    if all(stages) and len(set(stages)) == 2:
        query = _query(a, runs=stages, metric=CURVES[0], plot_metric_keys=CURVES)
        lines.append(f"  PPO's curves   /#/metric?{query}&x_axis=step&line_smoothness=1")
    return "\n".join(lines)


def _query(run: RecordedRun, **values: Any) -> str:
    values["experiments"] = [run.experiment]
    return "&".join(f"{name}={quote(json.dumps(value))}" for name, value in values.items())
