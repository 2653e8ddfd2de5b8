"""The numbers a judgement stands on: intervals, win rates, calibration, diversity, agreement.

Pure: plain numbers and numpy arrays in, plain numbers out; randomness comes from a seed that is passed in.
Leaves out significance tests (an interval says more) and anything that looks at a model.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau

Array = NDArray[np.float64]
FITTED_ENTRIES = 1 << 20  # (resamples, comparisons) that are fitted at once: 8 MB an array
NEWTON_STEPS = 100  # some six are needed, up to thirty where data are separable and the ridge is next to nothing


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class Answer(Protocol):
    """What one answer is told from another by."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def stopped(self) -> bool: ...


AnAnswer = TypeVar("AnAnswer", bound=Answer)


class ReliabilityBin(NamedTuple):
    """Predictions whose probability lies in [low, high): what they promised and what came true."""

    low: float
    high: float
    confidence: float
    accuracy: float
    pairs: int


class LengthBin(NamedTuple):
    """Pairs whose preferred response is low to high tokens longer, and how often the scorer was right about them."""

    low: float
    high: float
    accuracy: float
    pairs: int


def cluster_bootstrap(
    values_by_prompt: Sequence[Sequence[float]], *, samples: int, seed: int, level: float = 0.95
) -> Interval:
    """Mean with a percentile interval, prompts drawn with replacement and each brought with all its values.

        θ̂ = Σ_p Σ_j x_pj / Σ_p n_p        [θ*_(α/2), θ*_(1−α/2)] over resamples of the P prompts

    Answers to one prompt resemble each other: drawing single values would count them as independent and give too
    narrow an interval. Where all values are equal the interval has no width; with fewer than about 20 prompts it is
    too narrow.
    Efron & Tibshirani 1993, §13.3; Field & Welsh 2007 for clusters, https://doi.org/10.1111/j.1467-9868.2007.00593.x

    Args:
        values_by_prompt: one sequence of values a prompt, none empty; lengths may differ.
        samples: resamples drawn, 1000 or more for a 95 % interval that is steady in its second digit.
        seed: seeds the draws; the same seed gives the same interval.
        level: share of resampled means inside the interval.

    Raises:
        ValueError: there is no prompt, one has no value, a value is not finite, or level is not inside (0, 1).
    """
    sums, counts = _cluster_sums(values_by_prompt)
    _check_bootstrap(samples, level)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = _percentiles(means, level)
    return Interval(float(sums.sum() / counts.sum()), low, high)


def outcome(ours: float, theirs: float) -> float:
    """1 if ours is greater, ½ if they are equal, 0."""
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0


def answers_outcome(ours: AnAnswer, theirs: AnAnswer, score: Callable[[AnAnswer], float]) -> float:
    """`outcome` of the scores of two answers to a prompt; the same answer, ended in the same way, is a tie.

    It may have been computed beside other rows, and its score rounded otherwise.
    """
    if (ours.text, ours.tokens, ours.stopped) == (theirs.text, theirs.tokens, theirs.stopped):
        return 0.5
    return outcome(score(ours), score(theirs))


def win_rate(wins: ArrayLike, prompts: Sequence[Hashable], *, samples: int, seed: int, level: float = 0.95) -> Interval:
    """Share of comparisons won, ties half, with `cluster_bootstrap`'s interval over prompts.

    Args:
        wins: (N,) 1 won, 0.5 tie, 0 lost; a judge that sees an order gives the mean of both orders.
        prompts: (N,) which prompt each comparison belongs to; any hashable, in any order.
        samples, seed, level: as `cluster_bootstrap`.

    Raises:
        ValueError: a win lies outside [0, 1], or lengths differ.
    """
    won = _checked_wins(wins, len(prompts))
    groups: dict[Hashable, list[float]] = {}
    for value, prompt in zip(won.tolist(), prompts, strict=True):
        groups.setdefault(prompt, []).append(value)
    return cluster_bootstrap(list(groups.values()), samples=samples, seed=seed, level=level)


