"""Each figure by hand, against a slow version, at its limits, and in simulation where it makes a promise."""

import itertools
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from rlhf_core.agreement import (
    BETS,
    STAKES,
    Bias,
    Pair,
    completed_prompts,
    judged_so_far,
    krippendorff_alpha,
    length_bias,
    log_e_values,
    mean_interval,
    pairwise_agreement,
    side_bias,
    table,
    wilson,
)

PROJECT = Path(__file__).resolve().parents[1]
NONE = float("nan")
# Krippendorff 2011, section C: four observers, twelve units, a dot where there is no value.
OBSERVERS = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]
EXAMPLE = np.array([[NONE if value == "." else float(value) for value in row.split()] for row in OBSERVERS])
METRICS = ("nominal", "ordinal", "interval")


def alpha(ratings: Any, metric: Any = "nominal") -> float:
    return krippendorff_alpha(ratings, metric=metric, samples=1).mean


def made_up(rng: np.random.Generator, annotators: int = 4, items: int = 25) -> np.ndarray:
    """Ratings 1 to 5 around a true value, a fifth of them missing."""
    truth = rng.integers(1, 6, items)
    ratings = np.clip(truth + rng.integers(-1, 2, (annotators, items)), 1, 5).astype(float)
    ratings[rng.random(ratings.shape) < 0.2] = NONE
    return ratings


# ---- table ---------------------------------------------------------------------------------------------------------


def test_table_keeps_the_order_of_appearance() -> None:
    found = table([("eve", "q2", 1), ("bob", "q1", 0), ("eve", "q1", 0.5)])
    assert (found.annotators, found.items) == (["eve", "bob"], ["q2", "q1"])
    np.testing.assert_array_equal(found.ratings_AI, [[1, 0.5], [NONE, 0]])


def test_table_refuses_a_second_rating_and_none() -> None:
    with pytest.raises(ValueError, match="eve rated q1 twice"):
        table([("eve", "q1", 1), ("eve", "q1", 1)])
    with pytest.raises(ValueError, match="no judgements"):
        table([])


# ---- krippendorff_alpha --------------------------------------------------------------------------------------------


def test_alpha_by_hand() -> None:
    # Items (0,0), (1,1), (0,1): o_00 = o_11 = 2, o_01 = o_10 = 1, n_0 = n_1 = 3, n = 6.
    # D_o = 2/6, D_e = 2·3·3 / (6·5) = 3/5, α = 1 − 5/9. With two values every metric says the same.
    for metric in METRICS:
        assert alpha([[0, 1, 0], [0, 1, 1]], metric) == pytest.approx(4 / 9, rel=1e-12)


@pytest.mark.parametrize(
    ("section", "ratings", "metric", "published"),
    [
        ("A", [[int(c) for c in row] for row in ("0100000010", "1110010000")], "nominal", 0.095),
        ("B", [[ord(c) for c in row] for row in ("aabbdcccedda", "babbbccceddd")], "nominal", 0.692),
        ("C", EXAMPLE, "nominal", 0.743),
        ("D", EXAMPLE, "ordinal", 0.815),
        ("D", EXAMPLE, "interval", 0.849),
    ],
)
def test_alpha_is_that_of_the_paper(section: str, ratings: Any, metric: str, published: float) -> None:
    assert round(alpha(ratings, metric), 3) == published, f"Krippendorff 2011, section {section}"


def slow_alpha(ratings: np.ndarray, metric: str) -> float:
    """From the definition: mean distance of ratings within items over that of all pairable ratings."""
    items = [[float(value) for value in column if not math.isnan(value)] for column in ratings.T]
    items = [item for item in items if len(item) > 1]
    pooled = [value for item in items for value in item]

    def distance(c: float, k: float) -> float:
        if metric == "nominal":
            return float(c != k)
        if metric == "interval":
            return (c - k) ** 2
        between = sum(min(c, k) <= value <= max(c, k) for value in pooled)
        return (between - (pooled.count(c) + pooled.count(k)) / 2) ** 2 if c != k else 0.0

    within = sum(sum(distance(*pair) for pair in itertools.permutations(item, 2)) / (len(item) - 1) for item in items)
    anyhow = sum(distance(*pair) for pair in itertools.permutations(pooled, 2))
    return 1 - within / len(pooled) / (anyhow / (len(pooled) * (len(pooled) - 1)))


