"""Each statistic by hand, against a slow version, at its limits, and in simulation where it makes a promise."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from rlhf_core import statistics
from rlhf_core.statistics import (
    Interval,
    LengthBin,
    ReliabilityBin,
    _rates_at_zero,
    accuracy_by_length_difference,
    calibration_error_by_chance,
    cluster_bootstrap,
    confidence_and_correctness,
    distinct_n,
    expected_calibration_error,
    fit_temperature,
    kendall_tau,
    length_controlled_win_rate,
    longest_wins,
    reliability_bins,
    win_rate,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def clustered(rng: np.random.Generator, prompts: int, each: int, spread: float) -> list[list[float]]:
    """Wins whose rate differs from prompt to prompt; their overall expectation is 0.6."""
    rates = rng.beta(0.6 * spread, 0.4 * spread, prompts)
    return [(rng.random(each) < rate).astype(float).tolist() for rate in rates]


# ---- cluster_bootstrap ---------------------------------------------------------------------------------------------


def test_bootstrap_of_two_prompts_by_hand() -> None:
    # Two prompts, {0} and {1}: four equally likely resamples with means 0, ½, ½, 1. The 10th and 90th percentiles are
    # 0 and 1, the 30th and 70th both ½.
    assert cluster_bootstrap([[0.0], [1.0]], samples=2000, seed=0, level=0.8) == (0.5, 0.0, 1.0)
    assert cluster_bootstrap([[0.0], [1.0]], samples=2000, seed=0, level=0.4) == (0.5, 0.5, 0.5)


def test_bootstrap_weighs_values_and_not_prompts() -> None:
    # (1 + 1 + 1 + 0) / 4, where a mean of prompt means would be ½
    assert cluster_bootstrap([[1, 1, 1], [0]], samples=10, seed=0).mean == 0.75


def test_bootstrap_equals_the_slow_version() -> None:
    groups = clustered(np.random.default_rng(1), 12, 3, 2.0)
    groups[0], groups[1] = groups[0][:1], groups[1] + [1.0]  # clusters of different sizes
    rng = np.random.default_rng(7)
    means = []
    for row in rng.integers(12, size=(500, 12)):
        pooled = [value for index in row for value in groups[index]]
        means.append(sum(pooled) / len(pooled))
    means.sort()
    # numpy's default quantile: linear between order statistics at position q·(n − 1)
    expected = []
    for q in (0.05, 0.95):
        position = q * 499
        below = int(position)
        expected.append(means[below] + (position - below) * (means[below + 1] - means[below]))
    found = cluster_bootstrap(groups, samples=500, seed=7, level=0.9)
    np.testing.assert_allclose(found[1:], expected, rtol=1e-12)


def test_bootstrap_of_equal_values_has_no_width() -> None:
    assert cluster_bootstrap([[0.25, 0.25], [0.25]], samples=100, seed=3) == (0.25, 0.25, 0.25)


def test_bootstrap_is_wider_for_copies_than_for_independent_values() -> None:
    values = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    copies = cluster_bootstrap([[value] * 4 for value in values], samples=2000, seed=0)
    apart = cluster_bootstrap([[value] for value in np.repeat(values, 4)], samples=2000, seed=0)
    once = cluster_bootstrap([[value] for value in values], samples=2000, seed=0)
    np.testing.assert_allclose(copies, once, rtol=1e-12)  # four copies of a value tell no more than the value
    assert 1.7 < (copies.high - copies.low) / (apart.high - apart.low) < 2.3  # √4, up to the noise of 2000 resamples


@pytest.mark.parametrize("prompts", [64, 106])
def test_interval_covers_the_truth_as_often_as_it_says(prompts: int) -> None:
    rng = np.random.default_rng(prompts)
    covered = alone = 0
    runs = 2000
    for run in range(runs):
        groups = clustered(rng, prompts, 3, 1.0)
        found = cluster_bootstrap(groups, samples=300, seed=run)
        covered += found.low <= 0.6 <= found.high
        naive = cluster_bootstrap([[value] for group in groups for value in group], samples=300, seed=run)
        alone += naive.low <= 0.6 <= naive.high
    assert covered / runs == pytest.approx(0.94, abs=0.012)  # a percent under 0.95, ± 2.5 standard errors of 2000 runs
    assert alone / runs < 0.85  # what treating the three answers of a prompt as independent would do


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ([], {}, "no prompts"),
        ([[1.0], []], {}, "prompt 1"),
        ([[1.0], [float("nan")]], {}, "no finite numbers"),
        ([[1.0]], {"samples": 0}, "samples is 0"),
        ([[1.0]], {"level": 95}, "level is 95"),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(values: list[list[float]], options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cluster_bootstrap(values, **({"samples": 10, "seed": 0} | options))


# ---- win_rate ------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand_and_in_any_order() -> None:
    # 1 + ½ + 0 + 1 = 2.5 of 4
    found = win_rate([1, 0.5, 0, 1], ["a", "b", "b", "a"], samples=200, seed=0)
    assert found == cluster_bootstrap([[1, 1], [0.5, 0]], samples=200, seed=0)
    assert found.mean == 0.625


def test_swapping_the_sides_mirrors_the_win_rate() -> None:
    rng = np.random.default_rng(5)
    wins, prompts = rng.choice([0, 0.5, 1], 90), np.repeat(np.arange(30), 3).tolist()
    one, other = win_rate(wins, prompts, samples=500, seed=0), win_rate(1 - wins, prompts, samples=500, seed=0)
    np.testing.assert_allclose(other, (1 - one.mean, 1 - one.high, 1 - one.low), rtol=1e-12)


def test_win_rate_refuses_what_is_no_win() -> None:
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        win_rate([1.5], [0], samples=10, seed=0)
    with pytest.raises(ValueError, match="wins has 2 entries and prompts 1"):
        win_rate([1, 0], [0], samples=10, seed=0)


# ---- length_controlled_win_rate ------------------------------------------------------------------------------------


def controlled(wins: np.ndarray, differences: np.ndarray, **options: float) -> float:
    return length_controlled_win_rate(wins, differences, list(range(len(wins))), samples=0, **options).mean


def test_controlled_rate_by_hand() -> None:
    # Differences ±d have std d, so the feature is ± tanh 1: two groups, fitted exactly when the ridge vanishes.
    # Longer wins 3 of 4, shorter 2 of 4: logits ln 3 and 0, and their mean, ½·ln 3, is the logit at zero difference.
    wins = np.array([1, 1, 1, 0, 1, 1, 0, 0.0])
    differences = np.array([5.0] * 4 + [-5.0] * 4)
    assert controlled(wins, differences, ridge=1e-9) == pytest.approx(sigmoid(0.5 * np.log(3)), rel=1e-8)


def test_controlled_rate_equals_a_fit_of_its_formula() -> None:
    rng = np.random.default_rng(2)
    wins, differences = rng.choice([0, 0.5, 1], 120), rng.normal(4, 11, 120)
    feature = np.tanh(differences / differences.std())

    def loss(beta: np.ndarray) -> float:
        total = 0.5 * 1e-2 * float(beta @ beta)
        for won, x in zip(wins, feature, strict=True):
            z = beta[0] + beta[1] * x
            total += won * math.log1p(math.exp(-z)) + (1 - won) * math.log1p(math.exp(z))
        return total

    slow = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 2000})
    # Nelder–Mead stops where the loss is flat to double precision, about 1e-7 in β
    assert controlled(wins, differences) == pytest.approx(sigmoid(slow.x[0]), abs=1e-6)


def test_controlled_rate_of_equal_lengths_is_the_win_rate() -> None:
    wins = np.array([1, 1, 1, 0.5, 0])
    assert controlled(wins, np.full(5, 7.0), ridge=1e-9) == pytest.approx(0.7, rel=1e-8)
    many = np.tile(wins, 20)
    assert controlled(many, np.full(100, 7.0)) == pytest.approx(0.7, abs=1e-4)  # 100 comparisons hardly feel the ridge


def test_ties_count_as_half_a_win_and_half_a_loss() -> None:
    differences = np.array([3.0, -1, 2, 6])
    halves = controlled(np.array([0.5, 1, 0, 1]), differences)
    twice = controlled(np.array([1, 0, 1, 1, 0, 0, 1, 1.0]), np.array([3.0, 3, -1, -1, 2, 2, 6, 6]), ridge=2e-2)
    assert halves == pytest.approx(twice, rel=1e-8)


def test_separable_data_stay_finite() -> None:
    differences = np.linspace(-9, 9, 20)
    assert controlled((differences > 0).astype(float), differences) == pytest.approx(0.5, abs=1e-6)
    assert 0.99 < controlled(np.ones(20), differences) < 1
    assert 0 < controlled(np.zeros(20), differences) < 0.01
    assert 0.5 < controlled(np.ones(1), np.zeros(1)) < 1


def test_swapping_the_sides_mirrors_the_controlled_rate() -> None:
    rng = np.random.default_rng(4)
    wins, differences = rng.choice([0, 0.5, 1], 60), rng.normal(5, 9, 60)
    assert controlled(1 - wins, -differences) == pytest.approx(1 - controlled(wins, differences), rel=1e-8)


def test_controlled_rate_takes_away_a_length_bias() -> None:
    # A judge with no opinion but a taste for length, and a policy that mostly writes more: raw it wins, controlled not.
    rng = np.random.default_rng(8)
    differences = rng.normal(12, 12, 4000)
    wins = (rng.random(4000) < sigmoid(1.5 * np.tanh(differences / differences.std()))).astype(float)
    assert wins.mean() > 0.64
    assert controlled(wins, differences) == pytest.approx(0.5, abs=0.04)  # two standard errors of 4000 comparisons


def test_controlled_interval_resamples_prompts() -> None:
    rng = np.random.default_rng(9)
    groups = clustered(rng, 40, 1, 1.0)
    wins = np.repeat([group[0] for group in groups], 4)
    differences = np.repeat(rng.normal(0, 10, 40), 4)
    together = length_controlled_win_rate(wins, differences, np.repeat(np.arange(40), 4).tolist(), samples=300, seed=0)
    apart = length_controlled_win_rate(wins, differences, list(range(160)), samples=300, seed=0)
    assert together.low < together.mean < together.high
    assert together.mean == apart.mean
    assert 1.5 < (together.high - together.low) / (apart.high - apart.low) < 2.6  # √4 again, 300 resamples
    assert together == length_controlled_win_rate(
        wins, differences, [f"prompt {i}" for i in np.repeat(np.arange(40), 4)], samples=300, seed=0
    )


@pytest.mark.thorough
@pytest.mark.parametrize("prompts", [64, 106])
def test_the_intervals_of_win_rates_cover_their_truths(prompts: int) -> None:
    # Two comparisons a prompt that hang together: each is won by the model's probability, the draws share a part.
    rng = np.random.default_rng(prompts)
    hits = controlled_hits = 0
    runs, where = 2000, np.linspace(-6, 6, 601)
    density = norm.pdf(where) / norm.pdf(where).sum()
    for run in range(runs):
        at_zero, by_length = np.log(1 / rng.uniform(0.25, 0.5) - 1), rng.uniform(0, 1.5)
        differences = rng.normal(8, 12, 2 * prompts)
        shared = np.repeat(rng.normal(size=prompts), 2)
        draws = norm.cdf(np.sqrt(0.4) * shared + np.sqrt(0.6) * rng.normal(size=2 * prompts))
        won = (draws < sigmoid(at_zero + by_length * np.tanh(differences / 12))).astype(float)
        truth = float(density @ sigmoid(at_zero + by_length * np.tanh((8 + 12 * where) / 12)))
        ids = np.repeat(np.arange(prompts), 2).tolist()
        plain = win_rate(won, ids, samples=500, seed=run)
        hits += plain.low <= truth <= plain.high
        if run % 4 == 0:  # it takes ten times as long
            found = length_controlled_win_rate(won, differences, ids, samples=500, seed=run)
            controlled_hits += found.low <= sigmoid(at_zero) <= found.high
    assert hits / runs == pytest.approx(0.94, abs=0.015)
    assert controlled_hits / (runs // 4) == pytest.approx(0.94, abs=0.03)  # three standard errors of 500 runs


def test_controlled_interval_is_that_of_refits_on_resampled_rows() -> None:
    wins, differences = np.array([1, 0, 1, 1, 0.5, 0.0]), np.array([4.0, 4, -2, 1, 0, -7])
    prompts = [0, 0, 1, 1, 2, 2]
    scale = differences.std()
    rng = np.random.default_rng(3)
    rates = []
    for _ in range(20):
        rows = [row for prompt in rng.integers(3, size=3) for row in (2 * prompt, 2 * prompt + 1)]
        rates.append(_refit(wins[rows], np.tanh(differences[rows] / scale)))
    found = length_controlled_win_rate(wins, differences, prompts, samples=20, seed=3, level=0.5)
    np.testing.assert_allclose(found[1:], np.quantile(rates, [0.25, 0.75]), atol=1e-5)  # the refit's own tolerance


def _fitted(wins: np.ndarray, feature: np.ndarray, weights: np.ndarray, ridge: float) -> float:
    """The same by scikit-learn, which MLflow brings: each comparison once as a win and once as a loss."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows = np.stack([np.ones_like(feature), feature], axis=1)
    model = linear_model.LogisticRegression(C=1 / ridge, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    parts = np.concatenate([weights * wins, weights * (1 - wins)])
    model.fit(np.concatenate([rows, rows]), np.repeat([1, 0], len(wins)), sample_weight=parts)
    return float(sigmoid(model.coef_[0, 0]))


def test_all_refits_at_once_are_those_of_another_library() -> None:
    rng = np.random.default_rng(5)
    cases = {
        "mixed": (rng.choice([0, 0.5, 1], 60), rng.normal(5, 9, 60)),
        "separable": ((np.arange(60) > 20).astype(float), np.arange(60) - 20.5),
        "all won": (np.ones(60), rng.normal(0, 4, 60)),
        "all but one lost": (np.eye(60)[7], rng.normal(0, 4, 60)),
        "one length": (rng.choice([0, 1.0], 60), np.zeros(60)),
    }
    times = rng.multinomial(20, np.full(20, 1 / 20), size=8)[:, np.arange(60) // 3].astype(float)
    for name, (wins, differences) in cases.items():
        feature = np.tanh(differences / max(differences.std(), 1e-9))
        for ridge in (1e-4, 1e-2, 3.0):
            found = _rates_at_zero(wins, feature, times, ridge)
            expected = [_fitted(wins, feature, row, ridge) for row in times]
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=f"{name}, ridge {ridge}")


def test_a_step_that_would_run_away_is_shortened() -> None:
    # Two heavy losses and a light tie beyond them: from here Newton's plain steps never end.
    wins, feature, times = np.array([0, 0, 0.5]), np.array([-0.637, 0.637, 0.99999]), np.array([[60.0, 60, 1]])
    assert 0 <= _rates_at_zero(wins, feature, times, 1e-9)[0] < 1e-9


def test_a_controlled_interval_in_blocks_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    wins, differences, prompts = rng.choice([0, 0.5, 1], 30), rng.normal(5, 9, 30), (np.arange(30) // 2).tolist()
    whole = length_controlled_win_rate(wins, differences, prompts, samples=50, seed=1)
    monkeypatch.setattr(statistics, "FITTED_ENTRIES", 100)  # three resamples at a time
    np.testing.assert_allclose(length_controlled_win_rate(wins, differences, prompts, samples=50, seed=1), whole)
    monkeypatch.setattr(statistics, "FITTED_ENTRIES", 1)  # less than one
    np.testing.assert_allclose(length_controlled_win_rate(wins, differences, prompts, samples=50, seed=1), whole)


def test_without_a_ridge_there_is_no_controlled_rate() -> None:
    with pytest.raises(ValueError, match="ridge is 0; expected a number above 0"):
        controlled(np.ones(3), np.arange(3.0), ridge=0)


def _refit(wins: np.ndarray, feature: np.ndarray) -> float:
    def loss(beta: np.ndarray) -> float:
        z = beta[0] + beta[1] * feature
        return float(np.sum(wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)) + 0.005 * beta @ beta)

    return float(sigmoid(minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x[0]))


# ---- longest_wins --------------------------------------------------------------------------------------------------


def test_longest_wins_counts_ties_half() -> None:
    assert longest_wins([3, -1, 0, 8]) == 0.625  # 1 + 0 + ½ + 1 of 4
    assert longest_wins([5]) == 1.0
    with pytest.raises(ValueError, match="N ≥ 1"):
        longest_wins([])


# ---- calibration ---------------------------------------------------------------------------------------------------


def test_confidence_is_about_the_response_the_scorer_prefers() -> None:
    # σ(ln 3) = ¾ either way round; right only where the preferred response has the higher score
    confidence, correct = confidence_and_correctness([np.log(3), -np.log(3), 0.0])
    np.testing.assert_allclose(confidence, [0.75, 0.75, 0.5], rtol=1e-12)
    assert correct.tolist() == [1.0, 0.0, 0.5]


def test_confidence_of_huge_margins_does_not_overflow() -> None:
    confidence, _ = confidence_and_correctness([1e4, -1e4])
    assert confidence.tolist() == [1.0, 1.0]


def test_reliability_and_error_by_hand() -> None:
    # Two bins: {0.2, 0.4} came true half of the time, {0.5, 1.0} always. |½ − 0.3| = 0.2, |1 − 0.75| = 0.25.
    probabilities, outcomes = [0.2, 0.5, 0.4, 1.0], [0, 1, 1, 1]
    first, second = reliability_bins(probabilities, outcomes, bins=2)
    assert first == ReliabilityBin(0.0, 0.5, pytest.approx(0.3), 0.5, 2)
    assert second == ReliabilityBin(0.5, 1.0, 0.75, 1.0, 2)
    assert expected_calibration_error(probabilities, outcomes, bins=2) == pytest.approx(0.225, rel=1e-12)


def test_calibration_error_equals_the_slow_version() -> None:
    rng = np.random.default_rng(6)
    probabilities, outcomes = rng.random(333), rng.choice([0, 0.5, 1], 333)
    total = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(probabilities) if b / 10 <= p < (b + 1) / 10]
        if inside:
            accuracy = sum(outcomes[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i] for i in inside) / len(inside)
            total += len(inside) / 333 * abs(accuracy - confidence)
    assert expected_calibration_error(probabilities, outcomes) == pytest.approx(total, rel=1e-12)


