"""Gold questions: items whose answer is known, by which annotators are measured.

Everybody is given all of them, among the others and looking like them.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from rlhf_core.feedback.judging import LIVE, Refused
from rlhf_core.feedback.store import Item, Judgement

ANSWERS = ("ranked", "none")
SHOWN = 8  # own judgements that an admin can make a known answer


class Candidate(NamedTuple):
    """An own judgement that may become the known answer."""

    judgement: int
    prompt: str
    said: str
    gold: bool


def candidates(session: Session, annotator: int) -> list[Candidate]:
    """An admin's last judgements that say something."""
    query = (
        select(Judgement).where(Judgement.annotator_id == annotator, LIVE, Judgement.verdict.in_(ANSWERS))
        .order_by(Judgement.id.desc()).limit(SHOWN)
    )  # fmt: skip
    return [
        Candidate(one.id, one.item.prompt[-1][1], _in_words(one), one.item.gold_from == one.id)
        for one in session.scalars(query)
    ]


def toggle(session: Session, annotator: int, judgement: int) -> bool:
    """Make an own judgement the known answer of its item, or take that back; whether it is one now.

    Raises:
        Refused: it is another person's, withdrawn, or says nothing.
    """
    found = session.get(Judgement, judgement)
    if found is None or found.annotator_id != annotator or found.withdrawn_at or found.verdict not in ANSWERS:
        raise Refused(404, "There is no such judgement of yours.")
    taken = found.item.gold_from == judgement
    found.item.gold = None if taken else found.ranks or []
    found.item.gold_from = None if taken else judgement
    return not taken


def count(session: Session) -> int:
    """How many items have a known answer."""
    return session.scalar(select(func.count(Item.id)).where(Item.gold.is_not(None))) or 0


def accuracy(ranks: Sequence[int] | None, known: Sequence[int]) -> float:
    """How far a judgement agrees with the known answer: 1 wholly, 0 not at all.

    The share of pairs of responses that the known answer orders and the judgement orders alike. Where it orders none,
    for it is all one tie, or none is acceptable (`[]`), the judgement has to say the same.

    Args:
        ranks: of the judgement, 1 is best; None where it says that none is acceptable.
        known: the ranks that are right, in the same order.
    """
    if not ranks or not known:
        return float(bool(ranks) == bool(known))
    ordered = [(one, two) for one, two in combinations(range(len(known)), 2) if known[one] != known[two]]
    if not ordered:
        return float(len(set(ranks)) == 1)
    return sum((ranks[a] - ranks[b]) * (known[a] - known[b]) > 0 for a, b in ordered) / len(ordered)


def _in_words(judgement: Judgement) -> str:
    if not judgement.ranks:
        return "none acceptable"
    best = [text for text, rank in zip(judgement.item.responses, judgement.ranks, strict=True) if rank == 1]
    return f"best: {' = '.join(best)}"