@pytest.mark.parametrize("metric", METRICS)
def test_alpha_equals_the_slow_version(metric: str) -> None:
    for seed in range(3):
        ratings = made_up(np.random.default_rng(seed))
        assert alpha(ratings, metric) == pytest.approx(slow_alpha(ratings, metric), rel=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_alpha_does_not_depend_on_who_is_who(metric: str) -> None:
    rng = np.random.default_rng(1)
    ratings = made_up(rng)
    mixed = np.array([rng.permutation(column) for column in ratings.T]).T  # annotators swapped within each item
    assert alpha(mixed, metric) == pytest.approx(alpha(ratings, metric), rel=1e-12)
    assert alpha(ratings[:, ::-1], metric) == pytest.approx(alpha(ratings, metric), rel=1e-12)


def test_each_metric_ignores_what_it_should() -> None:
    ratings = made_up(np.random.default_rng(2))
    relabelled, stretched, scaled = 7 - (ratings * 3) % 5, ratings**3, 0.1 - 0.001 * ratings
    assert alpha(relabelled, "nominal") == pytest.approx(alpha(ratings, "nominal"), rel=1e-12)
    assert alpha(stretched, "ordinal") == pytest.approx(alpha(ratings, "ordinal"), rel=1e-12)
    assert alpha(scaled, "interval") == pytest.approx(alpha(ratings, "interval"), rel=1e-12)
    assert alpha(relabelled, "ordinal") != pytest.approx(alpha(ratings, "ordinal"), rel=1e-2)
    assert alpha(stretched, "interval") != pytest.approx(alpha(ratings, "interval"), rel=1e-2)


def test_alpha_ignores_items_and_annotators_that_say_nothing() -> None:
    alone = np.array([[5.0, NONE], [NONE, NONE], [NONE, NONE], [NONE, NONE]])
    padded = np.vstack([np.hstack([EXAMPLE, alone]), np.full((1, 14), NONE)])
    assert krippendorff_alpha(padded, metric="ordinal") == krippendorff_alpha(EXAMPLE, metric="ordinal")


def test_alpha_at_its_limits() -> None:
    assert krippendorff_alpha([[1, 2, 3], [1, 2, 3]], metric="nominal", samples=50, seed=1) == (1, 1, 1)
    # two annotators who always differ, half of the time this way round: D_o = 1, D_e = 2·50·50 / (100·99)
    assert alpha([[0, 1] * 25, [1, 0] * 25]) == pytest.approx(1 - 99 / 50, rel=1e-12)
    rng = np.random.default_rng(3)
    assert alpha(rng.integers(0, 3, (3, 4000))) == pytest.approx(0, abs=0.02)  # two standard errors of 4000 items
    assert all(math.isnan(value) for value in krippendorff_alpha([[1, 1], [1, 1]], metric="nominal"))


def test_alphas_interval_is_that_of_alphas_of_resampled_items() -> None:
    ratings = EXAMPLE[:, :11]  # without the unit that one observer alone rated
    draws = np.random.default_rng(5).multinomial(11, np.full(11, 1 / 11), size=20)
    alphas = [slow_alpha(np.repeat(ratings, times, axis=1), "ordinal") for times in draws]
    found = krippendorff_alpha(ratings, metric="ordinal", samples=20, seed=5, level=0.8)
    # 80 % of Student's t with 10 degrees lie within ±1.372184; √(11/10) times that is 1.439158, and Φ of it 0.9249472.
    np.testing.assert_allclose(found[1:], np.quantile(alphas, [1 - 0.9249472, 0.9249472]), rtol=1e-5)  # as many digits


@pytest.mark.parametrize(
    ("ratings", "options", "said"),
    [
        ([[1, NONE], [NONE, 1]], {}, "no item with two ratings"),
        ([1, 2], {}, r"shape \(2,\)"),
        ([[1, math.inf], [1, 1]], {}, "finite or NaN"),
        ([[1, 2], [1, 1]], {"metric": "ratio"}, "metric is ratio; expected one of nominal, ordinal, interval"),
        ([[1, 2], [1, 1]], {"samples": 0}, "samples is 0"),
        ([[1, 2], [1, 1]], {"level": 95}, "level is 95"),
    ],
)
def test_alpha_refuses(ratings: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        krippendorff_alpha(ratings, **({"metric": "nominal"} | options))


# ---- pairwise_agreement --------------------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    # Both yes 20, yes/no 5, no/yes 10, both no 15. p_o = 35/50; p_e = 25/50·30/50 + 25/50·20/50 = ½; κ = 0.2 / 0.5.
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert pairwise_agreement([first, second]) == [Pair(0, 1, 50, 0.7, pytest.approx(0.4, rel=1e-12))]


def test_kappa_equals_the_version_from_the_table_of_counts() -> None:
    ratings = made_up(np.random.default_rng(4))
    pairs = pairwise_agreement(ratings)
    assert [(pair.first, pair.second) for pair in pairs] == list(itertools.combinations(range(4), 2))
    for pair in pairs:
        both = [column for column in ratings[[pair.first, pair.second]].T if not np.isnan(column).any()]
        counts = np.zeros((5, 5))
        for one, other in both:
            counts[int(one) - 1, int(other) - 1] += 1
        expected = counts.sum(axis=1) @ counts.sum(axis=0) / counts.sum()
        kappa = (np.trace(counts) - expected) / (counts.sum() - expected)  # Cohen's eq. 2, in frequencies
        assert pair.items == len(both)
        assert pair.share == pytest.approx(np.trace(counts) / len(both), rel=1e-12)
        assert pair.kappa == pytest.approx(kappa, rel=1e-10)


def test_kappa_at_its_limits_and_relabelled() -> None:
    ratings = made_up(np.random.default_rng(6), annotators=2)
    (pair,), (relabelled,) = pairwise_agreement(ratings), pairwise_agreement((ratings * 3) % 5)
    assert relabelled.kappa == pytest.approx(pair.kappa, rel=1e-12)
    assert pairwise_agreement([[1, 2, 3], [1, 2, 3]])[0].kappa == 1
    assert pairwise_agreement([[0, 1], [1, 0]])[0].kappa == -1
    assert math.isnan(pairwise_agreement([[1, 1], [1, 1]])[0].kappa)
    assert pairwise_agreement([[1, NONE], [NONE, 1]]) == []


# ---- wilson, side_bias, length_bias --------------------------------------------------------------------------------


def test_wilson_by_hand() -> None:
    # With z = 2, 10 of 20 gives (10 + 2 ± 2·√(5 + 1)) / 24
    level = 0.9544997361036416  # Φ(2) − Φ(−2)
    found = wilson(10, 20, level=level)
    np.testing.assert_allclose(found, (0.5, (12 - 2 * 6**0.5) / 24, (12 + 2 * 6**0.5) / 24), rtol=1e-9)
    assert wilson(0, 20, level=level) == (0, 0, pytest.approx(4 / 24, rel=1e-9))
    assert wilson(20, 20, level=level) == (1, pytest.approx(20 / 24, rel=1e-9), 1)


def test_wilson_never_leaves_the_shares_that_there_are() -> None:
    for trials in range(1, 200):
        assert wilson(0, trials).low == 0
        assert wilson(trials, trials).high <= 1


def test_wilsons_ends_are_where_the_score_test_turns() -> None:
    for successes, trials in ((3, 10), (17, 40), (90, 91)):
        for end in wilson(successes, trials)[1:]:
            score = (successes / trials - end) / math.sqrt(end * (1 - end) / trials)
            assert abs(score) == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_covers_95_percent_by_enumeration() -> None:
    inside = []
    for trials in range(30, 201, 10):
        ends = np.array([wilson(k, trials)[1:] for k in range(trials + 1)])
        for rate in np.linspace(0.3, 0.8, 51):
            held = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
            inside.append(binom.pmf(np.flatnonzero(held), trials, rate).sum())
    assert np.mean(inside) == pytest.approx(0.95, abs=0.005)
    assert min(inside) > 0.90  # any one share: it swings around the level


def test_wilson_of_nothing_knows_nothing_and_refuses_the_impossible() -> None:
    assert wilson(0, 0)[1:] == (0, 1)
    assert math.isnan(wilson(0, 0).mean)
    for successes in (-1, 4):
        with pytest.raises(ValueError, match="in 3 trials"):
            wilson(successes, 3)
    for level in (0, 1):
        with pytest.raises(ValueError, match=f"level is {level}"):
            wilson(1, 3, level=level)


def test_biases_by_hand() -> None:
    # ann: left, right, tie, left; differences left − right +5, −5, +9, 0. Left 2 of 3 (the tie is out); longer 2 of 2
    # (right was longer when she took it; the tie and the equal lengths are out). bob: right, of a longer left.
    who = ["ann", "ann", "bob", "ann", "ann"]
    choices, differences = [1, 0, 0, 0.5, 1], [5, -5, 3, 9, 0]
    assert side_bias(choices, who) == {"ann": Bias(wilson(2, 3), 3), "bob": Bias(wilson(0, 1), 1)}
    assert length_bias(choices, differences, who) == {"ann": Bias(wilson(2, 2), 2), "bob": Bias(wilson(0, 1), 1)}


def test_swapping_sides_mirrors_the_side_bias_and_leaves_the_length_bias() -> None:
    rng = np.random.default_rng(7)
    choices, differences = rng.choice([0, 0.5, 1], 200), rng.integers(-3, 4, 200)
    who = rng.integers(0, 3, 200).tolist()
    one, other = side_bias(choices, who), side_bias(1 - choices, who)
    for annotator, bias in one.items():
        mean, low, high = other[annotator].share
        np.testing.assert_allclose(bias.share, (1 - mean, 1 - high, 1 - low), rtol=1e-12)
    assert length_bias(choices, differences, who) == length_bias(1 - choices, -differences, who)


def test_an_annotator_of_ties_alone_shows_no_bias() -> None:
    (bias,) = side_bias([0.5, 0.5], ["ann", "ann"]).values()
    assert (bias.judgements, bias.share.low, bias.share.high) == (0, 0, 1)


def test_biases_refuse() -> None:
    with pytest.raises(ValueError, match="other numbers"):
        side_bias([0.7], ["ann"])
    with pytest.raises(ValueError, match="expected as many"):
        side_bias([1, 0], ["ann"])
    with pytest.raises(ValueError, match="all finite"):
        length_bias([1], [NONE], ["ann"])


# ---- the sequential test -------------------------------------------------------------------------------------------


def slow_capital(outcomes: Any, mean: float) -> float:
    """As Waudby-Smith & Ramdas write it, ∏ (1 + λ(x − m)), one bettor for each p, their capitals added."""
    total = 0.0
    for p, stake in zip(BETS.tolist(), STAKES.tolist(), strict=True):
        bet, capital = (p - mean) / (mean * (1 - mean)), stake
        for outcome in outcomes:
            capital *= 1 + bet * (outcome - mean)
        total += capital
    return total


def test_the_first_outcomes_by_hand() -> None:
    # After one win K(m) = Σ w p / m = ½ / m, since the stakes are even around ½: 1 at ½, and 20 at m = 1/40.
    one = judged_so_far([1])
    assert one.e_value == pytest.approx(1, rel=1e-12)
    assert one.win_rate == (1, pytest.approx(1 / 40, rel=1e-9), 1)
    # After two, K(½) = 4 Σ w p² with w = min(j, 100 − j) / 2500 and p = j / 100: 4 · 0.29165.
    squares = sum(min(j, 100 - j) * j * j for j in range(1, 100)) / 2500 / 100**2
    assert squares == pytest.approx(0.29165, rel=1e-12)
    assert judged_so_far([1, 1]).e_value == pytest.approx(4 * squares, rel=1e-12)
    assert judged_so_far([1, 1]).win_rate.low == pytest.approx(math.sqrt(squares / 20), rel=1e-9)
    # A win and a loss: K(½) = 4 Σ w p(1 − p) = 4 (½ − 0.29165), under 1, so p is still 1.
    assert judged_so_far([1, 0]).e_value == pytest.approx(4 * (0.5 - squares), rel=1e-12)
    assert judged_so_far([1, 0]).p_value == 1


def test_stakes_are_a_gamblers_single_coin() -> None:
    assert STAKES.sum() == pytest.approx(1, rel=1e-12)
    assert (STAKES > 0).all()


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.9])
def test_capital_equals_the_slow_version(mean: float) -> None:
    outcomes = np.random.default_rng(8).choice([0, 1 / 3, 0.5, 1], 40)
    found = log_e_values(outcomes, mean=mean)
    expected = [math.log(slow_capital(outcomes[: t + 1], mean)) for t in range(40)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(log_e_values([outcomes, 1 - outcomes], mean=mean)[0], found, rtol=1e-12)


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.75])
def test_capital_stays_the_same_on_average_where_the_rate_is_the_mean(mean: float) -> None:
    # The whole guarantee: over all 3^5 courses of wins, ties and losses whose mean is m, E K_5(m) = 1.
    tie = 0.1
    chance = {1.0: mean - tie / 2, 0.5: tie, 0.0: 1 - mean - tie / 2}
    courses = np.array(list(itertools.product(chance, repeat=5)))
    probability = np.prod(np.vectorize(chance.get)(courses), axis=1)
    assert probability @ courses.mean(axis=1) == pytest.approx(mean, rel=1e-12)
    expected = probability @ np.exp(log_e_values(courses, mean=mean))
    np.testing.assert_allclose(expected, np.ones(5), rtol=1e-12)