def test_empty_bins_are_left_out() -> None:
    assert [(part.low, part.pairs) for part in reliability_bins([0.05, 0.95], [0, 1])] == [(0.0, 1), (0.9, 1)]


def test_calibration_error_at_its_limits() -> None:
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0.0
    assert expected_calibration_error([0.0, 1.0], [1, 0]) == 1.0


def test_calibration_error_of_a_calibrated_scorer_falls_with_its_pairs() -> None:
    rng = np.random.default_rng(0)

    def mean_error(pairs: int) -> float:
        errors = []
        for _ in range(50):
            confidence = rng.uniform(0.5, 1, pairs)
            errors.append(expected_calibration_error(confidence, rng.random(pairs) < confidence))
        return float(np.mean(errors))

    assert 0.05 < mean_error(100) < 0.09  # the bias that the docstring tells
    assert mean_error(10_000) < 0.01


# ---- calibration_error_by_chance -------------------------------------------------------------------------------------


def test_chance_by_hand() -> None:
    # One claim of 1 / (1 + e^-1) = 0.731 comes true (error 0.269) or does not (0.731); a tie is half true always.
    for level, error in ((0.5, 0.2689414), (0.95, 0.7310586)):
        assert calibration_error_by_chance([1.0], [(0, 0, 1)], seed=0, level=level) == pytest.approx(error, abs=1e-6)
        assert calibration_error_by_chance([-1.0], [(0, 0, 1)], seed=0, level=level) == pytest.approx(error, abs=1e-6)
        assert calibration_error_by_chance([0.0], [(0, 0, 1)], seed=0, level=level) == 0.0


