"""A sweep over objectives on disk: its workspaces, what each point changes, and what they reached.

The workspace .rlhf/NAME computes what all points share, .rlhf/NAME-POINT the rest. docs/decisions gives the reasons.
Nothing here knows Prefect; flows/frontier.py runs the points.
"""

import json
import shutil
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml

from flows.recipe import (
    copy_code,
    copy_named,
    first_params,
    init_dvc,
    is_unfinished,
    make_base,
    making,
    take_new_keys,
)
from rlhf_core.config import Params, check_params, load_params
from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.pareto import Outcome, Reached, render_pareto, unbeaten
from rlhf_core.statistics import Interval
from tasks.files import write_csv
from tasks.pipeline import STAGES, checkout, workspace_lock
from tasks.stage import write_json, write_text

SHARED = ("prepare", "sft", "reward")  # the same for all points
OWN = STAGES[len(SHARED) :]
assert STAGES[: len(SHARED)] == SHARED
JUDGED = {"gold": "gold_axes", "reward": "reward_axes"}  # judge → its names in metrics/evaluate.json
EMPTY: dict[str, Any] = {"axis_weights": {}, "axis_order": [], "thresholds": {}, "cost_axis": ""}


class Point(NamedTuple):
    """One run of a sweep: what it is called, and what it climbs."""

    name: str
    ppo: dict[str, Any]  # keys of params.yaml's section ppo
    weight: float | None = None  # of the second axis
    limit: float | None = None  # of the second axis's cost

    @property
    def words(self) -> str:
        """Its settings for a reader."""
        weights = ", ".join(f"{axis} {weight:g}" for axis, weight in self.ppo["axis_weights"].items())
        return weights if self.limit is None else f"{weights}; cost of {self.ppo['cost_axis']} ≤ {self.limit:g}"


class Sweep(NamedTuple):
    """Where a sweep lies, and its points so far."""

    name: str
    folder: Path
    axes: tuple[str, str]
    points: list[Point]
    id: str  # a name that no other sweep has, also one of the same name before or after

    def workspace(self, point: Point) -> Path:
        """Where a point's stages run."""
        return self.folder.with_name(f"{self.name}-{point.name}")

    @property
    def page(self) -> Path:
        """The frontier; a CSV file is beside it."""
        return self.folder / "frontier.html"


def points_of(axes: tuple[str, str], weights: Sequence[float], limits: Sequence[float]) -> list[Point]:
    """A point for each weight of the second axis, of which the first has the rest, and for each limit of its cost."""
    first, second = axes
    found = []
    for weight in sorted(set(weights)):
        climbed = {first: round(1 - weight, 6), second: weight}
        ppo = {**EMPTY, "objective": "weighted", "axis_weights": climbed}
        found.append(Point(f"weight-{weight:g}", ppo, weight=weight))
    for limit in sorted(set(limits)):
        ppo = {**EMPTY, "objective": "constrained", "axis_weights": {first: 1.0}, "cost_axis": second}
        found.append(Point(f"limit-{limit:g}", {**ppo, "cost_limit": limit}, limit=limit))
    return found


