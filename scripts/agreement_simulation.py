"""Prints the figures of docs/agreement.md: `python scripts/agreement_simulation.py`, a minute on one core.

Judgings are made up with a known truth, so that it can be counted how often the intervals and the sequential test of
rlhf_core/agreement.py are right. Nothing is read or trained, and the seed is fixed.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from rlhf_core.agreement import BETS, STAKES, judged_so_far, krippendorff_alpha, log_e_values, mean_interval, wilson

Array = NDArray[np.float64]
RUNS = 2000
JUDGEMENTS = 300
LEVEL = 0.95
LOOKS = (100, 200, 300, 500, 1000)
LABELS = {"labels": 0.5, "one label": 0.8}  # how often the truth is the second
ALPHAS = {
    "labels": "3 people, two labels",
    "one label": "3 people, one label mostly",
    "compare": "3 people, pairs with ties",
    "rank": "2 people, rankings of four",
}


def wins(rng: np.random.Generator, rate: float, judgements: int, ties: float = 0.0) -> Array:
    """(RUNS, judgements) independent outcomes: a share of ties, and the rest won so often that the mean is `rate`."""
    won = (rng.random((RUNS, judgements)) < 0.5 + (rate - 0.5) / (1 - ties)).astype(np.float64)
    return np.where(rng.random(won.shape) < ties, 0.5, won)


def of_prompts(rng: np.random.Generator, judgements: int, each: int) -> Array:
    """(RUNS, judgements) outcomes of prompts that differ: half are won 9 times of 10, the others lost as often."""
    prompts = judgements // each
    rates = np.where(rng.random((RUNS, prompts)) < 0.5, 0.1, 0.9)
    return (rng.random((RUNS, prompts, each)) < rates[:, :, None]).astype(np.float64).reshape(RUNS, judgements)


def alarms(outcomes: Array) -> float:
    """Share of runs in which the sequential test says that ½ is wrong after any of the judgements."""
    return float((log_e_values(outcomes) >= np.log(1 / (1 - LEVEL))).any(axis=1).mean())


def peeking(outcomes: Array) -> float:
    """The same for Wilson's interval, looked at after each judgement from the 20th on as if it were the only look."""
    judged = np.arange(1, outcomes.shape[1] + 1)
    won = np.cumsum(outcomes, axis=1)
    z = 1.959964
    reach = z * np.sqrt(won * (judged - won) / judged + z * z / 4)
    outside = np.abs(won + z * z / 2 - 0.5 * (judged + z * z)) > reach
    return float(outside[:, 19:].any(axis=1).mean())