def test_capital_of_wins_and_losses_is_a_ratio_of_binomial_likelihoods() -> None:
    # Σ_p w Binomial(k; t, p) / Binomial(k; t, m), and with as fine a grid as this nearly ∫ f(p) …, f the triangle
    wins, judged, mean = 34, 50, 0.4
    found = log_e_values([1] * wins + [0] * (judged - wins), mean=mean)[-1]
    mixture = STAKES @ binom.pmf(wins, judged, BETS) / binom.pmf(wins, judged, mean)
    assert found == pytest.approx(math.log(mixture), rel=1e-10)
    p = np.linspace(0, 1, 200_001)[1:-1]
    integral = np.mean(np.minimum(p, 1 - p) * 4 * binom.pmf(wins, judged, p)) / binom.pmf(wins, judged, mean)
    assert found == pytest.approx(math.log(integral), rel=1e-4)  # a grid of whole percents against one 2000 times finer


def test_the_interval_is_where_a_slow_search_finds_it() -> None:
    outcomes = np.random.default_rng(9).choice([0, 0.5, 1], 60, p=[0.2, 0.2, 0.6])
    grid = np.linspace(0, 1, 401)[1:-1]
    inside = grid[[slow_capital(outcomes, m) < 20 for m in grid.tolist()]]
    found = judged_so_far(outcomes).win_rate
    assert inside[0] - found.low == pytest.approx(0, abs=0.0025)
    assert found.high - inside[-1] == pytest.approx(0, abs=0.0025)
    assert len(inside) == round((inside[-1] - inside[0]) * 400) + 1  # no holes: it is an interval
    for end in found[1:]:
        assert slow_capital(outcomes, end) == pytest.approx(20, rel=1e-8)