def test_chance_equals_independent_draws_where_pairs_share_no_response() -> None:
    rng = np.random.default_rng(3)
    margins = rng.normal(0, 2, 400)
    confidence = sigmoid(np.abs(margins))
    errors = [expected_calibration_error(confidence, rng.random(400) < confidence) for _ in range(2000)]
    found = calibration_error_by_chance(margins, [(row, 0, 1) for row in range(400)], seed=0)
    assert found == pytest.approx(np.quantile(errors, 0.95), rel=0.05)  # 1000 draws: the quantile's error is about 2 %
    half = calibration_error_by_chance(margins[:200], [(row, 0, 1) for row in range(200)], seed=0)
    assert half > 1.2 * found  # as the root of the pairs, about


def test_pairs_of_one_ranking_come_out_together() -> None:
    # In each of 60 rankings one response claims to lose against 9 others: mostly all of these come true, or few.
    which = [(ranking, other, 0) for ranking in range(60) for other in range(1, 10)]
    margins = np.full(len(which), 1.0)
    together = calibration_error_by_chance(margins, which, seed=0)
    apart = calibration_error_by_chance(margins, [(pair, 0, 1) for pair in range(len(which))], seed=0)
    assert together > 1.5 * apart


def test_a_calibrated_scorer_is_below_chance_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    scores = rng.normal(0, 1.5, (80, 4))
    pairs = [(row, i, j) for row in range(80) for i in range(4) for j in range(i)]
    rows, left, right = np.array(pairs).T
    margins = scores[rows, left] - scores[rows, right]
    bound, below = calibration_error_by_chance(margins, pairs, seed=0), 0
    for _ in range(300):
        ranked = scores + rng.gumbel(size=scores.shape)
        came_true = (ranked[rows, left] - ranked[rows, right]) * margins > 0
        below += expected_calibration_error(sigmoid(np.abs(margins)), came_true) <= bound
    assert 0.91 < below / 300 < 0.985  # 0.95, three standard errors of 0.0126 either way


