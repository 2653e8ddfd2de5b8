"""The pipeline, START HERE: prepare → sft → reward → ppo → dpo → evaluate → people, one Prefect task a stage.

The task for a stage asks DVC to bring that stage up to date (tasks/pipeline.py). So DVC decides what has to run,
Prefect when and where, and MLflow remembers what was measured: one parent run for the flow run, one nested run a stage.
What a stage does is in tasks/<stage>.py, how it learns in rlhf_core/<stage>.py, and every value in params.yaml.

This file leaves out the command line (cli.py), the choice of a Prefect server (server.py), how people are asked
(people.py) and the table (results.py).
"""

from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.people import Waiting, compare_answers, settle_comparison, take_over
from flows.results import publish_results
from flows.waiting import StoppedByHand
from rlhf_core.errors import RLHFError
from tasks.environment import project_of
from tasks.pipeline import STAGES, Outcome, StageFailed, apply_overrides, find_root, run_stage, workspace_lock
from tasks.stage import check_disk, forget_checkpoints
from tasks.tracking import pipeline_run

Stage = Literal["prepare", "sft", "reward", "ppo", "dpo", "evaluate", "people"]


async def _crashed(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Try a stage again after a crash; the user's mistakes stay mistakes."""
    error = await state.aresult(raise_on_failure=False)
    return isinstance(error, StageFailed) and error.crashed


@task(cache_policy=NO_CACHE, persist_result=False, retry_delay_seconds=2, retry_condition_fn=_crashed)
def bring_up_to_date(stage: Stage, force: bool, env: dict[str, str]) -> Any:
    """One stage through DVC; its lines go to the log of its task run as they come."""
    log = get_run_logger()
    try:
        outcome = run_stage(stage, force=force, on_line=log.info, env=env)
    except RLHFError as error:
        if isinstance(error, StageFailed) and error.crashed:
            raise
        return Failed(message=str(error), data=error)
    if outcome is Outcome.RAN:
        return Completed(message=f"{stage} ran", data=outcome.value)
    return Completed(name="Cached", message=f"{stage} had nothing to do", data=outcome.value)


@flow(name="rlhf", persist_result=False)
def rlhf(
    overrides: Annotated[list[str], Field(title="Overrides")] = [],  # noqa: B006  (never changed; the form shows a list)
    until: Annotated[Stage, Field(title="Last stage")] = "people",
    force: Annotated[bool, Field(title="Run again")] = False,
    fresh: Annotated[bool, Field(title="Start over")] = False,
    run_name: Annotated[str | None, Field(title="Name")] = None,
    retries: Annotated[int, Field(title="Retries", ge=0, le=10)] = 1,
    stage_minutes: Annotated[float | None, Field(title="Time limit", gt=0)] = None,
    people: Annotated[Waiting | None, Field(title="People compare")] = None,
) -> Any:
    """Bring every stage up to date, in order, and compare the base, SFT and PPO policies.

    Args:
        overrides: Values to change in params.yaml first, one `section.key=value` a line, such as `ppo.kl_coef=0.1`.
        until: The last stage to run; the ones before it are brought up to date.
        force: Run every stage even if nothing changed.
        fresh: Start stages that were stopped from their beginning, not from their last checkpoint.
        run_name: What the run is called in MLflow; the flow run's own name if empty.
        retries: How often a stage that crashed is started again.
        stage_minutes: Minutes that one stage may take before it is ended; no limit if empty.
        people: How to wait for people who compare answers of two policies, blind; they are not asked if empty.
    """
    try:
        root = find_root()
        waiting = settle_comparison(people, until, project_of(root)) if people else None
        with workspace_lock(root):
            if waiting:
                take_over(root)
            # Before params.yaml is changed, and before DVC starts a stage and removes what its last run wrote.
            check_disk(root)
            apply_overrides(overrides, root=root)
            stages = STAGES[: STAGES.index(until) + 1]
            if fresh:
                forget_checkpoints(stages)
            flow_run_id = str(flow_run.get_id())
            limit = stage_minutes * 60 if stage_minutes else None
            with pipeline_run(run_name or str(flow_run.get_name()), {"rlhf.flow_run_id": flow_run_id}) as parent:
                env = {"RLHF_PARENT_RUN_ID": parent, "RLHF_FLOW_RUN_ID": flow_run_id}
                for stage in stages:
                    if stage == "people" and waiting:
                        compare_answers(waiting, root=root)
                    one = bring_up_to_date.with_options(
                        name=stage, task_run_name=stage, retries=retries, timeout_seconds=limit
                    )
                    one(stage, force, env, return_state=True).result()  # raises what the stage failed with
            if until in ("evaluate", "people"):
                publish_results(root, people=until == "people")
    except StoppedByHand as stopped:
        return stopped.state()
    except RLHFError as error:  # one clear message; a traceback would say less
        return Failed(message=str(error), data=error)
    return Completed(message=f"Stages up to {until} are up to date.")
