"""What the judgements say: win rates, when there are enough, how far people agree, and how each of them judges."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from math import isfinite, nan
from statistics import median
from typing import Any, NamedTuple, get_args

from sqlalchemy import func, select
from sqlalchemy.orm import Session, joinedload

from rlhf_core.feedback.gold import ANSWERS, accuracy
from rlhf_core.feedback.judging import LIVE, Kind
from rlhf_core.feedback.store import Item, Judgement
from rlhf_core.statistics import Interval

WIDTH = 0.15  # of the sequential interval at which there is enough though no side is ahead; some 450 prompts
PAIRS_SHOWN = 30  # of annotators, those that agree least; the page folds the others away
ALPHA_ITEMS = 50  # judged by two people or more; with fewer, α's interval holds the truth too seldom to be shown
Rated = tuple[Hashable, Hashable, float]  # annotator, what was rated, rating


class Rate(NamedTuple):
    """A win rate with its 95 % interval, and what it was counted from. Ties and "both bad" are half a win each.

    `equal` is the rate that a logistic model predicts for answers of as many characters, each judgement counting once.
    """

    who: str  # an annotator, a kind of prompt, or "all"
    rate: float
    low: float
    high: float
    equal: float
    wins: int
    ties: int
    both_bad: int
    losses: int
    prompts: int


class Enough(NamedTuple):
    """What the sequential test says; it holds however often one looks."""

    prompts: int  # judged by as many people as they want
    low: float
    high: float
    enough: bool


class Comparison(NamedTuple):
    """One source against another: by all, then by each annotator; and by each kind of prompt."""

    first: str
    second: str
    rates: list[Rate]
    by_kind: list[Rate]
    so_far: Enough


class Agreed(NamedTuple):
    """How far two people agree on what both judged."""

    first: str
    second: str
    judged: int  # comparisons, or pairs of responses of rankings
    share: float
    kappa: float | None


class Agreement(NamedTuple):
    """How far people agree on a kind of item; no α where nothing was judged twice, or all said the same.

    α's interval is NaN with fewer than `ALPHA_ITEMS` items.
    """

    alpha: Interval | None
    pairs: list[Agreed]
    folded: list[Agreed]  # those that agree more than the first ones


class Habit(NamedTuple):
    """How one person judges a kind of item. Shares have an interval; None where there was nothing to choose."""

    who: str
    judged: int
    none: int
    skipped: int
    seconds: float | None  # median of what was not skipped
    left: Interval | None  # of the first and the last response on the page, the first was better
    longer: Interval | None  # of the longest and the shortest response, the longest was better
    gold: Interval | None  # agreement with known answers
    golds: int


class Results(NamedTuple):
    """All of it."""

    comparisons: list[Comparison]
    agreement: dict[Kind, Agreement]
    habits: dict[Kind, list[Habit]]


def mark(session: Session) -> tuple[Any, ...]:
    """Something that changes whenever a judgement is made or undone, or an answer becomes known."""
    judged = select(func.count(Judgement.id), func.count(Judgement.withdrawn_at))
    items = select(func.count(Item.id), func.sum(Item.overlap))
    known = select(Item.id, Item.gold, Item.gold_from).where(Item.gold.is_not(None)).order_by(Item.id)
    return (*session.execute(judged).one(), *session.execute(items).one(), session.execute(known).tuples().all())


def find(session: Session) -> Results:
    """Everything that the results page shows."""
    judged: dict[Kind, Sequence[Judgement]] = {kind: _judgements(session, kind) for kind in get_args(Kind)}
    return Results(
        _comparisons(judged["compare"], _wanted(session)),
        {kind: _agreement(part, kind) for kind, part in judged.items() if kind != "write"},
        {kind: _habits(part) for kind, part in judged.items()},
    )


# ---- who wins


def _comparisons(judged: Sequence[Judgement], wanted: Counter[tuple[str, str]]) -> list[Comparison]:
    """Win rates of each pair of sources, the pair in the order in which it was imported.

    Two answers of one name, such as those of rows that do not tell who wrote them, say nothing of sources.
    """
    by_pair: dict[tuple[str, str], list[Judgement]] = {}
    for judgement in judged:
        if judgement.verdict in ANSWERS:
            first, second = judgement.item.sources
            if first == second:
                continue
            pair = (second, first) if (second, first) in by_pair else (first, second)
            by_pair.setdefault(pair, []).append(judgement)
    return [
        Comparison(
            *pair,
            rates=[
                _rate("all", of_pair, pair),
                *(_rate(who, part, pair) for who, part in _parts(of_pair, lambda one: one.annotator.name)),
            ],
            by_kind=[_rate(kind, part, pair) for kind, part in _parts(of_pair, lambda one: one.item.category)],
            so_far=_so_far(of_pair, pair, wanted),
        )
        for pair, of_pair in by_pair.items()
    ]


def _rate(who: str, judged: Sequence[Judgement], pair: tuple[str, str]) -> Rate:
    from rlhf_core.agreement import mean_interval  # it brings scipy, which takes a second
    from rlhf_core.statistics import length_controlled_win_rate

    outcomes = [_outcome(judgement, pair[0]) for judgement in judged]
    # Several people on one prompt, or several answers to it, are not independent: the interval counts prompts.
    by_prompt: dict[str, list[float]] = {}
    for judgement, outcome in zip(judged, outcomes, strict=True):
        by_prompt.setdefault(str(judgement.item.prompt), []).append(outcome)
    means = [sum(part) / len(part) for part in by_prompt.values()]
    bad = sum(judgement.verdict == "none" for judgement in judged)
    prompts = [str(judgement.item.prompt) for judgement in judged]
    # No interval: this is made anew while people judge, and it refits hundreds of times.
    equal = length_controlled_win_rate(outcomes, [_longer(one, pair[0]) for one in judged], prompts, samples=0).mean
    return Rate(
        who, *mean_interval(means), equal=equal, wins=outcomes.count(1.0), ties=outcomes.count(0.5) - bad, both_bad=bad,
        losses=outcomes.count(0.0), prompts=len(means),
    )  # fmt: skip


def _so_far(judged: Sequence[Judgement], pair: tuple[str, str], wanted: Counter[tuple[str, str]]) -> Enough:
    """The sequential test over prompts in the order in which they were completed."""
    from rlhf_core.agreement import completed_prompts, judged_so_far

    in_time = sorted(judged, key=lambda one: one.id)
    prompts = [str(judgement.item.prompt) for judgement in in_time]
    # Items of a round that is over want nobody any more: they got what they got, whatever was said of them.
    closed = Counter(str(one.item.prompt) for one in in_time if not one.item.overlap)
    each: dict[Hashable, int] = {prompt: wanted[_pair_name(pair), prompt] + closed[prompt] for prompt in prompts}
    means = completed_prompts([_outcome(one, pair[0]) for one in in_time], prompts, judgements=each)
    verdict = judged_so_far(means, width=WIDTH)
    return Enough(verdict.judged, verdict.win_rate.low, verdict.win_rate.high, verdict.enough)


def _wanted(session: Session) -> Counter[tuple[str, str]]:
    """How many judgements each prompt is to get, by pair of sources: known before any of them was made."""
    wanted: Counter[tuple[str, str]] = Counter()
    for sources, prompt, overlap in session.execute(
        select(Item.sources, Item.prompt, Item.overlap).where(Item.kind == "compare")
    ):
        wanted[_pair_name(sources), str(prompt)] += overlap
    return wanted


def _pair_name(sources: Iterable[str]) -> str:
    return str(sorted(sources))


def _outcome(judgement: Judgement, first: str) -> float:
    """1 if the first source won, ½ for a tie or none acceptable, 0 if it lost."""
    if not judgement.ranks or judgement.ranks[0] == judgement.ranks[1]:
        return 0.5
    winner = judgement.item.sources[0 if judgement.ranks[0] < judgement.ranks[1] else 1]
    return float(winner == first)


def _longer(judgement: Judgement, first: str) -> float:
    """Characters of the first source's answer less those of the other."""
    ours, theirs = map(len, judgement.item.responses)
    return float(ours - theirs if judgement.item.sources[0] == first else theirs - ours)