def open_sweep(
    name: str,
    *,
    project: Path,
    axes: Sequence[str] = (),
    weights: Sequence[float] = (),
    limits: Sequence[float] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Sweep:
    """Bring a sweep's shared workspace up to date with the project's code, or make one; new points come on top.

    Its parameters are the project's of the day it began, so that its points can be compared.

    Args:
        drop: names of points that it has no more.

    Raises:
        ConfigError: the name or the axes are none, there are no points, a value is impossible, or what it began with is
            given otherwise.
        ResourceError: a run works in it, and would find other code under its feet.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"Found a sweep named {name!r}, expected letters, digits, - and _.")
    folder = project / ".rlhf" / name
    state, asked = folder / "sweep.json", (axes, weights, limits, recipe, overrides, drop)
    known, points = _agreed(folder, *asked)
    if state.is_file():
        with workspace_lock(folder):
            take_new_keys(folder / "params.yaml", project)
    values = _values(folder) if state.is_file() else _first_values(known, project)
    for point in points:
        _params_of(values, point)  # a weight that cannot be is told before anything is written
    with workspace_lock(folder):
        known, points = _agreed(folder, *asked)  # again: another command may have begun it meanwhile
        with nullcontext() if state.is_file() else making(folder):
            copy_code(folder, project)
            init_dvc(folder, cache=(project / ".dvc" / "cache").resolve())
            if not state.is_file():
                _begin(folder, project, known, values)
            copy_named(check_params(values), folder, project)
            write_json(state, known)
    first, second = known["axes"]
    return Sweep(name, folder, (first, second), points, known["id"])


def _agreed(
    folder: Path,
    axes: Sequence[str],
    weights: Sequence[float],
    limits: Sequence[float],
    recipe: str | None,
    overrides: Sequence[str],
    drop: Sequence[str],
) -> tuple[dict[str, Any], list[Point]]:
    """What a sweep has and what is asked for in one, and all its points; raises as `open_sweep` does."""
    name, state, wanted = folder.name, folder / "sweep.json", {"recipe": recipe, "overrides": list(overrides)}
    if state.is_file():
        known = json.loads(state.read_text(encoding="utf-8"))
        if (recipe or overrides) and wanted != {key: known[key] for key in wanted}:
            raise ConfigError(
                f"Sweep {name} began with recipe {known['recipe']} and overrides {known['overrides']}. Leave them out "
                "to go on with it, or give another name."
            )
        if axes and list(axes) != known["axes"]:
            raise ConfigError(f"Sweep {name} is over {', '.join(known['axes'])}; found {', '.join(axes)}.")
    else:
        others = any((folder / part).exists() for part in ("dvc.lock", "artifacts", "campaign.json"))
        if others and not is_unfinished(folder):
            raise ConfigError(f"{folder} is the workspace of a recipe or campaign. Give the sweep another name.")
        known = {**wanted, "axes": list(axes), "weights": [], "limits": [], "id": uuid.uuid4().hex}
    if len(set(known["axes"])) != 2 or len(known["axes"]) != 2:
        raise ConfigError(f"Found axes {', '.join(known['axes']) or 'none'}, expected two, such as: "
                          "--axes helpfulness,harmlessness")  # fmt: skip
    known |= {"weights": sorted({*known["weights"], *weights}), "limits": sorted({*known["limits"], *limits})}
    first, second = known["axes"]
    points = points_of((first, second), known["weights"], known["limits"])
    names = [point.name for point in points]
    if missing := [one for one in drop if one not in names]:
        raise ConfigError(f"Sweep {name} has no point {', '.join(missing)}; found {', '.join(names)}.")
    points = [point for point in points if point.name not in drop]
    known["weights"] = [point.weight for point in points if point.weight is not None]
    known["limits"] = [point.limit for point in points if point.limit is not None]
    if not points:
        raise ConfigError("Found no points, expected some, such as: --weights 0,0.5,1 or --limits=-0.3")
    return known, points


def _first_values(known: dict[str, Any], project: Path) -> dict[str, Any]:
    """The parameters that all points share, as the sweep begins."""
    with TemporaryDirectory() as draft:
        params = first_params(known["recipe"], known["overrides"], Path(draft), project=project)
        values = _values(Path(draft))
    values["reward"]["axes"] = list(dict.fromkeys([*params.reward.axes, *known["axes"]]))
    return values


def _begin(folder: Path, project: Path, known: dict[str, Any], values: dict[str, Any]) -> None:
    """Write the parameters, and bring what the project has computed already."""
    make_base(_write_params(values, folder), folder)
    if not known["recipe"] and (project / "dvc.lock").is_file():
        _take_over(project, folder, SHARED)


def begin_point(sweep: Sweep, point: Point, *, project: Path) -> Path:
    """Lay out a point's workspace: code, parameters, and what the shared stages left; returns it. May be repeated.

    Raises:
        ResourceError: a run works in it, and would find other code under its feet.
    """
    folder = sweep.workspace(point)
    with workspace_lock(folder):
        copy_code(folder, project)
        init_dvc(folder, cache=(project / ".dvc" / "cache").resolve())
        values = _params_of(_values(sweep.folder), point)
        if not (folder / "params.yaml").is_file() or _values(folder) != values:
            _write_params(values, folder)
        params = load_params(folder / "params.yaml")
        copy_named(params, folder, project)
        base = params.prepare.base.removeprefix("path:")
        if base.startswith(".rlhf/"):  # a recipe's random model
            shutil.copytree(sweep.folder / base, folder / base, dirs_exist_ok=True)
        _take_over(sweep.folder, folder, SHARED)
    return folder


def _take_over(source: Path, folder: Path, stages: Sequence[str]) -> None:
    """What stages left in one workspace, for another with the same DVC cache; its own stages stay."""
    locks = [_load(path / "dvc.lock") for path in (folder, source)]
    whole: dict[str, Any] = locks[0] or {"schema": locks[1].get("schema", "2.0"), "stages": {}}
    whole["stages"] |= {stage: entry for stage, entry in locks[1].get("stages", {}).items() if stage in stages}
    write_text(folder / "dvc.lock", yaml.safe_dump(whole, sort_keys=False))
    for stage in stages:
        metrics = source / "metrics" / f"{stage}.json"
        if metrics.is_file():
            write_text(folder / "metrics" / metrics.name, metrics.read_text(encoding="utf-8"))
    checkout(root=folder)


def _params_of(shared: dict[str, Any], point: Point) -> dict[str, Any]:
    values = {**shared, "ppo": shared["ppo"] | point.ppo}
    check_params(values, source=f"point {point.name}")
    return values


def _values(folder: Path) -> dict[str, Any]:
    return _load(folder / "params.yaml")


def _load(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write_params(values: dict[str, Any], folder: Path) -> Params:
    params = check_params(values, source=f"{folder.name}/params.yaml")
    write_text(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return params


# ---- what was reached


def reached(sweep: Sweep) -> list[Reached]:
    """The SFT policy, then each point that was evaluated.

    Raises:
        MissingArtifact: none was.
    """
    found: list[Reached] = []
    for point in sweep.points:
        file = sweep.workspace(point) / "metrics/evaluate.json"
        if not file.is_file():
            continue
        metrics = json.loads(file.read_text(encoding="utf-8"))
        if not found:
            found.append(Reached("SFT", "where all start", _outcomes(metrics["sft"], sweep.axes), 0.0))
        found.append(
            Reached(
                point.name,
                point.words,
                _outcomes(metrics["ppo"], sweep.axes),
                metrics["ppo"]["kl"],
                point.weight,
                point.limit,
            )
        )
    if not found:
        raise MissingArtifact(f"No point of sweep {sweep.name} was evaluated yet. `rlhf sweep {sweep.name}` goes on.")
    return found


def _outcomes(policy: dict[str, Any], axes: tuple[str, str]) -> dict[str, Outcome]:
    return {
        judge: Outcome(
            *(Interval(*(policy[f"{key}{end}"][axis] for end in ("", "_low", "_high"))) for axis in axes)
        )
        for judge, key in JUDGED.items()
    }  # fmt: skip


def write_frontier(sweep: Sweep) -> list[Reached]:
    """Write the page and the same numbers as a CSV file beside it; returns what was reached."""
    points = reached(sweep)
    write_text(sweep.page, render_pareto(points, sweep.axes, f"{sweep.axes[0]} and {sweep.axes[1]}: {sweep.name}"))
    best = {judge: unbeaten(points, judge) for judge in JUDGED}
    rows = []
    for place, point in enumerate(points):
        row: dict[str, Any] = {"run": point.name, "settings": point.settings, "kl": point.kl}
        for judge in JUDGED:
            for axis, found in zip(sweep.axes, point.by[judge], strict=True):
                row |= {f"{judge}_{axis}{end}": value for end, value in zip(("", "_low", "_high"), found, strict=True)}
            row[f"{judge}_unbeaten"] = int(best[judge][place])
        rows.append(row)
    write_csv(sweep.page.with_suffix(".csv"), rows)
    return points


def as_table(points: Sequence[Reached], axes: tuple[str, str]) -> str:
    """What was reached by the gold model, as Markdown; a star is at what none beats."""
    lines = [f"| | run | {axes[0]} | {axes[1]} | KL |", "|---|---|---:|---:|---:|"]
    for point, best in zip(points, unbeaten(points, "gold"), strict=True):
        cells = [f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})" for one in point.by["gold"]]
        lines.append(f"| {'★' if best else ''} | {point.name} | {cells[0]} | {cells[1]} | {point.kl:.1f} |")
    return "\n".join(lines) + "\n"
