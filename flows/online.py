"""Online RLHF: rounds of answering, judging, learning and a gate. docs/online.md tells how to use it.

    preferences → somebody judges → reward → ppo → evaluate → gate → the new policy, or the old one

Each stage is brought up to date through DVC, as in flows/rlhf.py. What a round is made of on disk is in campaign.py,
how the flow waits for people in waiting.py.
"""

import json
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.campaign import (
    ANSWERS,
    COMPARISONS,
    FEEDBACK,
    FIRST,
    ITEMS,
    LEARNING,
    SAMPLING,
    START,
    VERDICT,
    Campaign,
    begin_round,
    end_round,
    for_people,
    load_round_params,
    open_campaign,
    overview,
    read_rows,
    words,
)
from flows.people import Asked, Waiting, ask, settle, take_over
from flows.rlhf import bring_up_to_date
from flows.waiting import StoppedByHand
from rlhf_core.config import Params, load_params
from rlhf_core.errors import ConfigError, RLHFError
from rlhf_core.feedback.annotators import Annotator, Item, as_ranking, rule
from tasks.environment import how_to_set, project_of, record_folder
from tasks.files import write_jsonl
from tasks.pipeline import find_root, version_data, workspace_lock
from tasks.stage import check_disk, write_json
from tasks.tracking import pipeline_run, write_metrics, write_summary

PEOPLE, JUDGE = "people", ("judge", "ai")  # the last two are one


@flow(name="online", persist_result=False)
def online(
    name: Annotated[str, Field(title="Campaign")] = "online",
    rounds: Annotated[int, Field(title="Rounds", ge=0, le=1000)] = 1,
    until: Annotated[int | None, Field(title="Until round", ge=0)] = None,
    annotator: Annotated[str | None, Field(title="Annotator")] = None,
    recipe: Annotated[str | None, Field(title="Recipe")] = None,
    overrides: Annotated[list[str], Field(title="Overrides")] = [],  # noqa: B006  (never changed; the form shows a list)
    in_rounds: Annotated[list[str], Field(title="Overrides in the rounds")] = [],  # noqa: B006
    waiting: Annotated[Waiting, Field(title="Waiting for people")] = Waiting(),  # noqa: B008  (frozen in the form)
    retries: Annotated[int, Field(title="Retries", ge=0, le=10)] = 1,
) -> Any:
    """Run rounds of an online campaign; one that was cut off is gone on with first.

    Args:
        name: The campaign; its workspace is .rlhf/NAME. One that is not there is begun, with the pipeline as round 0.
        rounds: How many rounds to run now, round 0 not counted.
        until: Run on until this round is over, in place of a number of rounds; the same run twice then does nothing.
        annotator: Who judges: people, on the pages of rlhf feedback; judge, the model of params.yaml's section judge;
            or rule:NAME. What the campaign's preferences.annotator says if empty.
        recipe: Begin the campaign with the values of recipes/NAME.yaml.
        overrides: Begin it with other values of params.yaml, one `section.key=value` a line.
        in_rounds: More values for the rounds after round 0 only, which then is what the project has computed already.
        waiting: How long to wait for people, and where they judge.
        retries: How often a stage that crashed is started again.
    """
    try:
        check_annotator(annotator or PEOPLE)  # a wrong name is told now, and not after an hour of sampling
        project = project_of(find_root())  # the flow may be started in a workspace
        waiting = settle(waiting, project)
        campaign = open_campaign(name, project=project, recipe=recipe, overrides=overrides, in_rounds=in_rounds)
        guideline, axes = for_people(campaign, waiting.guideline, waiting.axes)
        waiting = waiting.model_copy(update={"guideline": guideline, "axes": axes})
        with chdir(campaign.folder), workspace_lock(campaign.folder):
            check_disk(campaign.folder)
            who = annotator or load_params("campaign.yaml").preferences.annotator
            check_annotator(who)
            take_over(campaign.folder)
            last = until if until is not None else max(campaign.next_round() - 1, 0) + rounds
            while campaign.next_round() <= last:
                _run_round(campaign, who, waiting, retries)
            decisions = campaign.decisions()
            create_markdown_artifact(
                overview(campaign.name, decisions), key="rounds", description=f"All rounds of {name}"
            )
    except StoppedByHand as stopped:
        return stopped.state()
    except RLHFError as error:  # one clear message; a traceback would say less
        return Failed(message=str(error), data=error)
    promoted = max(decision["round"] for decision in decisions if decision["promoted"])
    return Completed(message=f"Round {len(decisions) - 1} is over; the current policy is that of round {promoted}.")