# ---- how far people agree


def _agreement(judged: Sequence[Judgement], kind: Kind) -> Agreement:
    """Krippendorff's α, ordinal, and how each two people agree, those that agree least first.

    Of a comparison, and of each pair of responses of a ranking, is asked which is better: the first of the item, the
    second, or neither. α of rankings is that of the responses' ranks, and its interval draws whole items.
    """
    from rlhf_core.agreement import krippendorff_alpha, pairwise_agreement, table

    judged = [one for one in judged if one.ranks or (one.verdict == "none" and kind == "compare")]
    ratings: list[Rated] = []
    choices: list[Rated] = []
    for one in judged:
        ranks = one.ranks or [1, 1]
        ratings += [(one.annotator.name, (one.item_id, place), rank) for place, rank in enumerate(ranks)]
        choices += [
            (one.annotator.name, (one.item_id, a, b), (ranks[a] > ranks[b]) - (ranks[a] < ranks[b]))
            for a, b in combinations(range(len(ranks)), 2)
        ]
    if not judged:
        return Agreement(None, [], [])
    by_choice = table(choices)
    rated = table(ratings) if kind == "rank" else by_choice
    twice = sum(number > 1 for number in Counter(one.item_id for one in judged).values())
    alpha = None
    if twice:
        clusters = [str(what).partition(",")[0] for what in rated.items]  # the item that a response belongs to
        alpha = krippendorff_alpha(rated.ratings_AI, metric="ordinal", clusters=clusters)
        if twice < ALPHA_ITEMS:
            alpha = Interval(alpha.mean, nan, nan)
    pairs = [
        Agreed(str(by_choice.annotators[a]), str(by_choice.annotators[b]), n, share, kappa if isfinite(kappa) else None)
        for a, b, n, share, kappa in pairwise_agreement(by_choice.ratings_AI)
    ]
    pairs.sort(key=lambda pair: (pair.share, pair.first, pair.second))
    return Agreement(alpha if alpha and isfinite(alpha.mean) else None, pairs[:PAIRS_SHOWN], pairs[PAIRS_SHOWN:])


