"""A round of an online campaign on the pages: opened for people, counted while they judge, read, and closed.

A round's items are told from all others by their keys. `origins` are a part of these and name the campaign, so that a
team's pages may show several at once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select, update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from rlhf_core.feedback.exchange import Found, as_turns, export_rankings, stored
from rlhf_core.feedback.judging import LIVE, Kind
from rlhf_core.feedback.store import Annotator, Item, Judgement, now

DATABASE_AWAY = (OperationalError, InterfaceError)  # what is raised while it is being restarted


class Count(NamedTuple):
    """How far a round is, in judgements, of each item as many as wanted at most."""

    done: int
    wanted: int
    left: int  # that those who may judge can still give: nobody is asked again about what they judged or skipped


def items_from(rows: Sequence[dict[str, Any]], kind: Kind) -> list[Found]:
    """Rows of `prompt`, `responses`, `origins` and `category` as items of a kind, as they will lie in the database.

    Of other texts their keys would be none that are there.
    """
    found = (
        Found(kind, as_turns(row["prompt"]), row["responses"], row["origins"], str(row.get("category") or ""))
        for row in rows
    )
    return [stored(item) for item in found]


def open_again(session: Session, keys: Sequence[str], *, overlap: int) -> None:
    """Let so many people judge each item: also those that were closed, or were opened for fewer people before."""
    session.execute(update(Item).where(Item.key.in_(keys), Item.overlap < overlap).values(overlap=overlap))


def ask_again(session: Session, keys: Sequence[str]) -> None:
    """Bring back to people what they said nothing by, withdrawn as by undo: skipped, or of a ranking none acceptable.

    Of two answers that are both bad, that is what they said.
    """
    items = select(Item.id).where(Item.key.in_(keys))
    said_nothing = (Judgement.verdict == "skipped") & Judgement.item_id.in_(items)
    said_nothing |= (Judgement.verdict == "none") & Judgement.item_id.in_(items.where(Item.kind == "rank"))
    session.execute(update(Judgement).where(LIVE, said_nothing).values(withdrawn_at=now()))


def count(session: Session, keys: Sequence[str], *, overlap: int) -> Count:
    """How many judgements of these items there are, and how many there can be with the people that there are."""
    items = session.scalars(select(Item.id).where(Item.key.in_(keys))).all()
    query = select(Judgement.item_id, Judgement.annotator_id, Judgement.verdict).join(Item)
    judged = session.execute(query.where(LIVE, Item.key.in_(keys))).all()
    given = Counter(item for item, _, verdict in judged if verdict != "skipped")
    people = _who_may_judge(session)
    asked = Counter(item for item, who, _ in judged if who in people)
    missing = {item: max(overlap - given[item], 0) for item in items}
    return Count(
        sum(min(number, overlap) for number in given.values()),
        overlap * len(set(keys)),
        sum(min(number, len(people) - asked[item]) if people else number for item, number in missing.items()),
    )


def _who_may_judge(session: Session) -> set[int]:
    """Those with a password; where nobody has one, the person of this machine, once the pages know of them."""
    people = session.execute(select(Annotator.id, Annotator.password_hash)).all()
    return {who for who, password in people if password} or {who for who, _ in people}


def overlaps(session: Session, keys: Sequence[str]) -> dict[str, int]:
    """By how many people each of these items is to be judged now; 0 for one that is not there."""
    found = dict(session.execute(select(Item.key, Item.overlap).where(Item.key.in_(keys))).tuples().all())
    return {key: found.get(key, 0) for key in keys}


def close(session: Session, before: Mapping[str, int]) -> None:
    """Let each item be judged by as many people as before a round opened it, most by nobody; what was judged stays.

    Args:
        before: what `overlaps` said then.
    """
    for overlap in sorted(set(before.values())):
        keys = [key for key, value in before.items() if value == overlap]
        session.execute(update(Item).where(Item.key.in_(keys)).values(overlap=overlap))


def rankings(session: Session, keys: Sequence[str]) -> list[dict[str, Any]]:
    """What was said of these items, as rows of rankings (docs/data.md)."""
    return list(export_rankings(session, keys=frozenset(keys)))


def comparisons(session: Session, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What was said of these pairs: ranks in the items' order, equal for a tie or both bad; `first` stood first.

    `item` is the key of what was judged, `id` the judgement's own, which no other database has.
    """
    query = select(Judgement).join(Item).where(LIVE, Judgement.verdict != "skipped", Item.key.in_(keys))
    for judgement in session.scalars(query.order_by(Judgement.id)):
        item = judgement.item
        yield {
            "item": item.key,
            "id": judgement.client_id,
            "prompt": [{"role": role, "content": content} for role, content in item.prompt],
            "responses": item.responses,
            "ranks": judgement.ranks or [1] * len(item.responses),
            "annotator": judgement.annotator.name,
            "guideline": judgement.guideline,
            "verdict": judgement.verdict,
            "first": judgement.presented[0],
        }


def known(session: Session, keys: Sequence[str]) -> set[str]:
    """The ids of all judgements of these items, withdrawn ones too."""
    return set(session.scalars(select(Judgement.client_id).join(Item).where(Item.key.in_(keys))))