def test_chance_refuses_other_pairs_than_margins() -> None:
    with pytest.raises(ValueError, match="lengths differ: margins 2, which 1"):
        calibration_error_by_chance([1.0, 2.0], [(0, 0, 1)], seed=0)


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "bins", "said"),
    [
        ([1.2], [1], 10, "probabilities lies in"),
        ([0.2], [2], 10, "outcomes lies in"),
        ([0.2, 0.3], [1], 10, "lengths differ: probabilities 2, outcomes 1"),
        ([0.2], [1], 0, "bins is 0"),
        ([], [], 10, "N ≥ 1"),
    ],
)
def test_reliability_refuses(probabilities: list[float], outcomes: list[float], bins: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reliability_bins(probabilities, outcomes, bins=bins)


def test_temperature_by_hand() -> None:
    # Every margin is ln 9, three of four come true: the best fit says ¾, so ln 9 / T = ln 3 and T = 2.
    assert fit_temperature([np.log(9)] * 4, [1, 1, 1, 0]) == pytest.approx(2.0, rel=1e-7)


def test_temperature_is_where_the_slow_search_finds_it() -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(0, 3, 200)
    outcomes = (rng.random(200) < sigmoid(margins / 1.7)).astype(float)
    grid = np.exp(np.linspace(np.log(0.5), np.log(5), 4001))
    losses = [
        -np.sum(outcomes * np.log(sigmoid(margins / t)) + (1 - outcomes) * np.log(sigmoid(-margins / t))) for t in grid
    ]
    assert fit_temperature(margins, outcomes) == pytest.approx(
        grid[int(np.argmin(losses))], rel=6e-4
    )  # the grid's step


def test_temperature_scales_with_margins_and_ignores_their_orientation() -> None:
    rng = np.random.default_rng(2)
    margins = rng.normal(0, 2, 300)
    outcomes = (rng.random(300) < sigmoid(margins)).astype(float)
    once = fit_temperature(margins, outcomes)
    assert fit_temperature(3 * margins, outcomes) == pytest.approx(3 * once, rel=1e-6)
    sides = rng.choice([-1.0, 1.0], 300)
    assert fit_temperature(margins * sides, np.where(sides > 0, outcomes, 1 - outcomes)) == pytest.approx(
        once, rel=1e-6
    )


def test_temperature_stays_within_its_bounds() -> None:
    assert fit_temperature([1.0, 2.0], [1, 1]) == pytest.approx(0.05)  # all right: never sure enough
    assert fit_temperature([1.0, 2.0], [0, 0]) == pytest.approx(20.0)  # all wrong: never unsure enough
    with pytest.raises(ValueError, match="expected 0 < low < high"):
        fit_temperature([1.0], [1], low=2, high=1)


def test_temperature_scaling_mends_an_over_confident_scorer() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 1.5, 3000)
    outcomes = (rng.random(3000) < sigmoid(truth)).astype(float)
    margins = 3 * truth
    temperature = fit_temperature(margins, outcomes)
    assert temperature == pytest.approx(3.0, rel=0.1)  # two standard errors of 3000 pairs
    oriented = margins * (2 * outcomes - 1)
    before = expected_calibration_error(*confidence_and_correctness(oriented))
    after = expected_calibration_error(*confidence_and_correctness(oriented / temperature))
    assert before > 0.1
    assert after < 0.03


