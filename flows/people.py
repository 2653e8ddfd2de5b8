"""People are asked by a flow run: items are opened on the pages of `rlhf feedback`, and the flow waits for judgements.

What rounds ask is in online.py; `compare_answers` asks about the pipeline's own answers, for stage people.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from flows.waiting import close_lost_run, pages, wait_for_people
from rlhf_core.config import load_params
from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.feedback import rounds
from rlhf_core.feedback.exchange import Found, add_items
from rlhf_core.feedback.store import Store, located, open_store
from tasks.environment import project_of, record_folder
from tasks.files import write_jsonl
from tasks.stage import write_json, write_text

ASKED = "asked the comparison of "  # marks of `compare_answers`, in .rlhf


class Waiting(BaseModel):
    """How long the flow waits for people, and where they judge."""

    model_config = ConfigDict(extra="forbid")
    judgements: int | None = Field(
        None, ge=1, title="Judgements", description="Go on after so many; when all items are judged if empty."
    )
    overlap: int = Field(1, ge=1, le=20, title="Overlap", description="How many people judge each item.")
    hours: float = Field(
        72.0, gt=0, title="Hours", description="Go on after so many hours with what there is, counted from the start."
    )
    address: str | None = Field(
        None,
        title="Address",
        description="Where people reach the pages of rlhf feedback that you serve yourself; the flow serves them on "
        "this machine if empty.",
    )
    port: int = Field(8000, ge=1, le=65535, title="Port", description="Port of the pages that the flow serves.")
    database: str | None = Field(
        None, title="Database", description="Of rlhf feedback: a file or a URL; .rlhf/feedback.db if empty."
    )
    guideline: str | None = Field(
        None,
        title="Guideline",
        description="A Markdown file that people judge by; if empty the one that ships, or that a campaign had last.",
    )
    axes: list[str] = Field(
        [],
        title="Axes",
        description="What people score each answer of a round on too, from 1 to 5; if empty what the campaign had "
        "last, or reward.axes.",
    )
    seconds: float = Field(5.0, gt=0, title="Look every", description="Seconds between two looks at the count.")


class Asked:
    """An open database of judgements, the keys of the items that people were asked about, and when that began."""

    def __init__(self, store: Store, keys: list[str], mark: Path) -> None:
        self.store, self.keys, self.mark = store, keys, mark

    def forget(self) -> None:
        """The next start asks and waits anew."""
        self.mark.unlink()


class NobodyJudged(ConfigError):
    """The time is over, and nothing was judged."""


def take_over(folder: Path) -> None:
    """Nobody else works here, since we hold the lock: a flow run that seems to wait here was killed."""
    mark, own = folder / ".rlhf" / "flow_run", str(flow_run.get_id())
    if mark.is_file() and (lost := mark.read_text(encoding="utf-8").strip()) != own:
        close_lost_run(lost, successor=str(flow_run.get_name()))
    write_text(mark, own)


def settle(waiting: Waiting, project: Path) -> Waiting:
    """The same with the database that judgements go to; a mistake is told now, and not after an hour of training.

    A relative name of a database is one in the project's folder, where `rlhf feedback` is served.

    Raises:
        ConfigError: a guideline for pages that somebody else serves.
        MissingArtifact: there is no such guideline.
    """
    if waiting.address and waiting.guideline:
        raise ConfigError(
            "Found --guideline with --address: pages that you serve yourself show the guideline that they were "
            "given, `rlhf feedback --guideline FILE`. Leave it out here."
        )
    if waiting.guideline and not Path(waiting.guideline).is_file():
        raise MissingArtifact(f"Found no guideline {waiting.guideline}, expected a Markdown file.")
    named = waiting.database or os.environ.get("RLHF_FEEDBACK_DATABASE")
    database = located(named, project) if named else str(record_folder(project) / "feedback.db")
    return waiting.model_copy(update={"database": database})


def settle_comparison(waiting: Waiting, until: str, project: Path) -> Waiting:
    """As `settle`, for people who compare the pipeline's answers.

    Raises:
        ConfigError: as `settle`; or the run ends before, or axes are given, which comparisons have none of.
    """
    if until != "people":
        raise ConfigError(f"Found people to ask and last stage {until}; they are asked before the last one, people.")
    if waiting.axes:
        raise ConfigError(f"Found axes {', '.join(waiting.axes)}; two answers are compared as a whole. Leave them out.")
    return settle(waiting, project)


def ask(
    items: Sequence[Found], waiting: Waiting, *, mark: Path, what: str, again: str, axes: Sequence[str] = ()
) -> Asked:
    """Open items on the pages and wait; a flow that was killed waits on until the same deadline.

    Args:
        items: of one kind, at least one.
        mark: a file that keeps when this was asked first, and by how many people each item was to be judged before.
        what: what is asked, in a few words, such as "round 3 of online".
        again: the command that goes on, for messages.
        axes: what each answer of a ranking is scored on, unless `waiting` names others.

    Raises:
        NobodyJudged: there is no judgement of these items.
    """
    assert waiting.database, "`settle` says where judgements are kept"
    store, keys, log = open_store(waiting.database), [item.key() for item in items], get_run_logger()
    if not mark.is_file():
        with store.session() as session:
            rounds.ask_again(session, keys)
            before = rounds.overlaps(session, keys)
        write_json(mark, {"asked": datetime.now(UTC).isoformat(), "before": before})
    known = json.loads(mark.read_text(encoding="utf-8"))
    deadline = datetime.fromisoformat(known["asked"]) + timedelta(hours=waiting.hours)
    with store.session() as session:
        add_items(session, items, overlap=waiting.overlap, axes=waiting.axes or axes)
        rounds.open_again(session, keys, overlap=waiting.overlap)

    def look() -> rounds.Count:
        with store.session() as session:
            return rounds.count(session, keys, overlap=waiting.overlap)

    enough = min(waiting.judgements or look().wanted, look().wanted)

    def wait(address: str, tend: Callable[[], None] = lambda: None) -> rounds.Count:
        link = f"{address.rstrip('/')}/{items[0].kind}"
        return wait_for_people(
            str(flow_run.get_id()), look, enough=enough, deadline=deadline, link=link,
            what=what, every=waiting.seconds, say=log.info, tend=tend,
        )  # fmt: skip

    if waiting.address:
        found = wait(waiting.address)
    else:
        with pages(waiting.database, port=waiting.port, guideline=waiting.guideline, say=log.info) as served:
            found = wait(served.address, served.look_after)
    with store.session() as session:
        rounds.close(session, known["before"])
    asked = Asked(store, keys, mark)
    if not found.done:
        asked.forget()
        raise NobodyJudged(f"Nobody has judged anything for {what}. Nothing is lost: `{again}` asks again.")
    return asked


def compare_answers(waiting: Waiting, *, root: Path) -> None:
    """Have people compare two policies' held-out answers, blind, and keep what they said where stage people reads it.

    One pair of answers a prompt is asked about. All that people ever said of these two policies' present answers is
    taken, also where `rlhf feedback import` had put them on the pages. Where nobody judges, that is told, and what the
    file holds stays.

    Args:
        waiting: settled.
        root: the workspace whose stage evaluate has written answers.

    Raises:
        DataError: a policy of people.policies has no answers.
    """
    from rlhf_core.data import prompt_field
    from rlhf_core.gate import alike, to_compare
    from tasks.people import ANSWERS, SAID, pairs_of, read_said

    new, current = load_params(root / "params.yaml").people.policies
    what = f"the comparison of {new} with {current}"
    pairs = [pair for pair in pairs_of(root / ANSWERS, new, current) if not alike(pair.new, pair.current)]
    if not pairs:
        get_run_logger().info(f"Nothing to ask for {what}: both gave the same answers")
        return
    rows = [
        {"prompt": prompt_field(pair.prompt), "responses": [pair.new, pair.current], "category": pair.category,
         "origins": [new, current]}
        for pair in pairs
    ]  # fmt: skip
    first = set(to_compare(pairs))
    items: dict[str, tuple[Found, dict[str, Any]]] = {}
    chosen: dict[str, Found] = {}
    for pair, row, item in zip(pairs, rows, rounds.items_from(rows, "compare"), strict=True):
        items[item.key()] = (item, row)
        if pair in first:
            chosen[item.key()] = item
    mark = root / ".rlhf" / f"{ASKED}{sha256(''.join(chosen).encode()).hexdigest()[:12]}.json"
    _close_others(waiting, mark)
    again = "rlhf people" + (f" --recipe {root.name}" if project_of(root) != root else "")
    try:
        found = ask(list(chosen.values()), waiting, mark=mark, what=what, again=again)
    except NobodyJudged as error:
        get_run_logger().warning(str(error))
        return
    with found.store.session() as session:
        said = [_as_asked(one, *items[one["item"]]) for one in rounds.comparisons(session, list(items))]
        known = rounds.known(session, list(items))
    file = root / SAID / f"{new}-vs-{current}.jsonl"
    # Of earlier answers, or from another database, such as a colleague's.
    of_others = [row for row in read_said(file) if row.get("id") not in known] if file.is_file() else []
    write_jsonl(file, [*of_others, *said])
    found.forget()  # who asks again, for more judgements or by more people, gets as many hours as now


def _close_others(waiting: Waiting, mark: Path) -> None:
    """Answers that were asked about and are no longer there would come up among those that are asked about now."""
    for other in mark.parent.glob(f"{ASKED}*"):
        if other != mark:
            with open_store(str(waiting.database)).session() as session:
                rounds.close(session, json.loads(other.read_text(encoding="utf-8"))["before"])
            other.unlink()


def _as_asked(said: dict[str, Any], item: Found, row: dict[str, Any]) -> dict[str, Any]:
    """A judgement with its answers as the policies gave them, and in our order: a database may have them otherwise."""
    turned = said["responses"] != item.responses
    return {
        "prompt": row["prompt"],
        "responses": row["responses"],
        "policies": row["origins"],
        "ranks": said["ranks"][::-1] if turned else said["ranks"],
        "first": 1 - said["first"] if turned else said["first"],
        **{field: said[field] for field in ("verdict", "annotator", "guideline", "id")},
    }
