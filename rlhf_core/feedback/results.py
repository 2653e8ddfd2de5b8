"""What the judgements say: win rates with intervals, and how people judged."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session, joinedload

from rlhf_core.feedback.judging import LIVE, Kind
from rlhf_core.feedback.store import Item, Judgement


class Rate(NamedTuple):
    """A win rate with its 95 % interval, and what it was counted from. Ties and "both bad" are half a win each."""

    who: str  # an annotator, or "all"
    rate: float
    low: float
    high: float
    wins: int
    ties: int
    both_bad: int
    losses: int
    prompts: int


class Comparison(NamedTuple):
    """One source against another: by all, then by each annotator."""

    first: str
    second: str
    rates: list[Rate]


class Habit(NamedTuple):
    """How one person judges a kind of item."""

    who: str
    judged: int
    none: int
    skipped: int
    seconds: float | None  # mean of what was not skipped
    left: float | None  # share of decided comparisons that the left side won


def comparisons(session: Session) -> list[Comparison]:
    """Win rates of each pair of sources, the pair in the order in which it was imported."""
    by_pair: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in _judgements(session, "compare"):
        if judgement.verdict != "skipped":
            first, second = judgement.item.sources
            pair = (second, first) if (second, first) in by_pair else (first, second)
            by_pair.setdefault(pair, []).append(judgement)
    found = []
    for pair, judged in by_pair.items():
        rates = [_rate("all", judged, pair)]
        rates += [_rate(who, part, pair) for who, part in _by_annotator(judged).items()]
        found.append(Comparison(*pair, rates))
    return found


def habits(session: Session, kind: Kind) -> list[Habit]:
    """All people together, then one by one."""
    judged = _judgements(session, kind)
    if not judged:
        return []
    return [_habit("all", judged), *(_habit(who, part) for who, part in _by_annotator(judged).items())]


def _rate(who: str, judged: Sequence[Judgement], pair: tuple[str, str]) -> Rate:
    outcomes = [_outcome(judgement, pair[0]) for judgement in judged]
    # Several people on one prompt, or several answers to it, are not independent: the interval counts prompts.
    by_prompt: dict[str, list[float]] = {}
    for judgement, outcome in zip(judged, outcomes, strict=True):
        by_prompt.setdefault(str(judgement.item.prompt), []).append(outcome)
    means = [sum(part) / len(part) for part in by_prompt.values()]
    mean = sum(means) / len(means)
    bad = sum(judgement.verdict == "none" for judgement in judged)
    from rlhf_core.agreement import wilson  # it brings scikit-learn, which takes a second or two

    _, low, high = wilson(sum(means), len(means))
    return Rate(
        who, mean, low, high, wins=outcomes.count(1.0), ties=outcomes.count(0.5) - bad, both_bad=bad,
        losses=outcomes.count(0.0), prompts=len(means),
    )  # fmt: skip


def _outcome(judgement: Judgement, first: str) -> float:
    """1 if the first source won, ½ for a tie or none acceptable, 0 if it lost."""
    if not judgement.ranks or judgement.ranks[0] == judgement.ranks[1]:
        return 0.5
    winner = judgement.item.sources[0 if judgement.ranks[0] < judgement.ranks[1] else 1]
    return float(winner == first)


def _habit(who: str, judged: Sequence[Judgement]) -> Habit:
    kept = [judgement for judgement in judged if judgement.verdict != "skipped"]
    pairs = [judgement for judgement in kept if judgement.ranks and len(judgement.ranks) == 2]
    decided = [judgement for judgement in pairs if judgement.ranks and judgement.ranks[0] != judgement.ranks[1]]
    return Habit(
        who,
        judged=len(kept),
        none=sum(judgement.verdict == "none" for judgement in kept),
        skipped=len(judged) - len(kept),
        seconds=_mean(kept, lambda judgement: judgement.seconds),
        left=_mean(decided, lambda judgement: judgement.ranks[judgement.presented[0]] == 1),  # type: ignore[index]
    )


def _mean(judged: Sequence[Judgement], value: Callable[[Judgement], float]) -> float | None:
    return sum(map(value, judged)) / len(judged) if judged else None


def _by_annotator(judged: Sequence[Judgement]) -> dict[str, list[Judgement]]:
    parts: dict[str, list[Judgement]] = {}
    for judgement in sorted(judged, key=lambda judgement: judgement.annotator.name):
        parts.setdefault(judgement.annotator.name, []).append(judgement)
    return parts


def _judgements(session: Session, kind: Kind) -> Sequence[Judgement]:
    query = select(Judgement).join(Item).where(Item.kind == kind, LIVE).order_by(Judgement.item_id, Judgement.id)
    return session.scalars(query.options(joinedload(Judgement.item), joinedload(Judgement.annotator))).all()