def test_the_interval_excludes_a_half_exactly_when_the_evidence_reaches_20() -> None:
    rng = np.random.default_rng(10)
    told = set()
    for _ in range(200):
        verdict = judged_so_far((rng.random(rng.integers(5, 60)) < rng.random()).astype(float))
        assert verdict.enough == (verdict.e_value >= 20)
        assert verdict.enough == (not verdict.win_rate.low <= 0.5 <= verdict.win_rate.high)
        told.add(verdict.enough)
    assert told == {True, False}


def test_swapping_the_sides_mirrors_the_verdict() -> None:
    outcomes = np.random.default_rng(11).choice([0, 0.5, 1], 80, p=[0.2, 0.3, 0.5])
    one, other = judged_so_far(outcomes), judged_so_far(1 - outcomes)
    np.testing.assert_allclose(one.win_rate, (1 - other.win_rate.mean, 1 - other.win_rate.high, 1 - other.win_rate.low))
    np.testing.assert_allclose((one.e_value, one.p_value), (other.e_value, other.p_value), rtol=1e-10)


def test_order_changes_the_p_value_alone() -> None:
    won_first = judged_so_far([1] * 20 + [0] * 20)
    mixed = judged_so_far([1, 0] * 20)
    np.testing.assert_allclose(won_first.win_rate, mixed.win_rate, rtol=1e-9)
    assert won_first.e_value == pytest.approx(mixed.e_value, rel=1e-10)
    assert won_first.p_value == pytest.approx(1 / slow_capital([1] * 20, 0.5), rel=1e-9)
    assert mixed.p_value == 1