def false_alarms() -> list[tuple[str, float, float]]:
    """(what was judged, share of false alarms here, and with Wilson at each look) where the true rate is ½."""
    rng = np.random.default_rng(0)
    even, tied = wins(rng, 0.5, JUDGEMENTS), wins(rng, 0.5, JUDGEMENTS, ties=0.3)
    prompts = of_prompts(rng, JUDGEMENTS, 3)
    means = prompts.reshape(RUNS, JUDGEMENTS // 3, 3).mean(axis=2)
    return [
        ("300 prompts, judged once", alarms(even), peeking(even)),
        ("the same with 30 % ties", alarms(tied), peeking(tied)),
        ("100 prompts, 3 judgements each, averaged", alarms(means), peeking(means)),
        ("the same, not averaged: WRONG", alarms(prompts), peeking(prompts)),
    ]


@cache
def over(judged: int) -> NDArray[np.bool_]:
    """For each number of wins among so many judgements without ties: does the evidence against ½ reach 20?"""
    won = np.arange(judged + 1)
    likelihoods = np.outer(np.log(2 * BETS), won) + np.outer(np.log(2 - 2 * BETS), judged - won)
    return np.asarray(np.logaddexp.reduce(np.log(STAKES)[:, None] + likelihoods) >= np.log(1 / (1 - LEVEL)))


def exactly(rate: float, looks: int) -> Array:
    """(looks,) chance of having said by then that ½ is wrong, without ties; not simulated.

    The chance of each number of wins is carried on from judgement to judgement, for those courses that did not stop.
    """
    going = np.ones(1)
    stopped = np.empty(looks)
    for judged in range(1, looks + 1):
        going = (1 - rate) * np.append(going, 0) + rate * np.append(0, going)
        going = np.where(over(judged), 0, going)
        stopped[judged - 1] = 1 - going.sum()
    return stopped


def by_then(outcomes: Array) -> Array:
    """(looks,) share of runs that have said by then that ½ is wrong."""
    shown = log_e_values(outcomes) >= np.log(1 / (1 - LEVEL))
    return np.asarray(np.logical_or.accumulate(shown, axis=1).mean(axis=0))


def covered(rate: float) -> float:
    """Share of runs in which the interval held the true rate after every one of the judgements."""
    outcomes = wins(np.random.default_rng(2), rate, JUDGEMENTS, ties=0.1)
    return float((log_e_values(outcomes, mean=rate) < np.log(1 / (1 - LEVEL))).all(axis=1).mean())


def width(judged: int, share: float = 0.5) -> float:
    """Width of the sequential interval when that share was won."""
    won = round(judged * share)
    found = judged_so_far([1.0] * won + [0.0] * (judged - won)).win_rate
    return found.high - found.low


def wilson_covers() -> float:
    """Share of 2000 annotators whose side bias lies in its interval: 30 to 200 judgements, true share 0.3 to 0.8."""
    rng = np.random.default_rng(3)
    rates, judged = rng.uniform(0.3, 0.8, RUNS), rng.integers(30, 201, RUNS)
    found = [wilson(int(k), int(n), level=LEVEL) for k, n in zip(rng.binomial(judged, rates), judged, strict=True)]
    return float(np.mean([part.low <= rate <= part.high for part, rate in zip(found, rates, strict=True)]))


def win_rate_covers(ties: float, each: int, runs: int = RUNS) -> float:
    """Share of 2000 tests of two policies in which the win rate's interval held the truth: 30 to 200 prompts.

    Each prompt is judged `each` times; its own rate is a quarter above or below the mean, which is 0.3 to 0.7 before
    ties. Ties come to every judgement alike.
    """
    rng = np.random.default_rng([6, each, round(100 * ties)])
    hits = 0
    for _ in range(runs):
        prompts, mean = int(rng.integers(30, 201)), rng.uniform(0.3, 0.7)
        rates = mean + np.where(rng.random(prompts) < 0.5, 0.25, -0.25)
        won = (rng.random((prompts, each)) < rates[:, None]).astype(np.float64)
        won = np.where(rng.random(won.shape) < ties, 0.5, won)
        found = mean_interval(won.mean(axis=1), level=LEVEL)
        hits += found.low <= ties / 2 + (1 - ties) * mean <= found.high
    return hits / runs


def rated(rng: np.random.Generator, kind: str, items: int) -> Array:
    """(A, I) ratings of made-up people, or (A, 4 I) of rankings of four: what page Results asks α of.

    labels, one label: 3 people, each right 8 times of 10, one judgement of 5 missing; both labels are as frequent, or
    one is 4 times of 5. compare, rank: 3 and 2 people who see how good responses are with an error as large as what is
    to be seen; a small difference is a tie when they compare.
    """
    if kind in LABELS:
        truth = (rng.random(items) < LABELS[kind]).astype(int)
        ratings = np.where(rng.random((3, items)) < 0.8, truth, 1 - truth).astype(np.float64)
        ratings[rng.random((3, items)) < 0.2] = np.nan
        return ratings
    if kind == "compare":
        seen = rng.normal(size=items) + rng.normal(size=(3, items))
        return np.asarray(np.sign(seen) * (np.abs(seen) > 0.4))
    seen = rng.normal(size=(items, 4)) + rng.normal(size=(2, items, 4))
    return np.asarray((seen[..., :, None] <= seen[..., None, :]).sum(axis=-1), dtype=np.float64).reshape(2, -1)


@cache
def true_alpha(kind: str) -> float:
    """α of endless items. Of labels it is exact: D_o = 2·0.8·0.2 = 0.32, D_e = 2p(1 − p), p the share of one label."""
    if kind in LABELS:
        share = 0.2 + 0.6 * LABELS[kind]
        return 1 - 0.32 / (2 * share * (1 - share))
    many = rated(np.random.default_rng(7), kind, 100_000)
    return krippendorff_alpha(many, metric="ordinal", samples=1).mean


def alpha_covers(kind: str, items: int, runs: int = RUNS) -> float:
    """Share of runs in which α's interval holds α of endless items."""
    rng = np.random.default_rng([4, items])
    clusters = np.repeat(np.arange(items), 4 if kind == "rank" else 1).tolist()
    hits = 0
    for run in range(runs):
        found = krippendorff_alpha(
            rated(rng, kind, items), metric="nominal" if kind in LABELS else "ordinal", clusters=clusters,
            samples=400, seed=run, level=LEVEL,
        )  # fmt: skip
        hits += found.low <= true_alpha(kind) <= found.high
    return hits / runs


def percent(share: float) -> str:
    return f"{100 * share:6.1f} %"


def halves(said: Array) -> list[str]:
    """The number of judgements by which 50 % and 80 % have said so; a dash where it is more than were made."""
    return [str(1 + int(np.argmax(said >= share))) if said[-1] >= share else "-" for share in (0.5, 0.8)]


def lines_of(title: str, rows: list[str]) -> list[str]:
    return [title, *(f"  {row}" for row in rows), ""]


def report() -> str:
    """The text of docs/agreement.md's block."""
    lines = lines_of(
        f"False alarms among {RUNS} judgings of two equal policies, a look after every judgement: here | Wilson",
        [f"{name:<42}{percent(here)} | {percent(naive)}" for name, here, naive in false_alarms()],
    )
    even = exactly(0.5, 1000)
    lines += lines_of(
        "The same without ties, computed and not simulated",
        [f"{f'by {looks} judgements':<42}{percent(even[looks - 1])}" for looks in (100, 300, 1000)],
    )
    rates = [(f"{100 * rate:.0f} %", exactly(rate, 1000)) for rate in (0.55, 0.6, 0.65, 0.7)]
    rates.append(("60 %, 30 % being ties", by_then(wins(np.random.default_rng(1), 0.6, 1000, ties=0.3))))
    lines += lines_of(
        "Said that 50 % is wrong by 100, 200, 300, 500, 1000 judgements at a true rate of | half, 80 % by",
        [
            f"{name:<24}{''.join(percent(said[n - 1]) for n in LOOKS)} | {', '.join(halves(said))}"
            for name, said in rates
        ],
    )
    lines += lines_of(
        f"Interval held the truth after every one of {JUDGEMENTS} judgements, 10 % of them ties",
        [f"{f'{100 * rate:.0f} %':<16}{percent(covered(rate))}" for rate in (0.5, 0.6, 0.8)],
    )
    lines += lines_of(
        "Width of the interval after so many judgements, half of them won",
        [f"{judged:<16}{width(judged):.3f}" for judged in (50, 100, 200, 400, 1000, 2000)],
    )
    lines += lines_of(
        "Other 95 % intervals held the truth",
        [
            f"{'win rate':<32}{percent(win_rate_covers(0.0, 1))}",
            f"{'win rate, 30 % ties':<32}{percent(win_rate_covers(0.3, 1))}",
            f"{'win rate, 3 judgements each':<32}{percent(win_rate_covers(0.0, 3))}",
            f"{'the same, 30 % ties':<32}{percent(win_rate_covers(0.3, 3))}",
            f"{'side and length bias (Wilson)':<32}{percent(wilson_covers())}",
        ],
    )
    lines += lines_of(
        "Alpha's 95 % interval held the truth with 10, 20, 30, 50, 100 items of | alpha",
        [
            f"{name:<32}{''.join(percent(alpha_covers(kind, items)) for items in (10, 20, 30, 50, 100))}"
            f" | {true_alpha(kind):.2f}"
            for kind, name in ALPHAS.items()
        ],
    )
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