# ---- how each person judges


def _habits(judged: Sequence[Judgement]) -> list[Habit]:
    """All people together, then one by one."""
    if not judged:
        return []
    return [_habit("all", judged), *(_habit(who, part) for who, part in _parts(judged, lambda one: one.annotator.name))]


def _habit(who: str, judged: Sequence[Judgement]) -> Habit:
    kept = [judgement for judgement in judged if judgement.verdict != "skipped"]
    known = [one for one in kept if one.item.gold is not None and one.item.gold_from != one.id]
    ranked = [one for one in kept if one.ranks]
    return Habit(
        who,
        judged=len(kept),
        none=sum(judgement.verdict == "none" for judgement in kept),
        skipped=len(judged) - len(kept),
        seconds=median(one.seconds for one in kept) if kept else None,
        left=_share([_better(one, one.presented[0], one.presented[-1]) for one in ranked]),
        longer=_share([_better(one, *_longest_and_shortest(one.item.responses)) for one in ranked]),
        gold=_share([accuracy(one.ranks, one.item.gold or []) for one in known]),
        golds=len(known),
    )


def _better(judgement: Judgement, one: int, other: int) -> float | None:
    """1 if the one response was ranked above the other, 0 if below, None for a tie or if they are the same."""
    ranks = judgement.ranks or []
    return None if ranks[one] == ranks[other] else float(ranks[one] < ranks[other])


def _longest_and_shortest(responses: Sequence[str]) -> tuple[int, int]:
    """Their indexes; one and the same where all are as long."""
    lengths = [len(text) for text in responses]
    return lengths.index(max(lengths)), lengths.index(min(lengths))


def _share(values: Iterable[float | None]) -> Interval | None:
    """One value a judgement, so that they are independent, and Wilson's interval holds."""
    from rlhf_core.agreement import wilson

    told = [value for value in values if value is not None]
    return wilson(sum(told), len(told)) if told else None


def _parts(judged: Sequence[Judgement], name: Callable[[Judgement], str]) -> list[tuple[str, list[Judgement]]]:
    parts: dict[str, list[Judgement]] = {}
    for judgement in judged:
        parts.setdefault(name(judgement), []).append(judgement)
    return sorted(parts.items())


def _judgements(session: Session, kind: Kind) -> Sequence[Judgement]:
    query = select(Judgement).join(Item).where(Item.kind == kind, LIVE).order_by(Judgement.item_id, Judgement.id)
    return session.scalars(query.options(joinedload(Judgement.item), joinedload(Judgement.annotator))).all()