def test_ties_tell_that_the_rate_is_near_a_half_and_never_that_it_is_not() -> None:
    verdict = judged_so_far([0.5] * 400)
    assert (verdict.e_value, verdict.p_value, verdict.enough) == (pytest.approx(1, rel=1e-9), 1, False)
    assert judged_so_far([0.5] * 400, width=0.1).enough


def test_a_wanted_width_says_enough_when_it_is_reached() -> None:
    even = [1, 0] * 200
    found = judged_so_far(even).win_rate
    wide = found.high - found.low
    assert not judged_so_far(even).enough
    assert judged_so_far(even, width=wide * 1.001).enough
    assert not judged_so_far(even, width=wide * 0.999).enough


def test_many_outcomes_do_not_overflow_and_none_know_nothing() -> None:
    verdict = judged_so_far([1] * 3000)
    assert verdict.e_value == math.exp(700)
    assert verdict.p_value == pytest.approx(0, abs=1e-200)
    assert verdict.win_rate.high == 1
    nothing = judged_so_far([])
    assert (nothing.judged, nothing.e_value, nothing.p_value, nothing.enough) == (0, 1, 1, False)
    assert nothing.win_rate[1:] == (0, 1)


@pytest.mark.parametrize(
    ("outcomes", "options", "said"),
    [
        ([1.2], {}, r"outside \[0, 1\]"),
        ([NONE], {}, r"outside \[0, 1\]"),
        ([[1, 0]], {}, "shape"),
        ([1], {"level": 95}, "level is 95"),
    ],
)
def test_the_sequential_test_refuses(outcomes: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        judged_so_far(outcomes, **options)


def test_evidence_refuses_a_mean_at_the_end() -> None:
    for mean in (0, 1):
        with pytest.raises(ValueError, match=f"mean is {mean}"):
            log_e_values([1], mean=mean)


# ---- completed_prompts ---------------------------------------------------------------------------------------------


def test_prompts_come_in_the_order_in_which_they_were_completed() -> None:
    # b is complete first (1, 0), then a (1, ½); a's third judgement is left out, c has one only
    outcomes, prompts = [1, 1, 0, 0.5, 0, 1], ["a", "b", "b", "a", "a", "c"]
    assert completed_prompts(outcomes, prompts, judgements=2).tolist() == [0.5, 0.75]
    assert completed_prompts(outcomes, prompts, judgements=1).tolist() == [1, 1, 1]
    assert completed_prompts([], [], judgements=2).tolist() == []


def test_each_prompt_may_want_a_number_of_its_own() -> None:
    means = completed_prompts([1, 0, 1, 1, 0], ["a", "b", "b", "a", "c"], judgements={"a": 2, "b": 1, "c": 2})
    assert means.tolist() == [0, 1]  # b by its first, then a; c still lacks one
    with pytest.raises(ValueError, match="for every prompt"):
        completed_prompts([1], ["a"], judgements={"b": 1})


def test_alpha_draws_clusters_together() -> None:
    ratings = np.array([[1, 2, 1, 2, 2, 1], [1, 2, 2, 1, 2, 1]], dtype=float)
    alone = krippendorff_alpha(ratings, metric="nominal")
    by_two = krippendorff_alpha(ratings, metric="nominal", clusters=["a", "a", "b", "b", "c", "c"])
    assert by_two.mean == alone.mean
    # Only b disagrees: without it α is 1. Drawn three times, D_o = 1 and D_e = 2·6·6 / (12·11), so α = 1 − 132/72.
    assert (by_two.low, by_two.high) == (pytest.approx(1 - 132 / 72), 1)
    assert krippendorff_alpha(ratings, metric="nominal", clusters=list("abcdef")) == pytest.approx(alone)
    with pytest.raises(ValueError, match="one an item"):
        krippendorff_alpha(ratings, metric="nominal", clusters=["a"])


# ---- the interval of a mean


@pytest.mark.parametrize("won", [[1] * 7 + [0] * 5, [1] * 4, [0] * 9, [1, 0]])
def test_the_interval_of_wins_and_losses_is_wilsons(won: list[int]) -> None:
    assert mean_interval(won) == pytest.approx(wilson(sum(won), len(won)), rel=1e-12)


def test_ties_make_the_interval_of_a_mean_narrower_as_by_hand() -> None:
    # 2 wins, 2 losses, 4 ties: p = ½, s² = 4·¼/8 = 1/8, n_e = 8·¼·10/(8/8 + ½) = 40/3; z² = 3.8415.
    found = mean_interval([1, 1, 0, 0, 0.5, 0.5, 0.5, 0.5])
    reach = 1.959964 * np.sqrt(0.25 * 40 / 3 + 3.841459 / 4) / (40 / 3 + 3.841459)
    assert found == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-6)
    assert mean_interval([0.5] * 10).low > 0.2  # only ties: narrow, but no point
    assert mean_interval([0.5] * 10).low < 0.45
    assert np.isnan(mean_interval([]).mean)


