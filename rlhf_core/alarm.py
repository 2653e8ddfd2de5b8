"""An alarm for reward hacking: the reward that PPO climbs goes up while what it stands for goes down.

A pure rule over the metrics of past updates, so that the loop, the report and the flow say the same of the same run,
and a run that was stopped goes on with the same alarms. How the metrics come about is in watch.py, and what the loop
does about an alarm in ppo.py. Why the rule is as it is: docs/reward-hacking.md.
"""

from collections.abc import Hashable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PROXY, GOLD, REPETITION = "ppo/score", "ppo/gold_score", "ppo/repetition"
FALL_LEVEL = 0.001  # of a sign's trend test; docs/reward-hacking.md tells the false alarms a run that follow from it
RISE_LEVEL = 0.01  # of the reward's; it is what has to be so for a sign to matter, and no sign itself
LEAST_LOSS = 0.1  # of gold's gain, that the window has to have lost
LOWERED = 0.25  # by this each alarm multiplies the learning rates with ppo.on_alarm lower_rate
NGRAM = 3


class Sign(NamedTuple):
    """Something beside the reward that may get worse, and by how much it has to have."""

    metric: str
    words: str
    share: float  # of its level at the start
    amount: float  # or in its own unit


# All are worse when higher. By how much is a rule of thumb: a trend alone may be sure and still be harmless.
OTHERS = (
    Sign("ppo/score_spread", "members of the reward model disagree more", 0.25, 0.0),
    Sign("ppo/response_length", "responses are longer", 0.25, 0.0),
    Sign(REPETITION, "responses repeat themselves", 0.0, 0.05),
    Sign("ppo/perplexity", "responses are unlike SFT's", 0.25, 0.0),
)


class Change(NamedTuple):
    """How a quantity went over the window: robust levels at its ends, and its level in the first window."""

    metric: str
    words: str
    start: float
    before: float
    after: float


class Alarm(NamedTuple):
    """When it was raised, counted from 1, the first update of its window, and what had changed."""

    update: int
    since: int
    changes: tuple[Change, ...]  # the reward, then what got worse

    def text(self) -> str:
        """One line."""
        reward, *worse = self.changes
        told = "; ".join(f"{found.words} ({found.before:.3g} → {found.after:.3g})" for found in worse)
        return (
            f"update {self.update}: the reward rose from {reward.start:.3g} to {reward.after:.3g}, and since update "
            f"{self.since} {told}"
        )


def find_alarms(history: Sequence[Mapping[str, Any]], window: int) -> list[Alarm]:
    """All alarms over a run, in order; after one the rule looks at later updates only, but for the start of the run.

    Args:
        history: the metrics of each update from the first on; numbers, or strings that are numbers. Those that were not
            watched have no "ppo/repetition".
        window: how many watched updates are looked at together.
    """
    found: list[Alarm] = []
    for end in range(1, len(history) + 1):
        alarm = alarm_now(history[:end], window, last=found[-1].update if found else 0)
        found += [] if alarm is None else [alarm]
    return found


def alarm_now(history: Sequence[Mapping[str, Any]], window: int, *, last: int) -> Alarm | None:
    """The alarm that the last update of a history raises, if any: what a loop asks after each, and no more.

    Args:
        last: the update of the alarm before; 0 for none.
    """
    watched = [(update, row) for update, row in enumerate(history, start=1) if row.get(REPETITION) not in (None, "")]
    fresh = sum(update > last for update, _ in watched)  # those that no alarm has looked at
    if fresh < window or watched[-1][0] != len(history):
        return None
    return _judge(watched[:window], watched[:-window], watched[-window:])


Rows = Sequence[tuple[int, Mapping[str, Any]]]


