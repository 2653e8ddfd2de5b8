"""A sweep over objectives: the pipeline at several weights or limits, and one Pareto frontier over two axes.

Each point is a run of the same stages in a workspace of its own, brought up to date through DVC as in flows/rlhf.py.
What a point is made of on disk is in sweeps.py, how the frontier is drawn in rlhf_core/pareto.py.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.rlhf import bring_up_to_date
from flows.sweeps import OWN, SHARED, Point, Sweep, as_table, begin_point, open_sweep, write_frontier
from rlhf_core.errors import MissingArtifact, RLHFError
from rlhf_core.pareto import verdicts
from tasks.environment import project_of
from tasks.lineage import save_experiment
from tasks.pipeline import Outcome, find_root, workspace_lock
from tasks.stage import check_disk
from tasks.tracking import pipeline_run, write_artifact

EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"


@flow(name="sweep", persist_result=False)
def sweep(
    name: Annotated[str, Field(title="Sweep")] = "sweep",
    axes: Annotated[list[str], Field(title="Two axes")] = [],  # noqa: B006  (never changed; the form shows a list)
    weights: Annotated[list[float], Field(title="Weights of the second")] = [],  # noqa: B006
    limits: Annotated[list[float], Field(title="Limits of its cost")] = [],  # noqa: B006
    recipe: Annotated[str | None, Field(title="Recipe")] = None,
    overrides: Annotated[list[str], Field(title="Overrides")] = [],  # noqa: B006
    drop: Annotated[list[str], Field(title="Points to drop")] = [],  # noqa: B006
    retries: Annotated[int, Field(title="Retries", ge=0, le=10)] = 1,
) -> Any:
    """Run the pipeline at every point that is not done, and draw what all points reach on two axes.

    Args:
        name: The sweep; its shared workspace is .rlhf/NAME, a point's .rlhf/NAME-POINT. One that is there is gone on
            with, and new points are added to it.
        axes: The two axes of the frontier, such as helpfulness and harmlessness.
        weights: A point each: PPO climbs the second axis with this weight, and the first with the rest up to 1.
        limits: A point each: PPO climbs the first axis while the mean cost, which is the second axis's score with the
            opposite sign, stays within this.
        recipe: Begin the sweep with the values of recipes/NAME.yaml.
        overrides: Begin it with other values of params.yaml, one `section.key=value` a line.
        drop: Points to go on without, such as weight-0.25; their workspaces stay where they are.
        retries: How often a stage that crashed is started again.
    """
    try:
        project = project_of(find_root())  # the flow may be started in a workspace
        found = open_sweep(
            name,
            project=project,
            axes=axes,
            weights=weights,
            limits=limits,
            recipe=recipe,
            overrides=overrides,
            drop=drop,
        )
        with workspace_lock(found.folder), _one_experiment(name):
            check_disk(found.folder)
            _run(found, project, retries)
    except RLHFError as error:  # one clear message; a traceback would say less
        return Failed(message=str(error), data=error)
    return Completed(message=f"{len(found.points)} points are up to date. Page: {found.page}")


@contextmanager
def _one_experiment(name: str) -> Iterator[None]:
    """All workspaces of the sweep record to one MLflow experiment, or they could not be compared."""
    before = os.environ.get(EXPERIMENT)
    os.environ[EXPERIMENT] = before or f"rlhf-{name}"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(EXPERIMENT)


def _run(found: Sweep, project: Path, retries: int) -> None:
    """The shared stages, each point, the frontier; what is up to date ends as Cached.

    Raises:
        RLHFError: points failed; the others were run all the same, and what was reached is drawn.
    """
    log, tags = get_run_logger(), {"rlhf.sweep": found.name, "rlhf.flow_run_id": str(flow_run.get_id())}
    failed: dict[str, RLHFError] = {}
    with chdir(found.folder):
        of_sweep = {**tags, "rlhf.kind": "sweep"}
        with pipeline_run(found.name, of_sweep, key=f"sweep-{found.id}", summary=False) as whole:
            _stages(SHARED, "shared", whole, retries)
            for point in found.points:
                try:
                    ran = _run_point(found, point, project, tags, retries)
                    log.info(f"Point {point.name}: {', '.join(ran) + ' ran' if ran else 'Cached'}")
                except RLHFError as error:  # the others do not hang on it
                    failed[point.name] = error
                    log.error(f"Point {point.name}: {error}")
            with suppress(MissingArtifact) if failed else nullcontext():  # none may have come so far
                _draw(found, whole)
            if failed:
                raise RLHFError(_words(found, failed))


def _run_point(found: Sweep, point: Point, project: Path, tags: dict[str, str], retries: int) -> list[str]:
    """All stages of a point; returns those that ran."""
    with chdir(begin_point(found, point, project=project)), workspace_lock(Path.cwd()):
        key, of_point = f"sweep-{found.id}-{point.name}", {**tags, "rlhf.point": point.name}
        with pipeline_run(f"{found.name}-{point.name}", of_point, key=key) as parent:
            ran = _stages((*SHARED, *OWN), point.name, parent, retries)
        save_experiment(f"{found.name}-{point.name}", Path.cwd(), root=project)
    return ran


def _draw(found: Sweep, whole: str) -> None:
    """The frontier of what was reached: the page, its numbers, and a table for the flow run."""
    points = write_frontier(found)
    for file in (found.page, found.page.with_suffix(".csv")):
        write_artifact(whole, file.name, file.read_text(encoding="utf-8"))
    text = as_table(points, found.axes) + "".join(f"\n- {line}" for line in verdicts(points, found.axes))
    create_markdown_artifact(text, key="frontier", description=f"The frontier of sweep {found.name}")


def _words(found: Sweep, failed: dict[str, RLHFError]) -> str:
    """Which points failed, why, and what to do."""
    some = len(failed) < len(found.points)
    first = f"{len(failed)} of {len(found.points)} points failed{'; the frontier is of the others' if some else ''}."
    last = f"`rlhf sweep {found.name}` takes them up again"
    last += f"; with `--drop {','.join(failed)}` it goes on without them." if some else "."
    return "\n".join([first, *(f"- {name}: {error}" for name, error in failed.items()), last])


def _stages(stages: Sequence[str], name: str, parent: str, retries: int) -> list[str]:
    env = {"RLHF_PARENT_RUN_ID": parent, "RLHF_FLOW_RUN_ID": str(flow_run.get_id())}
    ran = []
    for stage in stages:
        one = bring_up_to_date.with_options(name=stage, task_run_name=f"{name} {stage}", retries=retries)
        state = one(stage, False, env, return_state=True)
        if state.result() == Outcome.RAN.value:  # raises what the stage failed with
            ran.append(stage)
    return ran