def _run_round(campaign: Campaign, annotator: str, waiting: Waiting, retries: int) -> None:
    """One round, from wherever it was left."""
    log, number = get_run_logger(), begin_round(campaign)
    log.info(f"Round {number} of {campaign.name}" + ("" if number else ": the pipeline itself"))
    tags = {"rlhf.flow_run_id": str(flow_run.get_id()), "rlhf.round": str(number), "rlhf.campaign": campaign.name}
    key = f"round-{campaign.identity()}-{number}"
    # The summary is of the round's files as they lie before the round is put away.
    with pipeline_run(f"{campaign.name}-{number:03}", tags, key=key, summary=False) as parent:
        env = {"RLHF_PARENT_RUN_ID": parent, "RLHF_FLOW_RUN_ID": tags["rlhf.flow_run_id"]}

        def run(*stages: str) -> None:
            for stage in stages:
                one = bring_up_to_date.with_options(name=stage, task_run_name=f"{number} {stage}", retries=retries)
                one(stage, False, env, return_state=True).result()  # raises what the stage failed with

        if number == 0:
            run(*FIRST)
            verdict: dict[str, Any] = {"promoted": True, "checks": [], "judged": 0}
        else:
            _check_kinds(campaign)
            run(SAMPLING)
            judged = _judge(campaign, number, annotator, waiting, parent)
            version_data(FEEDBACK, root=campaign.folder)
            run(*LEARNING)
            _compare(campaign, number, waiting)
            run(VERDICT)
            verdict = {**_read_json(campaign.folder / "artifacts/gate/verdict.json"), "judged": judged}
        write_summary(parent)
        decision = end_round(campaign, number, verdict)
        log.info(words(decision))
        if number:
            text = (campaign.round_folder(number) / "gate.md").read_text(encoding="utf-8")
            create_markdown_artifact(text, key="gate", description=f"The gate's verdict on round {number}")


def _check_kinds(campaign: Campaign) -> None:
    """The gate would stop at a misspelt kind of prompts, but hours later."""
    from rlhf_core.gate import require_safety_kinds

    kinds = {str(row.get("category") or "") for row in read_rows(campaign.folder / START / "answers.jsonl")}
    require_safety_kinds(kinds, load_round_params(campaign).gate)


# ---- judging


def check_annotator(name: str) -> None:
    """ConfigError where there is no annotator of that name."""
    if name not in (PEOPLE, *JUDGE):
        if not name.startswith("rule:"):
            raise ConfigError(f"Found annotator {name!r}, expected people, judge, ai or rule:NAME.")
        rule(name.removeprefix("rule:"))


def open_annotator(name: str, number: int, params: Params) -> Annotator:
    """A rule, or the model that section judge of params.yaml names, once it has shown that it judges well enough.

    Args:
        number: the round, which seeds a rule that throws coins.

    Raises:
        RLHFError: there is none, or its agreement with known rankings is below `judge.bar`.
    """
    if name not in JUDGE:
        return rule(name.removeprefix("rule:"), seed=number)
    from rlhf_core.data import load_prepared
    from rlhf_core.feedback.judges import admit, open_judge
    from tasks.progress import ProgressTracker

    judge = open_judge(
        params.judge, params.prepare, memory=record_folder() / "judge.db", tracker=ProgressTracker("judge")
    )
    if params.judge.bar > 0:
        known = load_prepared(Path("data/prepared"), "rankings", ["test"])
        found = admit(judge, known, params.judge, anyway=how_to_set("judge", "bar", "0")).agreement
        print(f"judge    {judge.name} agrees with {found.mean:.1%} of known answers", flush=True)
    return judge


def _judge(campaign: Campaign, number: int, annotator: str, waiting: Waiting, parent: str) -> int:
    """Have the round's items judged, once; returns how many rankings came of it.

    Args:
        parent: the round's MLflow run, which gets what a model that judges counted.
    """
    file = campaign.feedback_file(number)
    if not file.is_file():
        rows = read_rows(campaign.folder / ITEMS)
        if annotator == PEOPLE:
            found = _ask(campaign, number, rows, waiting)
        else:
            found, counts = judge.with_options(task_run_name=f"{number} judge")(
                annotator, number, rows, load_round_params(campaign)
            )
            if counts:
                write_metrics(parent, counts)
        if not found:
            again = "The same command asks people again. " if annotator == PEOPLE else ""
            raise ConfigError(
                f"No judgement of round {number} ranks anything, so there is nothing to learn from. {again}With "
                f"another annotator: `rlhf online run {campaign.name} --annotator rule:short`"
            )
        write_jsonl(file, found)
    return len(read_rows(file))