def _judge(first: Rows, before: Rows, last: Rows) -> Alarm | None:
    """The rule, for one window: the reward is up, and gold or two of the others are worse."""
    proxy = _values(last, PROXY)
    # Above where it began, at least as far as it is known, and not on its way down: it may have come to its top.
    since_start = [*_values(before[: len(last)], PROXY), *proxy]
    if trend_level(since_start) > RISE_LEVEL or trend_level(proxy, down=True) <= RISE_LEVEL:
        return None
    worse = []
    gold = _values(last, GOLD)
    if gold and trend_level(gold, down=True) <= FALL_LEVEL:
        change = _change(GOLD, "the gold score falls", first, last)
        all_gold, size = [*_values(before, GOLD), *gold], len(last)
        tops = [median(all_gold[end - size : end]) for end in range(size, len(all_gold) + 1)]
        gain = max(tops) - min(tops[0], change.start)
        if change.before - change.after >= LEAST_LOSS * gain:
            worse.append(change)
    others = []
    for sign in OTHERS:
        values = _values(last, sign.metric)
        if values and trend_level(values) <= FALL_LEVEL:
            change = _change(sign.metric, sign.words, first, last)
            if change.after - change.start >= sign.share * abs(change.start) + sign.amount:
                others.append(change)
    if not worse and len(others) < 2:
        return None
    reward = _change(PROXY, "the reward rises", first, last)
    return Alarm(last[-1][0], last[0][0], (reward, *worse, *others))


def _values(rows: Rows, metric: str) -> list[float]:
    """Its values, or none where it was not measured in each row."""
    found = [row.get(metric, "") for _, row in rows]
    return [] if "" in found or None in found else [float(value) for value in found]


def _change(metric: str, words: str, first: Rows, last: Rows) -> Change:
    values = _values(last, metric)
    half = len(values) // 2
    start = median(_values(first, metric)[:half])
    slope, middle = _slope(values), median(values)
    reach = slope * (len(values) - 1) / 2
    return Change(metric, words, start, middle - reach, middle + reach)


def _slope(values: Sequence[float]) -> float:
    """The median of the slopes between all pairs, a step (Theil 1950; Sen 1968)."""
    first, second = np.triu_indices(len(values), 1)
    at = np.asarray(values)
    return float(np.median((at[second] - at[first]) / (second - first)))


def trend_level(values: Sequence[float], *, down: bool = False) -> float:
    """How likely a trend at least as clear would be in values whose order means nothing: Mann and Kendall's test.

        S = Σ_{i<j} sign(x_j − x_i)        level = P(S' ≥ S) over all orders of as many distinct values

    One-sided, exact, whatever the values' distribution; equal values count 0, which only makes the test more cautious.
    Mann 1945, https://doi.org/10.2307/1907187; Kendall 1975.

    Args:
        values: in order of time.
        down: test for a fall rather than a rise.
    """
    at = np.asarray(values, dtype=np.float64)
    rises_NN, falls_NN = at[None, :] > at[:, None], at[None, :] < at[:, None]
    score = int(np.triu(rises_NN).sum()) - int(np.triu(falls_NN).sum())
    pairs = len(values) * (len(values) - 1) // 2
    # S = pairs − 2 · inversions
    most = (pairs - (-score if down else score)) // 2
    return float(_inversions(len(values))[most])


# By size: with a window of 200, PPO asks for every size from there to 400.
_SHARES: list[NDArray[np.float64]] = [np.ones(1), np.ones(1)]


def _inversions(size: int) -> NDArray[np.float64]:
    """The share of all orders of so many things that have at most 0, 1, 2 … pairs the wrong way round."""
    while len(_SHARES) <= size:
        more, before = len(_SHARES), _SHARES[-1]
        # One thing more stands behind any number of the others, all equally likely: the mean of as many shares.
        sums = np.cumsum(np.concatenate([np.zeros(more), before, np.ones(more - 1)]))
        _SHARES.append((sums[more:] - sums[:-more]) / more)
    return _SHARES[size]


def repetition(tokens: Sequence[Hashable], n: int = NGRAM) -> float:
    """Share of a response's n-grams that stood in it before: 1 − distinct n-grams / n-grams; 0 where it has none.

    seq-rep-n of Welleck et al. 2020, https://arxiv.org/abs/1908.04319, section 3; they take n = 4, of longer texts.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