# ---- accuracy_by_length_difference ---------------------------------------------------------------------------------


def test_accuracy_by_length_by_hand() -> None:
    # The second pair is turned round (outcome 0): its preferred response is 2 shorter and scored lower, so it is wrong.
    # In two bins: {−6 right, −2 wrong} and {1 half, 9 right}.
    found = accuracy_by_length_difference([1, 3, 0, 2], [-6, 2, 1, 9], [1, 0, 1, 1], quantiles=2)
    assert found == [LengthBin(-6, -2, 0.5, 2), LengthBin(1, 9, 0.75, 2)]


def test_accuracy_by_length_does_not_depend_on_which_stands_first() -> None:
    rng = np.random.default_rng(0)
    margins, differences, outcomes = rng.normal(0, 1, 90), rng.integers(-20, 20, 90), rng.integers(0, 2, 90)
    one = accuracy_by_length_difference(margins, differences, outcomes)
    assert one == accuracy_by_length_difference(-margins, -differences, 1 - outcomes)
    assert sum(part.pairs for part in one) == 90
    assert all(12 <= part.pairs <= 24 for part in one)
    assert all(a.high < b.low for a, b in itertools.pairwise(one))


def test_a_scorer_that_counts_words_is_right_on_the_right_and_wrong_on_the_left() -> None:
    differences = np.array([-9, -8, -3, -2, 2, 3, 8, 9.0])
    found = accuracy_by_length_difference(differences, differences, np.ones(8), quantiles=4)
    assert [part.accuracy for part in found] == [0, 0, 1, 1]