@task(name="judge", cache_policy=NO_CACHE, persist_result=False, log_prints=True)  # its progress line goes to the log
def judge(
    name: str, number: int, rows: Sequence[dict[str, Any]], params: Params
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rankings by a rule or a model, and what it counted as metrics; rankings of nothing but ties teach nothing."""
    from rlhf_core.feedback.judges import counts_of

    annotator = open_annotator(name, number, params)
    items = [
        Item(tuple((turn["role"], turn["content"]) for turn in row["prompt"]), tuple(row["responses"])) for row in rows
    ]
    found = []
    for row, said in zip(rows, annotator.judge(items), strict=True):
        if len(set(said.ranks)) > 1:
            found.append({**row, **as_ranking(said, annotator)})
    get_run_logger().info(f"{annotator.name} ranked the answers to {len(found)} of {len(rows)} prompts")
    return found, counts_of(annotator)


def _ask(campaign: Campaign, number: int, rows: list[dict[str, Any]], waiting: Waiting) -> list[dict[str, Any]]:
    """Rankings by people: the items are opened on the pages, and the flow waits."""
    from rlhf_core.feedback.rounds import rankings

    if not rows:
        return []
    found = _wait(campaign, _to_rank(campaign, number, rows), waiting, what=f"round {number} of {campaign.name}")
    with found.store.session() as session:
        said = rankings(session, found.keys)
        late = _late(campaign, session)
    if not said:
        found.forget()
    elif late:
        get_run_logger().info(
            f"{len(late)} judgements of earlier rounds came after those had ended; this one takes them"
        )
        said += late
    return said


def _to_rank(campaign: Campaign, number: int, rows: list[dict[str, Any]]) -> list[Any]:
    """A round's items as the pages hold them."""
    from rlhf_core.feedback.rounds import items_from

    origin = campaign.origin(number)
    return items_from([{**row, "origins": [origin] * len(row["responses"])} for row in rows], "rank")


def _late(campaign: Campaign, session: Any) -> list[dict[str, Any]]:
    """Rankings of earlier rounds' items by people whose page was open when the round ended, each taken once."""
    from rlhf_core.feedback.rounds import rankings

    keep_all = load_round_params(campaign).gate.keep_rejected
    keys: list[str] = []
    taken: list[dict[str, Any]] = []
    for decision in campaign.decisions():
        items, judged = (campaign.round_folder(decision["round"]) / name for name in ("items.jsonl", "feedback.jsonl"))
        if judged.is_file() and items.is_file():
            taken += read_rows(judged)
            if keep_all or decision["promoted"]:
                keys += [item.key() for item in _to_rank(campaign, decision["round"], read_rows(items))]
    return [row for row in rankings(session, keys) if row not in taken]


def _compare(campaign: Campaign, number: int, waiting: Waiting) -> None:
    """Where the gate's judge is people: have them compare the new policy with the current one, blind, once."""
    file, config = campaign.folder / COMPARISONS, load_round_params(campaign).gate
    if file.is_file():
        return
    rows: list[dict[str, Any]] = []
    if config.judge == PEOPLE:
        from rlhf_core.data import prompt_field
        from rlhf_core.feedback.rounds import comparisons, items_from
        from rlhf_core.gate import pair_answers, to_compare

        new, current = (read_rows(campaign.folder / path) for path in (ANSWERS, f"{START}/answers.jsonl"))
        asked = [
            {"prompt": prompt_field(pair.prompt), "responses": [pair.new, pair.current], "category": pair.category,
             "origins": [campaign.origin(number), campaign.origin(campaign.promoted())]}
            for pair in to_compare(pair_answers(new, current, "ppo"))
        ]  # fmt: skip
        items = {item.key(): (item, row) for item, row in zip(items_from(asked, "compare"), asked, strict=True)}
        what = f"the comparison of round {number} of {campaign.name}"
        if items:
            found = _wait(campaign, [item for item, _ in items.values()], waiting, what=what)
            with found.store.session() as session:
                for said in comparisons(session, found.keys):
                    _, row = items[said["item"]]  # its texts as the gate knows them, which a database may not take
                    del said["id"]  # of the same judgements another round has the same bytes
                    rows.append({**said, "prompt": row["prompt"], "responses": row["responses"]})
        else:
            get_run_logger().info(f"Nothing to ask for {what}: both policies gave the same answers")
    write_json(file, rows)


def _wait(campaign: Campaign, items: list[Any], waiting: Waiting, *, what: str) -> Asked:
    mark = campaign.folder / ".rlhf" / f"asked {what}.json"
    again, axes = f"rlhf online run {campaign.name}", load_round_params(campaign).reward.axes
    return ask(items, waiting, mark=mark, what=what, again=again, axes=axes)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