def test_completed_prompts_refuses() -> None:
    with pytest.raises(ValueError, match="expected the same number"):
        completed_prompts([1], [], judgements=1)
    with pytest.raises(ValueError, match="judgements is 0"):
        completed_prompts([1], ["a"], judgements=0)


# ---- in simulation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulation() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "scripts" / "agreement_simulation.py"))


def test_looking_after_every_judgement_raises_no_more_than_five_percent_alarms(simulation: dict[str, Any]) -> None:
    once, tied, averaged, single = simulation["false_alarms"]()
    assert max(once[1], tied[1], averaged[1]) < 0.05
    assert once[2] > 0.25  # what an ordinary interval would do
    assert single[1] > 0.10  # and what judgements of one prompt do when each counts as news


def test_the_chance_of_a_false_alarm_is_under_five_percent_without_simulation(simulation: dict[str, Any]) -> None:
    chance = simulation["exactly"](0.5, 1000)
    assert 0.03 < chance[299] < chance[999] < 0.05


@pytest.mark.parametrize("rate", [0.5, 0.6])
def test_simulated_stops_are_as_many_as_computed_ones(simulation: dict[str, Any], rate: float) -> None:
    simulated = simulation["by_then"](simulation["wins"](np.random.default_rng(1), rate, 300))
    computed = simulation["exactly"](rate, 300)
    error = np.sqrt(computed * (1 - computed) / simulation["RUNS"])
    assert (np.abs(simulated - computed) <= 3 * error + 1e-12).all()


