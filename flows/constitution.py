"""Constitutional AI as one flow: docs/constitution.md tells how to use it.

    prepare → sft, as the project has them
    prepare → constitution → sft → principles → reward → ppo → dpo → evaluate → safety

The SFT policy of the first part answers red-team prompts. Its answers, revised by principles, are what the second
part's SFT policy learns from beside the starter demonstrations; that one's answers, compared by principles, are what
the reward model learns from beside the starter rankings. Each stage is brought up to date through DVC, as in
flows/rlhf.py, in a workspace of its own, as a campaign of online rounds has one (campaign.py). What are the rounds'
own values there are the second part's here.
"""

import shutil
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import yaml
from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.campaign import open_workspace, with_stages
from flows.recipe import is_own
from flows.results import publish_results
from flows.rlhf import bring_up_to_date
from rlhf_core.config import check_params
from rlhf_core.errors import RLHFError
from tasks.environment import project_of
from tasks.pipeline import find_root, workspace_lock
from tasks.stage import check_disk, write_text
from tasks.tracking import pipeline_run

KIND = "constitution"
FIRST = ("prepare", "sft")
STAGES = ("prepare", "constitution", "sft", "principles", "reward", "ppo", "dpo", "evaluate", "safety")
START, RED_TEAM = "artifacts/start/sft", "data/red_team"
REVISIONS, RANKINGS = "artifacts/constitution/revisions", "artifacts/principles"
PAGE = "artifacts/safety/report.html"


@flow(name="constitution", persist_result=False)
def constitution(
    name: Annotated[str, Field(title="Campaign")] = "constitution",
    recipe: Annotated[str | None, Field(title="Recipe")] = None,
    overrides: Annotated[list[str], Field(title="Overrides")] = [],  # noqa: B006  (never changed; the form shows a list)
    then: Annotated[list[str], Field(title="Overrides of the second part")] = [],  # noqa: B006
    until: Annotated[str, Field(title="Last stage")] = STAGES[-1],
    retries: Annotated[int, Field(title="Retries", ge=0, le=10)] = 1,
) -> Any:
    """Let a policy revise its answers by principles, learn from that, and measure what it does with harmful requests.

    Args:
        name: Its workspace is .rlhf/NAME. One that is not there is begun.
        recipe: Begin it with the values of recipes/NAME.yaml.
        overrides: Begin it with other values of params.yaml, one `section.key=value` a line.
        then: More values for the second part only; the SFT policy before is not trained with them.
        until: The last stage to run.
        retries: How often a stage that crashed is started again.
    """
    try:
        project = project_of(find_root())  # the flow may be started in a workspace
        folder = open_workspace(name, KIND, project=project, recipe=recipe, overrides=overrides, in_rounds=then)
        with chdir(folder), workspace_lock(folder):
            check_disk(folder)
            _run(folder, name, until, retries)
            if until == STAGES[-1]:
                publish_results(folder)
    except RLHFError as error:  # one clear message; a traceback would say less
        return Failed(message=str(error), data=error)
    where = f" Rates and chains are in {folder / PAGE}" if until == STAGES[-1] else ""
    return Completed(message=f"Stages up to {until} are up to date.{where}")


def _run(folder: Path, name: str, until: str, retries: int) -> None:
    """Both parts; the first only if it was not over before."""
    tags = {"rlhf.flow_run_id": str(flow_run.get_id()), "rlhf.campaign": name}
    with pipeline_run(f"{name}-{flow_run.get_name()}", tags) as parent:
        env = {"RLHF_PARENT_RUN_ID": parent, "RLHF_FLOW_RUN_ID": tags["rlhf.flow_run_id"]}

        def run(part: str, stages: Sequence[str]) -> None:
            for stage in stages:
                one = bring_up_to_date.with_options(name=stage, task_run_name=f"{part} {stage}", retries=retries)
                one(stage, False, env, return_state=True).result()  # raises what the stage failed with

        if not (folder / START).is_dir():
            get_run_logger().info("First the SFT policy whose answers will be revised")
            write_text(folder / "dvc.yaml", with_stages(folder, None))
            run("first", FIRST)
            keep_start(folder)
        lay_out(folder)
        run("then", STAGES[: STAGES.index(until) + 1])


def keep_start(folder: Path) -> None:
    """Put the SFT policy aside in one move; it is a copy, since stage sft will write another one."""
    start = folder / START
    partial = start.with_name(f".{start.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / "artifacts/sft/model", partial, ignore=shutil.ignore_patterns(".gitignore"))
    partial.rename(start)


def lay_out(folder: Path) -> None:
    """The second part's stages and parameters: red-team prompts, and where revisions and rankings will lie."""
    values = yaml.safe_load((folder / "campaign.yaml").read_text(encoding="utf-8"))
    red_team = [f"{RED_TEAM}/{path.name}" for path in sorted((folder / RED_TEAM).glob("*.jsonl"))]
    values["prepare"]["prompts"] = [*values["prepare"]["prompts"], *red_team]
    values["prepare"]["max_prompts"] = 0  # of which hardly any of the red team's might be left
    values["sft"]["feedback"], values["reward"]["feedback"] = REVISIONS, RANKINGS
    values["constitution"]["policy"] = START
    params = check_params(values, source="the second part")
    write_text(folder / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    whole = yaml.safe_load(with_stages(folder, "recipes/constitution/stages.yaml"))
    _watch(whole["stages"]["constitution"]["deps"], params.constitution.principles)  # no dvc.yaml of the user's has it
    _watch(whole["stages"]["principles"]["deps"], params.constitution.principles)
    if params.judge.kind in ("local", "reward") and is_own(Path(params.judge.model)):
        _watch(whole["stages"]["principles"]["deps"], params.judge.model)
    write_text(folder / "dvc.yaml", yaml.safe_dump(whole, sort_keys=False))


def _watch(deps: list[str], path: str) -> None:
    """Add a dependency, unless a folder that is there holds it."""
    if not any(Path(path).is_relative_to(dep) for dep in deps):
        deps.append(path)