def length_controlled_win_rate(
    wins: ArrayLike,
    length_differences: ArrayLike,
    prompts: Sequence[Hashable],
    *,
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
    ridge: float = 1e-2,
) -> Interval:
    """The win rate that a logistic model predicts for two answers of the same length.

        P(win) = σ(β₀ + β₁ · tanh(Δ / std Δ))        rate = σ(β̂₀)

    β minimises Σ −log-likelihood + ½·ridge·(β₀² + β₁²); a tie is half a win and half a loss. The ridge keeps
    separable data finite (won all: just under 1) and is far too small to be seen elsewhere. Where all lengths are
    equal the rate is the plain win rate. The interval refits on resampled prompts with std Δ kept.

    Dubois et al. 2024, §3, https://arxiv.org/abs/2404.04475. Left out: their term for how hard each prompt is (it is
    estimated from many models judged on the same prompts) and the stronger ridge they put on the length term against
    gaming. So where hard prompts also draw long answers, the two effects are not told apart.

    Args:
        wins: (N,) in [0, 1] as `win_rate`.
        length_differences: (N,) length of the judged answer minus its opponent's, any unit.
        prompts: (N,) prompt of each comparison, the clusters of the interval.
        samples: refits for the interval, all at once; 0 gives an interval of no width.
        seed, level: as `cluster_bootstrap`.
        ridge: weight of the penalty, in comparisons; above 0.

    Raises:
        ValueError: a win lies outside [0, 1], lengths differ, or ridge is not above 0.
    """
    won = _checked_wins(wins, len(prompts))
    difference = _vector(length_differences, "length_differences")
    _same_length(wins=won, length_differences=difference)
    scale = float(difference.std())
    feature = np.tanh(difference / scale) if scale > 0 else np.zeros_like(difference)

    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; expected a number above 0, without which separable data have no fit")
    rate = float(_rates_at_zero(won, feature, np.ones((1, len(won))), ridge)[0])
    if samples == 0:
        return Interval(rate, rate, rate)
    _check_bootstrap(samples, level)
    _, cluster = np.unique([_index_of(prompts)[prompt] for prompt in prompts], return_inverse=True)
    clusters = int(cluster.max()) + 1
    drawn_RP = np.random.default_rng(seed).integers(clusters, size=(samples, clusters))
    times_RP = np.stack([np.bincount(drawn_P, minlength=clusters) for drawn_P in drawn_RP]).astype(np.float64)
    blocks = np.array_split(times_RP, min(-(-samples * len(won) // FITTED_ENTRIES), samples))
    rates = np.concatenate([_rates_at_zero(won, feature, block_RP[:, cluster], ridge) for block_RP in blocks])
    low, high = _percentiles(rates, level)
    return Interval(rate, low, high)


def longest_wins(length_differences: ArrayLike) -> float:
    """What the rule "the longer one is better" would say: the share of positive differences, ties half.

    With judged minus opponent it is the win rate of a judge who only counts; with preferred minus rejected it is the
    accuracy a reward model has to beat.

    Raises:
        ValueError: there is no difference.
    """
    difference = _vector(length_differences, "length_differences")
    return float(np.mean((np.sign(difference) + 1) / 2))


def confidence_and_correctness(margins: ArrayLike) -> tuple[Array, Array]:
    """Turn score differences, preferred minus rejected, into what calibration needs.

        confidence = σ(|m|) ∈ [½, 1]        correct = 1 if m > 0, ½ if m = 0, 0 if m < 0

    Calibration asks whether claims come true, and a scorer's claim is about the response that it prefers itself.
    σ(m) with every outcome 1 would instead call each bin below ½ wrong by construction.
    """
    margin = _vector(margins, "margins")
    return _sigmoid(np.abs(margin)), (np.sign(margin) + 1) / 2


def reliability_bins(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> list[ReliabilityBin]:
    """Mean probability and share that came true, in bins of equal width over [0, 1]; empty bins are left out.

    A probability of exactly 1 belongs to the last bin.
    Guo et al. 2017, §2, https://arxiv.org/abs/1706.04599

    Args:
        probabilities: (N,) in [0, 1].
        outcomes: (N,) in [0, 1]; 1 where it came true, ½ for a tie.
        bins: number of bins.

    Raises:
        ValueError: a value lies outside [0, 1], lengths differ, there is none, or bins < 1.
    """
    probability, outcome = _vector(probabilities, "probabilities"), _vector(outcomes, "outcomes")
    _same_length(probabilities=probability, outcomes=outcome)
    _in_unit_interval(probabilities=probability, outcomes=outcome)
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected 1 or more")
    index = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        ReliabilityBin(
            low=b / bins,
            high=(b + 1) / bins,
            confidence=float(probability[index == b].mean()),
            accuracy=float(outcome[index == b].mean()),
            pairs=int((index == b).sum()),
        )
        for b in np.unique(index).tolist()
    ]


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> float:
    """How far promises and outcomes lie apart, weighted by how often each promise is made.

        ECE = Σ_b (n_b / N) · |accuracy_b − confidence_b|

    Biased upwards on few pairs: a perfectly calibrated scorer with 100 pairs in 5 bins shows about 0.07.
    Guo et al. 2017, eq. 3, https://arxiv.org/abs/1706.04599; arguments as `reliability_bins`.
    """
    parts = reliability_bins(probabilities, outcomes, bins=bins)
    total = sum(part.pairs for part in parts)
    return sum(part.pairs / total * abs(part.accuracy - part.confidence) for part in parts)


def calibration_error_by_chance(
    margins: ArrayLike, which: Sequence[tuple[int, int, int]], *, seed: int, draws: int = 1000, level: float = 0.95
) -> float:
    """The `expected_calibration_error` that a perfectly calibrated scorer stays below on these pairs in most cases.

    Few pairs never come out as often as promised, and pairs of one ranking come out together. So all rankings are drawn
    anew from what the scores promise, by Gumbel noise on each response (a Plackett–Luce model; any one pair then comes
    out with probability σ(margin)), and the error of each draw is measured.

    Args:
        margins: (N,) score differences, divided by the temperature.
        which: of each pair the ranking, and which two of its responses the margin lies between, first minus second.
        seed: for the draws.
        draws: how many.
        level: the share of draws whose error is at most the one that comes back.
    """
    margin = _vector(margins, "margins")
    _same_length(margins=margin, which=np.asarray(which)[:, 0])
    first = [(ranking, left) for ranking, left, _ in which]
    second = [(ranking, right) for ranking, _, right in which]
    place = {response: at for at, response in enumerate(dict.fromkeys([*first, *second]))}
    left_N, right_N = ([place[response] for response in side] for side in (first, second))
    confidence, _ = confidence_and_correctness(margin)
    rng, errors = np.random.default_rng(seed), []
    for _ in range(draws):
        noise = rng.gumbel(size=len(place))
        lead = np.sign(margin) * (margin + noise[left_N] - noise[right_N])  # above 0 where the claim comes true
        errors.append(expected_calibration_error(confidence, (np.sign(lead) + 1) / 2))
    return float(np.quantile(errors, level))


def fit_temperature(margins: ArrayLike, outcomes: ArrayLike, *, low: float = 0.05, high: float = 20.0) -> float:
    """The temperature T at which σ(margin / T) fits the outcomes best.

        T̂ = argmin_T Σ −y·log σ(m/T) − (1 − y)·log σ(−m/T),        T ∈ [low, high]

    Above 1 the scorer was over-confident. It changes no ranking. Where every pair is right the best T is 0 and `low`
    comes back; where the scorer is worse than chance, `high`. Fit it on other pairs than those reported on.
    Guo et al. 2017, §4.2, https://arxiv.org/abs/1706.04599

    Args:
        margins: (N,) score differences, first minus second.
        outcomes: (N,) in [0, 1]; 1 where the first is preferred, ½ for a tie.
        low, high: bounds of T; the search runs over log T.
    """
    margin, outcome = _vector(margins, "margins"), _vector(outcomes, "outcomes")
    _same_length(margins=margin, outcomes=outcome)
    _in_unit_interval(outcomes=outcome)
    if not 0 < low < high:
        raise ValueError(f"temperature bounds are {low} and {high}; expected 0 < low < high")

    def negative_log_likelihood(log_temperature: float) -> float:
        scaled = margin / np.exp(log_temperature)
        return float(np.mean(outcome * np.logaddexp(0, -scaled) + (1 - outcome) * np.logaddexp(0, scaled)))

    # −log-likelihood is convex in 1/T, hence has one minimum in log T too: a bounded scalar search finds it
    found = minimize_scalar(
        negative_log_likelihood, bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-10}
    )
    candidates = [float(found.x), float(np.log(low)), float(np.log(high))]  # the search never tries its bounds
    return float(np.exp(min(candidates, key=negative_log_likelihood)))


def accuracy_by_length_difference(
    margins: ArrayLike, length_differences: ArrayLike, outcomes: ArrayLike, *, quantiles: int = 5
) -> list[LengthBin]:
    """Accuracy of a scorer in bins of (preferred minus rejected) length, each with about as many pairs.

    A scorer that counts words is right on the right and wrong on the left. A margin of 0 counts half. Pairs that
    are ties (outcome ½) have no right answer and are left out. Equal differences always share a bin, so there can
    be fewer bins than asked for.

    Args:
        margins: (N,) score of the first minus score of the second.
        length_differences: (N,) length of the first minus length of the second.
        outcomes: (N,) 1 where the first is preferred, 0 where the second is.
        quantiles: number of bins.
    """
    margin, difference = _vector(margins, "margins"), _vector(length_differences, "length_differences")
    outcome = _vector(outcomes, "outcomes")
    _same_length(margins=margin, length_differences=difference, outcomes=outcome)
    _in_unit_interval(outcomes=outcome)
    if quantiles < 1:
        raise ValueError(f"quantiles is {quantiles}; expected 1 or more")
    preferred = np.sign(2 * outcome - 1)  # +1 first, −1 second, 0 tie: turns both columns to "preferred minus rejected"
    kept = preferred != 0
    if not kept.any():
        return []
    right = (np.sign(margin * preferred)[kept] + 1) / 2
    longer = (difference * preferred)[kept]
    inner = np.unique(np.quantile(longer, np.arange(1, quantiles) / quantiles, method="lower"))
    index = np.searchsorted(inner, longer, side="left")  # a bin holds the differences up to and with its upper edge
    return [
        LengthBin(
            low=float(longer[index == b].min()),
            high=float(longer[index == b].max()),
            accuracy=float(right[index == b].mean()),
            pairs=int((index == b).sum()),
        )
        for b in np.unique(index).tolist()
    ]


def distinct_n(texts: Sequence[str] | Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts together: 1 repeats nothing, near 0 repeats everything.

    Falls as the amount of text grows, so compare equal numbers of responses, and mind their length.
    Li et al. 2016, §5.1, https://arxiv.org/abs/1510.03055

    Args:
        texts: strings, lower-cased and split at white space; or token lists, taken as they are.
        n: length of the n-grams; they never reach over the end of a text.

    Returns:
        0 where no text has n tokens.
    """
    if n < 1:
        raise ValueError(f"n is {n}; expected 1 or more")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for text in texts:
        tokens: Sequence[Hashable] = text.lower().split() if isinstance(text, str) else text
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def kendall_tau(ranks_a: ArrayLike, ranks_b: ArrayLike) -> float:
    """Agreement of two rankings of the same things, Kendall's τ-b: 1 the same, −1 reversed, 0 unrelated.

        τ_b = (C − D) / √((n₀ − T_a)(n₀ − T_b))

    C and D pairs in agreeing and disagreeing order, n₀ all pairs, T pairs tied in one ranking.
    Kendall 1945, https://doi.org/10.1093/biomet/33.3.239

    Returns:
        NaN where one ranking ties everything: it then says nothing that could agree.
    """
    a, b = _vector(ranks_a, "ranks_a"), _vector(ranks_b, "ranks_b")
    _same_length(ranks_a=a, ranks_b=b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(kendalltau(a, b, variant="b").statistic)


def _rates_at_zero(won: Array, feature: Array, weights_RN: Array, ridge: float) -> Array:
    """(R,) σ(β̂₀) of R logistic regressions on [1, feature] with a ridge, one for each row of weights.

        g = Xᵀ w(σ(Xβ) − y) + ridge·β        H = Xᵀ w σ′(Xβ) X + ridge·I        β ← β − H⁻¹g

    Newton's step can raise the loss where data are separable. It is then shortened to ln(1 + d) / d of itself, which
    lowers the loss wherever it is; d = max |X H⁻¹g| over the rows that weigh something.
    Sun & Tran-Dinh 2019, https://arxiv.org/abs/1703.04599
    """

    def loss(zero_R: Array, one_R: Array) -> Array:
        logits_RN = zero_R[:, None] + one_R[:, None] * feature
        likelihood_RN = won * logits_RN - np.logaddexp(0, logits_RN)
        return 0.5 * ridge * (zero_R**2 + one_R**2) - (weights_RN * likelihood_RN).sum(1)

    zero_R, one_R = np.zeros((2, len(weights_RN)))
    for _ in range(NEWTON_STEPS):
        odds_RN = _sigmoid(zero_R[:, None] + one_R[:, None] * feature)
        error_RN, curve_RN = weights_RN * (odds_RN - won), weights_RN * odds_RN * (1 - odds_RN)
        # Around the mean x̄ by these weights H is diagonal and a sum of positive terms: nothing cancels.
        total_R = curve_RN.sum(1) + ridge
        mean_R = curve_RN @ feature / total_R
        offset_RN = feature - mean_R[:, None]
        spread_R = (curve_RN * offset_RN**2).sum(1) + ridge * (1 + mean_R**2)
        slope_R = error_RN.sum(1) + ridge * zero_R
        tilt_R = (error_RN * offset_RN).sum(1) + ridge * (one_R - mean_R * zero_R)
        step_one_R = tilt_R / spread_R
        step_zero_R = slope_R / total_R - mean_R * step_one_R
        before_R = loss(zero_R, one_R)
        too_far_R = loss(zero_R - step_zero_R, one_R - step_one_R) > before_R * (1 + 1e-12)  # but for rounding
        moves_RN = (step_zero_R[:, None] + step_one_R[:, None] * feature) * (weights_RN > 0)
        reach_R = np.maximum(np.abs(moves_RN).max(1), 1e-300)
        share_R = np.where(too_far_R, np.log1p(reach_R) / reach_R, 1.0)
        zero_R, one_R = zero_R - share_R * step_zero_R, one_R - share_R * step_one_R
        left = float((slope_R**2 / total_R + tilt_R**2 / spread_R).max())  # gᵀH⁻¹g, twice what the loss can still fall
        if left < 1e-16:
            break
    else:
        raise AssertionError(f"{NEWTON_STEPS} of Newton's steps were not enough: {left:g} is left")
    return _sigmoid(zero_R)


def _sigmoid(x: ArrayLike) -> Array:
    # exp of a non-positive number never overflows
    return np.asarray(np.exp(-np.logaddexp(0, -np.asarray(x, dtype=np.float64))))


def _cluster_sums(values_by_prompt: Sequence[Sequence[float]]) -> tuple[Array, Array]:
    if not len(values_by_prompt):
        raise ValueError("found no prompts; expected one sequence of values a prompt")
    groups = [_vector(values, f"the values of prompt {i}") for i, values in enumerate(values_by_prompt)]
    return np.array([group.sum() for group in groups]), np.array([float(len(group)) for group in groups])


def _check_bootstrap(samples: int, level: float) -> None:
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected 1 or more")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share such as 0.95")


def _percentiles(estimates: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _index_of(prompts: Sequence[Hashable]) -> dict[Hashable, int]:
    return {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}


def _checked_wins(wins: ArrayLike, prompts: int) -> Array:
    won = _vector(wins, "wins")
    if len(won) != prompts:
        raise ValueError(f"wins has {len(won)} entries and prompts {prompts}; expected the same number")
    _in_unit_interval(wins=won)
    return won


def _vector(values: ArrayLike, name: str) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} has shape {vector.shape}; expected (N,) with N ≥ 1")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(vector)).sum())} entries that are no finite numbers")
    return vector


def _same_length(**vectors: Array) -> None:
    if len({len(vector) for vector in vectors.values()}) > 1:
        found = ", ".join(f"{name} {len(vector)}" for name, vector in vectors.items())
        raise ValueError(f"lengths differ: {found}")


def _in_unit_interval(**vectors: Array) -> None:
    for name, vector in vectors.items():
        if vector.min() < 0 or vector.max() > 1:
            raise ValueError(f"{name} lies in [{vector.min():g}, {vector.max():g}]; expected [0, 1]")