def test_equal_differences_share_a_bin_and_ties_are_left_out() -> None:
    assert accuracy_by_length_difference([1, -1, 1], [4, 4, 4], [1, 1, 0.5]) == [LengthBin(4, 4, 0.5, 2)]
    assert accuracy_by_length_difference([1], [4], [0.5]) == []
    with pytest.raises(ValueError, match="quantiles is 0"):
        accuracy_by_length_difference([1], [4], [1], quantiles=0)


# ---- distinct_n ----------------------------------------------------------------------------------------------------


def test_distinct_by_hand() -> None:
    # bigrams: the-cat, cat-sat | the-cat, cat-ran: 3 different of 4
    assert distinct_n(["The cat sat", "the cat  ran"], 2) == 0.75
    assert distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)  # 12, 21, 12


def test_distinct_at_its_limits() -> None:
    assert distinct_n(["a b c d"], 1) == 1.0
    assert distinct_n([["a"] * 50], 1) == 0.02
    assert distinct_n(["one", ""], 2) == 0.0
    assert distinct_n([], 1) == 0.0
    assert distinct_n(["a b", "c d"], 2) == 1.0  # b-c reaches over the end of a text and is no bigram
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n(["a"], 0)


# ---- kendall_tau ---------------------------------------------------------------------------------------------------


def test_tau_by_hand() -> None:
    # (1,2,3) against (1,3,2): two pairs agree, one does not: (2 − 1) / 3
    assert kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3, rel=1e-12)
    # a ties one of its six pairs: 5 agree, 0 disagree, √((6 − 1)·6)
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30), rel=1e-12)


def test_tau_equals_the_slow_version() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 7), rng.integers(0, 4, 7)
        agree = tied_a = tied_b = 0
        pairs = list(itertools.combinations(range(7), 2))
        for i, j in pairs:
            one, other = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
            agree += one * other
            tied_a += one == 0
            tied_b += other == 0
        expected = agree / math.sqrt((len(pairs) - tied_a) * (len(pairs) - tied_b))
        assert kendall_tau(a, b) == pytest.approx(expected, rel=1e-12)


def test_tau_at_its_limits() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="lengths differ"):
        kendall_tau([1, 2], [1, 2, 3])


def test_interval_reads_as_a_triple() -> None:
    mean, low, high = Interval(0.5, 0.4, 0.6)
    assert (mean, low, high) == (0.5, 0.4, 0.6)
