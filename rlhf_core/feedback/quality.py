"""How good a judge is, measured on pairs whose answer is known, before anything is learned from it."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from rlhf_core.errors import DataError
from rlhf_core.feedback.annotators import Annotator, Item, rule
from rlhf_core.feedback.pairs import Opinion, PairwiseJudge, Verdict
from rlhf_core.records import Ranking
from rlhf_core.statistics import Array, Interval, cluster_bootstrap

BOOTSTRAP_SAMPLES = 2000
REPEATED_PAIRS = 20  # judged a second time


class KnownPair(NamedTuple):
    """Two responses, and which of them is known to be better."""

    item: Item  # two responses
    first_is_better: bool


class Quality(NamedTuple):
    """What was found of a judge. Intervals are 95 %, all pairs of a prompt drawn together.

    What speaks of orders is None for a judge that gives each response a score of its own.
    """

    pairs: int
    prompts: int
    agreement: Interval  # with the known answers; a tie counts half
    decided: float  # share of pairs that did not end in a tie
    agreement_decided: Interval  # on those alone
    disagreements: float | None  # share of pairs on which the two orders contradict each other
    first_chosen: Interval | None  # share of single looks that chose what stood first, ties left out; ½ is fair
    averaged: Interval | None  # the agreement if both orders' probabilities were averaged, not tied where they differ
    unanswered: float  # share of pairs without a valid answer in both orders
    longer_chosen: Interval  # share of decided pairs in which the longer one won
    longer_better: float  # share of all pairs in which the longer one is known to be better, equal ones half
    self_agreement: float  # share of the first pairs on which a second asking gives the same
    longest: Interval  # agreement of the rule "the longest wins"
    lead: Interval  # agreement minus that of the longest
    coin: Interval  # agreement of a coin


def known_pairs(rankings: Sequence[Ranking], *, pairs: int, seed: int) -> list[KnownPair]:
    """Pairs of the rankings that are no ties: one of each prompt, then a second of each, until there are enough.

    Which pair of a prompt, which prompts, and which of two stands first are drawn, since data often comes sorted.
    """
    rng = np.random.default_rng(seed)
    by_ranking = []
    for ranking in rankings:
        found = []
        for i, j in combinations(range(len(ranking.responses)), 2):
            if ranking.ranks[i] != ranking.ranks[j]:
                first, second = (i, j) if rng.random() < 0.5 else (j, i)
                item = Item(ranking.prompt, (ranking.responses[first], ranking.responses[second]))
                found.append(KnownPair(item, ranking.ranks[first] < ranking.ranks[second]))
        by_ranking.append([found[place] for place in rng.permutation(len(found))])
    by_ranking = [by_ranking[place] for place in rng.permutation(len(by_ranking))]
    rounds = max(map(len, by_ranking), default=0)
    drawn = [of_one[turn] for turn in range(rounds) for of_one in by_ranking if turn < len(of_one)]
    return drawn[:pairs]


def check_judge(judge: Annotator, rankings: Sequence[Ranking], *, pairs: int, seed: int = 0) -> Quality:
    """Let a judge judge known pairs, and measure it.

    Args:
        rankings: with ranks that are taken to be right.
        pairs: how many pairs at most.
        seed: draws the pairs, the coin and the bootstrap.

    Raises:
        DataError: no ranking prefers anything.
        RLHFError: what the judge raises where it has to stop.
    """
    known = known_pairs(rankings, pairs=pairs, seed=seed)
    if not known:
        raise DataError(f"Found {len(rankings)} rankings with nothing but ties; expected some that prefer a response.")
    items, prompts = [pair.item for pair in known], [pair.item.prompt for pair in known]
    truth = np.array([float(pair.first_is_better) for pair in known])

    outcomes, verdicts = _judged(judge, items, turn=0)
    again, _ = _judged(judge, items[:REPEATED_PAIRS], turn=1)
    agreement = _agreement(outcomes, truth)
    longest = _agreement(_judged(rule("longest"), items)[0], truth)
    coin = _agreement(_judged(rule("random", seed=seed), items)[0], truth)
    decided = outcomes != 0.5
    longer = np.sign([len(item.responses[0]) - len(item.responses[1]) for item in items])
    looks = np.array([[_choice(verdict.forward), _choice(verdict.backward)] for verdict in verdicts])
    return Quality(
        pairs=len(known),
        prompts=len(set(prompts)),
        agreement=_interval(agreement, prompts, seed),
        decided=float(decided.mean()),
        agreement_decided=_interval(np.where(decided, agreement, np.nan), prompts, seed),
        disagreements=float(np.mean([verdict.disagrees for verdict in verdicts])) if verdicts else None,
        first_chosen=_interval(looks.T.ravel(), prompts * 2, seed) if verdicts else None,
        averaged=_interval(_agreement(_averaged(verdicts), truth), prompts, seed) if verdicts else None,
        unanswered=float(np.mean([None in verdict for verdict in verdicts])) if verdicts else 0.0,
        longer_chosen=_interval(np.where(decided & (longer != 0), outcomes == (longer + 1) / 2, np.nan), prompts, seed),
        longer_better=float(np.mean(((2 * truth - 1) * longer + 1) / 2)),
        self_agreement=float(np.mean(again == outcomes[: len(again)])),
        longest=_interval(longest, prompts, seed),
        lead=_interval(agreement - longest, prompts, seed),
        coin=_interval(coin, prompts, seed),
    )


def _judged(judge: Annotator, items: Sequence[Item], *, turn: int = 0) -> tuple[Array, list[Verdict]]:
    """(N,) 1 where the first response won, 0 where the second did, ½ for a tie; and both looks where there are two."""
    if isinstance(judge, PairwiseJudge):
        verdicts = [of_item[0] for of_item in judge.verdicts(items, turn=turn)]
        return np.array([verdict.outcome for verdict in verdicts]), verdicts
    ranks = np.array([judgement.ranks for judgement in judge.judge(items)])
    return (np.sign(ranks[:, 1] - ranks[:, 0]) + 1) / 2, []


def _agreement(outcomes: Array, truth: Array) -> Array:
    """1 right, ½ tie, 0 wrong."""
    return 1 - np.abs(outcomes - truth)


def _choice(opinion: Opinion | None) -> float:
    """1 where the one shown first was chosen, 0 where the second was, NaN else."""
    return opinion.choice if opinion is not None and opinion.choice != 0.5 else np.nan


def _averaged(verdicts: Sequence[Verdict]) -> Array:
    return (np.sign([verdict.probability - 0.5 for verdict in verdicts]) + 1) / 2


def _interval(values: Array, prompts: Sequence[Hashable], seed: int) -> Interval:
    """Mean of what is no NaN, with its interval over prompts; NaN between 0 and 1 where nothing is left."""
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(values.tolist(), prompts, strict=True):
        if not np.isnan(value):
            groups.setdefault(prompt, []).append(value)
    if not groups:
        return Interval(float("nan"), 0.0, 1.0)
    return cluster_bootstrap(list(groups.values()), samples=BOOTSTRAP_SAMPLES, seed=seed)
