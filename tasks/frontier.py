"""What runs reach, read from MLflow, git revisions and the workspace, as a page and a CSV file.

How it is drawn is in rlhf_core/frontier.py. Nothing is recorded, and nothing is computed but who is beaten.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.charts import root
from rlhf_core.errors import MissingArtifact
from rlhf_core.frontier import Group, Point, on_frontier, render_frontier
from tasks.compare import Snapshot, find_snapshot, recorded_snapshots
from tasks.files import write_csv
from tasks.stage import write_text

METHODS = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
# What has to be the same for two scores to mean the same.
JUDGED_WITH = ("artifacts/reward", "artifacts/sft/model", "data/prepared")
JUDGED_AT = ("evaluate.temperature", "evaluate.response_tokens")
# Settings of these decide what a policy is; the others how it is judged, and that is told once.
DECIDING = ("prepare.", "sft.", "reward.", "ppo.", "dpo.")


def frontier(names: Sequence[str], page: Path) -> list[Group]:
    """Write the page, and the same numbers as a CSV file beside it.

    Args:
        names: runs, git revisions or DVC experiments as `rlhf compare` takes them; all recorded pipeline runs and the
            workspace where there are none.

    Raises:
        MissingArtifact: a name is nothing known, or no run was evaluated yet.
        ResourceError: MLflow does not answer.
    """
    if names:
        snapshots = [find_snapshot(name) for name in names]
    else:
        snapshots = [*recorded_snapshots(), find_snapshot("workspace")]
    groups = group_runs(snapshots)
    if not groups:
        raise MissingArtifact("None of these runs has been evaluated. `rlhf run` brings all stages up to date.")
    write_text(page, render_frontier(groups))
    write_csv(page.with_suffix(".csv"), [row for number, group in enumerate(groups, 1) for row in _rows(number, group)])
    return groups


def group_runs(snapshots: Sequence[Snapshot]) -> list[Group]:
    """Points by what they were judged with, the largest group first; what a later run only took over is left out."""
    found: dict[tuple[str, ...], dict[tuple[Any, ...], Point]] = {}
    told = _differing(snapshots)
    for snapshot in snapshots:
        settings = ", ".join(f"{name} {snapshot.params[name]}" for name in told if name in snapshot.params)
        points = _points(snapshot, settings)
        if points:
            conditions = tuple(snapshot.dependencies.get(path, "–") for path in JUDGED_WITH)
            conditions += tuple(snapshot.params.get(name, "–") for name in JUDGED_AT)
            known = found.setdefault(conditions, {})
            for point in points:
                known.setdefault((point.method, point.kl, point.reward, point.gold_reward), point)
    groups = [
        Group(
            ", ".join(f"{name} {value[:10]}" for name, value in zip((*JUDGED_WITH, *JUDGED_AT), key, strict=True)),
            list(points.values()),
        )
        for key, points in found.items()
    ]
    return sorted(groups, key=lambda group: -len(group.points))


def _points(snapshot: Snapshot, settings: str) -> list[Point]:
    bests = {re.match(r"evaluate/best_of_n/(\d+)/", name) for name in snapshot.metrics}
    sizes = sorted({int(match[1]) for match in bests if match})
    named = {f"evaluate/{key}": name for key, name in METHODS.items()}
    named |= {f"evaluate/best_of_n/{n}": f"best of {n}" for n in sizes}
    points = []
    for prefix, method in named.items():
        numbers = [snapshot.metrics.get(f"{prefix}/{name}", math.nan) for name in ("kl", "reward", "gold_reward")]
        if all(map(math.isfinite, numbers)):
            kl, reward, gold_reward = numbers
            points.append(Point(snapshot.name, method, kl, reward, gold_reward, settings))
    return points


def _differing(snapshots: Sequence[Snapshot]) -> list[str]:
    """Names of settings that some runs have otherwise than others, or do not have."""
    names = sorted({name for snapshot in snapshots for name in snapshot.params if name.startswith(DECIDING)})
    return [name for name in names if len({snapshot.params.get(name) for snapshot in snapshots}) > 1]


def _rows(number: int, group: Group) -> list[dict[str, Any]]:
    by_gold, by_proxy = (on_frontier(group.points, judge) for judge in ("gold_reward", "reward"))
    return [
        {
            "group": number,
            **point._asdict(),
            "root_kl": root(point.kl),
            "on_gold_frontier": int(gold),
            "on_reward_frontier": int(proxy),
        }
        for point, gold, proxy in zip(group.points, by_gold, by_proxy, strict=True)
    ]