def test_a_true_60_percent_is_found(simulation: dict[str, Any]) -> None:
    assert simulation["exactly"](0.6, 300)[-1] > 0.7


@pytest.mark.parametrize("rate", [0.5, 0.6, 0.8])
def test_the_interval_holds_the_truth_at_all_looks_together(simulation: dict[str, Any], rate: float) -> None:
    assert simulation["covered"](rate) >= 0.95


@pytest.mark.parametrize(("ties", "each"), [(0.0, 1), (0.3, 1), (0.0, 3), (0.3, 3)])
def test_the_interval_of_a_win_rate_covers_95_percent(simulation: dict[str, Any], ties: float, each: int) -> None:
    assert simulation["win_rate_covers"](ties, each) == pytest.approx(0.95, abs=0.01)


def test_the_bias_intervals_cover_95_percent(simulation: dict[str, Any]) -> None:
    assert simulation["wilson_covers"]() == pytest.approx(0.95, abs=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["labels", "one label", "compare", "rank"])
@pytest.mark.parametrize("items", [50, 100])
def test_alphas_interval_covers_95_percent(simulation: dict[str, Any], kind: str, items: int) -> None:
    assert simulation["alpha_covers"](kind, items) == pytest.approx(0.95, abs=0.015)


@pytest.mark.thorough
def test_the_pages_figures_are_those_of_the_simulation(simulation: dict[str, Any]) -> None:
    page = (PROJECT / "docs" / "agreement.md").read_text(encoding="utf-8")
    assert f"```text\n{simulation['report']()}\n```" in page, "run scripts/agreement_simulation.py and paste"
