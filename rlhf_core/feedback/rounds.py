"""A round of an online campaign on the pages: opened for people, counted while they judge, read, and closed.

A round's items are told from all others by their keys. `origins` are a part of these and name the campaign, so that a
team's pages may show several at once.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
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
    """Bring back to people what they said nothing by: skipped, or none acceptable. It is withdrawn, as by undo."""
    said = Judgement.item_id.in_(select(Item.id).where(Item.key.in_(keys))) & Judgement.verdict.in_(("skipped", "none"))
    session.execute(update(Judgement).where(LIVE, said).values(withdrawn_at=now()))


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


def close(session: Session, keys: Sequence[str]) -> None:
    """Show these items to nobody any more; what was judged stays."""
    session.execute(update(Item).where(Item.key.in_(keys)).values(overlap=0))


def rankings(session: Session, keys: Sequence[str]) -> list[dict[str, Any]]:
    """What was said of these items, as rows of rankings (docs/data.md)."""
    return list(export_rankings(session, keys=frozenset(keys)))


def comparisons(session: Session, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What was said of these pairs: ranks in the items' order, equal for a tie or both bad; `first` stood first.

    `item` is the key of what was judged.
    """
    query = select(Judgement).join(Item).where(LIVE, Judgement.verdict != "skipped", Item.key.in_(keys))
    for judgement in session.scalars(query.order_by(Judgement.id)):
        item = judgement.item
        yield {
            "item": item.key,
            "prompt": [{"role": role, "content": content} for role, content in item.prompt],
            "responses": item.responses,
            "ranks": judgement.ranks or [1] * len(item.responses),
            "annotator": judgement.annotator.name,
            "guideline": judgement.guideline,
            "verdict": judgement.verdict,
            "first": judgement.presented[0],
        }
