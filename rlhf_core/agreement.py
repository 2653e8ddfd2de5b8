"""What people's judgements tell: how far annotators agree, what they lean to, and when there are enough judgements.

Pure: plain numbers and numpy arrays in, plain numbers out; randomness comes from a seed that is passed in.
Leaves out where judgements come from, and any correction for an annotator who is found wanting.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from rlhf_core.statistics import Interval

Array = NDArray[np.float64]
Metric = Literal["nominal", "ordinal", "interval"]

# The bets of the sequential test: one on each whole percent, with the more money the nearer it is to 50 %, since that
# is where two policies worth comparing are found. Any stakes that sum to 1 keep the guarantee; these decide the power.
BETS = np.arange(1, 100) / 100
STAKES = np.minimum(BETS, 1 - BETS) / 25


class Table(NamedTuple):
    """Ratings as a matrix: a row an annotator, a column an item, NaN where there is none."""

    annotators: list[Hashable]
    items: list[Hashable]
    ratings_AI: Array


class Pair(NamedTuple):
    """Agreement of two annotators, given by their rows, on the items that both rated."""

    first: int
    second: int
    items: int
    share: float
    kappa: float


class Bias(NamedTuple):
    """How often an annotator chose one kind of answer, and out of how many judgements."""

    share: Interval
    judgements: int


class Verdict(NamedTuple):
    """What the outcomes so far tell about a win rate, however often they were looked at before."""

    judged: int
    win_rate: Interval
    e_value: float
    p_value: float
    enough: bool


def table(judgements: Sequence[tuple[Hashable, Hashable, float]]) -> Table:
    """Turn rows of (annotator, item, rating) into a matrix, annotators and items in order of appearance.

    Raises:
        ValueError: there is no judgement, or an annotator rated an item twice.
    """
    if not judgements:
        raise ValueError("found no judgements; expected rows of (annotator, item, rating)")
    row = {annotator: i for i, annotator in enumerate(dict.fromkeys(one[0] for one in judgements))}
    column = {item: i for i, item in enumerate(dict.fromkeys(one[1] for one in judgements))}
    ratings_AI = np.full((len(row), len(column)), np.nan)
    for annotator, item, rating in judgements:
        if not np.isnan(ratings_AI[row[annotator], column[item]]):
            raise ValueError(f"{annotator} rated {item} twice; expected one rating, such as the last or the mean")
        ratings_AI[row[annotator], column[item]] = rating
    return Table(list(row), list(column), ratings_AI)


def krippendorff_alpha(
    ratings_AI: ArrayLike,
    *,
    metric: Metric,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Krippendorff's α: 1 all agree, 0 as chance would, below 0 they contradict one another.

        α = 1 − D_o / D_e = 1 − (n − 1) · Σ_ck o_ck δ²_ck / Σ_ck n_c n_k δ²_ck
        o_ck = Σ_u (ordered pairs of ratings c, k of item u) / (m_u − 1)        n_c = Σ_k o_ck        n = Σ_c n_c

    δ² is [c ≠ k] nominal, (Σ_{g=c…k} n_g − (n_c + n_k)/2)² ordinal, (c − k)² interval. m_u is the number of ratings of
    item u; an item with fewer than two says nothing and is left out. The interval is a bootstrap over items: all its
    ratings are drawn together. The percentiles lie further out than (1 ± level)/2, at Φ(±√(I/(I − 1)) · t_{I−1}), as
    resamples of few items spread too little. Resamples in which all ratings are equal have no α and are left out. With
    fewer than 50 items it is too narrow all the same (docs/agreement.md).
    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections A to D,
    https://repository.upenn.edu/asc_papers/43; Hesterberg 2015 for the percentiles,
    https://doi.org/10.1080/00031305.2015.1089789

    Args:
        ratings_AI: (A, I) any finite numbers, NaN where annotator a did not rate item i.
        metric: what a disagreement weighs: nominal for labels, ordinal for ranks, interval for amounts.
        clusters: (I,) which items are drawn together, such as the responses of one prompt; each by itself if None.
        samples, seed, level: as `rlhf_core.statistics.cluster_bootstrap`.

    Returns:
        NaN where all ratings are equal: agreement and chance cannot be told apart.

    Raises:
        ValueError: the matrix is no matrix, no item has two ratings, metric is unknown, or clusters are
            not one an item.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric is {metric}; expected one of {', '.join(get_args(Metric))}")
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected 1 or more")
    _check_level(level)
    ratings = _matrix(ratings_AI)
    if clusters is not None and len(clusters) != ratings.shape[1]:
        raise ValueError(f"clusters has {len(clusters)} entries; expected {ratings.shape[1]}, one an item")
    kept_I, values, counts_IV = _pairable_counts(ratings)
    pairs_IVV = counts_IV[:, :, None] * (counts_IV[:, None, :] - np.eye(len(values)))
    coincidences_IVV = pairs_IVV / (counts_IV.sum(axis=1) - 1)[:, None, None]
    alpha = float(_alpha(coincidences_IVV.sum(axis=0), values, metric))

    if clusters is not None:
        _, cluster_I = np.unique([str(clusters[item]) for item in kept_I], return_inverse=True)
        by_cluster = np.zeros((cluster_I.max() + 1, len(values), len(values)))
        np.add.at(by_cluster, cluster_I, coincidences_IVV)
        coincidences_IVV = by_cluster
    items = len(coincidences_IVV)
    times_SI = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=samples)
    resampled_SVV = np.tensordot(times_SI, coincidences_IVV, axes=1)
    alphas = _alpha(resampled_SVV, values, metric)
    alphas = alphas[np.isfinite(alphas)]
    if not len(alphas):
        return Interval(alpha, float("nan"), float("nan"))
    low, high = np.quantile(alphas, _expanded(items, level))
    return Interval(alpha, float(low), float(high))


def pairwise_agreement(ratings_AI: ArrayLike) -> list[Pair]:
    """Share of equal ratings and Cohen's κ of each two annotators; those without a common item are left out.

        κ = (p_o − p_e) / (1 − p_e)        p_e = Σ_k p_ak p_bk

    p_o is the share, p_ak how often a gave rating k on the common items. Ratings are labels here, with no order.
    Cohen 1960, eq. 1, https://doi.org/10.1177/001316446002000104

    Args:
        ratings_AI: (A, I) as `krippendorff_alpha`.

    Returns:
        κ is NaN where both gave one and the same rating throughout.
    """
    ratings = _matrix(ratings_AI)
    pairs = []
    for a, b in combinations(range(len(ratings)), 2):
        common = ~np.isnan(ratings[a]) & ~np.isnan(ratings[b])
        if not common.any():
            continue
        one, other = ratings[a, common], ratings[b, common]
        share = float(np.mean(one == other))
        chance = float(sum(np.mean(one == value) * np.mean(other == value) for value in np.unique(one)))
        kappa = (share - chance) / (1 - chance) if chance < 1 else float("nan")
        pairs.append(Pair(a, b, int(common.sum()), share, kappa))
    return pairs


def wilson(successes: float, trials: int, *, level: float = 0.95) -> Interval:
    """A share with Wilson's score interval.

        (k + z²/2 ± z · √(k(n − k)/n + z²/4)) / (n + z²)        z = Φ⁻¹((1 + level) / 2)

    Covers about `level` on average over shares, a little more or less for any one; it never leaves [0, 1].
    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Brown, Cai & DasGupta 2001, eq. 4,
    https://doi.org/10.1214/ss/1009213286

    Args:
        successes, trials: k of n independent trials; k may have halves, such as ties.

    Returns:
        Mean NaN between 0 and 1 where there is no trial.

    Raises:
        ValueError: successes lie outside [0, trials], or level is not inside (0, 1).
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"found {successes} successes in {trials} trials; expected 0 to {trials}")
    _check_level(level)
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0)
    return _wilson(successes / trials, trials, level)


def _wilson(share: float, trials: float, level: float) -> Interval:
    _check_level(level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = share * trials + z * z / 2
    reach = z * float(np.sqrt(share * (1 - share) * trials + z * z / 4))
    low, high = (centre - reach) / (trials + z * z), (centre + reach) / (trials + z * z)
    return Interval(share, max(0.0, low), min(1.0, high))  # at 0 and n they miss the end by rounding


def mean_interval(outcomes: ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of outcomes between 0 and 1, such as prompts of which some are tied, with Wilson's interval.

        wilson(p · n_e, n_e)        n_e = n · p(1 − p)(n + 2) / (n s² + 2 p(1 − p))        s² = Σ (x_i − p)² / n

    n_e is how many outcomes that are all won or lost would tell as much: Kish's effective sample size, with two such
    outcomes put in, so that n_e stays finite. Where all are 0 or 1 it is n, and the interval is `wilson`'s. Ties tell
    more than that, and the interval is narrower; counted as halves in `wilson` they would make one of 95 % hold the
    truth in 98 %.
    Kish 1965, Survey Sampling, §8.2; Korn & Graubard 1998, Survey Methodology 24, p. 193, for its use in an interval.

    Args:
        outcomes: (N,) in [0, 1], independent: one a prompt, the mean where a prompt was judged more than once.

    Returns:
        Mean NaN between 0 and 1 where there is none.
    """
    won = _checked_outcomes(outcomes)
    number = won.size
    if not number:
        return Interval(float("nan"), 0.0, 1.0)
    mean = float(won.mean())
    binary = mean * (1 - mean)
    effective = number * binary * (number + 2) / (number * float(won.var()) + 2 * binary) if binary > 0 else number
    _, low, high = _wilson(mean, effective, level)
    return Interval(mean, low, high)


def side_bias(choices: ArrayLike, annotators: Sequence[Hashable], *, level: float = 0.95) -> dict[Hashable, Bias]:
    """How often each annotator chose the left answer, ties left out, with `wilson`'s interval.

    0.5 is expected where a coin decides which answer stands on the left. Where it does not, a share says nothing of
    the annotator.

    Args:
        choices: (N,) 1 left, 0 right, 0.5 tie.
        annotators: (N,) who chose.
        level: of the interval.

    Raises:
        ValueError: a choice is another number, or lengths differ.
    """
    chosen = _checked_choices(choices, annotators)
    return _shares(chosen == 1, chosen != 0.5, annotators, level)


def length_bias(
    choices: ArrayLike, length_differences: ArrayLike, annotators: Sequence[Hashable], *, level: float = 0.95
) -> dict[Hashable, Bias]:
    """How often each annotator chose the longer answer, ties and equal lengths left out, with `wilson`'s interval.

    A share above 0.5 is no fault by itself, since a longer answer can be the better one. Compare annotators: on like
    items, one who stands apart from the others counts words.

    Args:
        choices: (N,) 1 left, 0 right, 0.5 tie.
        length_differences: (N,) length of the left answer minus that of the right, any unit.
        annotators: (N,) who chose.
        level: of the interval.

    Raises:
        ValueError: a choice is another number, a difference is not finite, or lengths differ.
    """
    chosen = _checked_choices(choices, annotators)
    difference = np.asarray(length_differences, dtype=np.float64)
    if difference.shape != chosen.shape or not np.isfinite(difference).all():
        raise ValueError(f"length_differences has shape {difference.shape}; expected {chosen.shape}, all finite")
    return _shares((chosen == 1) == (difference > 0), (chosen != 0.5) & (difference != 0), annotators, level)


def completed_prompts(
    outcomes: ArrayLike, prompts: Sequence[Hashable], *, judgements: int | Mapping[Hashable, int]
) -> Array:
    """The mean outcome of each prompt that has all its judgements, in the order in which prompts were completed.

    Judgements of one prompt resemble each other, and the sequential test must not count them as news each time. Feed
    it these means instead. Fix the number beforehand: if prompts were closed early because of what was judged, the
    guarantee would be gone. Judgements beyond it are left out, and so are prompts that still lack some.

    Args:
        outcomes: (N,) in [0, 1], in the order in which they were judged.
        prompts: (N,) which prompt each belongs to.
        judgements: how many each prompt gets, one number for all or one each.

    Returns:
        (P,) means, ready for `judged_so_far`.
    """
    won = _checked_outcomes(outcomes)
    if won.shape != (len(prompts),):
        raise ValueError(f"outcomes has shape {won.shape} and prompts {len(prompts)} entries; expected the same number")
    each = judgements if isinstance(judgements, Mapping) else dict.fromkeys(prompts, judgements)
    fewest = min(each.values()) if isinstance(judgements, Mapping) else judgements
    if fewest < 1 or not each.keys() >= set(prompts):
        raise ValueError(f"judgements is {judgements}; expected 1 or more, for every prompt")
    collected: dict[Hashable, list[float]] = {}
    means = []
    for outcome, prompt in zip(won.tolist(), prompts, strict=True):
        seen = collected.setdefault(prompt, [])
        seen.append(outcome)
        if len(seen) == each[prompt]:
            means.append(sum(seen) / len(seen))
    return np.array(means)


def log_e_values(outcomes_RT: ArrayLike, *, mean: float = 0.5) -> Array:
    """Log evidence against a win rate of m after each outcome: log of a gambler's capital in a game that is fair at m.

        K_t(m) = Σ_p w_p ∏_{i≤t} (x_i · p/m + (1 − x_i) · (1 − p)/(1 − m))

    The gambler begins with 1, split among bets p; a win multiplies the money on p by p/m, a loss by (1 − p)/(1 − m),
    a tie by the mean of the two. With λ = (p − m) / (m(1 − m)) a factor is 1 + λ(x_i − m), so K is a non-negative
    martingale if E[x_i | past] = m, and by Ville's inequality P(K_t ≥ 1/α at any t) ≤ α, exactly and for every T.
    Where outcomes are 0 or 1 it is the ratio of a mixture of binomial likelihoods to that at m.
    Waudby-Smith & Ramdas 2024, §4, the capital process, and supplement B, bets mixed,
    https://doi.org/10.1093/jrsssb/qkad009

    Args:
        outcomes_RT: (…, T) in [0, 1], in order along the last axis; leading axes are separate runs.
        mean: m, inside (0, 1).

    Returns:
        (…, T) log K.
    """
    outcomes = _checked_outcomes(outcomes_RT)
    if not 0 < mean < 1:
        raise ValueError(f"mean is {mean}; expected a share inside (0, 1)")
    on_win, on_loss = BETS / mean, (1 - BETS) / (1 - mean)
    shares = STAKES
    growth = np.empty_like(outcomes)
    for t in range(outcomes.shape[-1]):
        won = outcomes[..., t, None]
        shares = shares * (won * on_win + (1 - won) * on_loss)
        growth[..., t] = shares.sum(axis=-1)
        shares = shares / growth[..., t, None]  # how the capital is split now; its size is kept apart, as a log
    return np.asarray(np.cumsum(np.log(growth), axis=-1))


def judged_so_far(outcomes: ArrayLike, *, level: float = 0.95, width: float | None = None) -> Verdict:
    """What the outcomes tell so far, valid after every judgement: look as often as you like, stop when it says enough.

        interval {m : K_t(m) < 1/α}        e = K_t(½)        p = min(1, 1 / max_{s≤t} K_s(½))        α = 1 − level

    P(the truth is inside all intervals at once) ≥ level, so the share of judgings that stop with the truth outside is
    α at most, whatever the rule. Each factor of K is log-convex in m, so the set is an interval; it holds the mean of
    the outcomes. `enough` is said when the interval excludes ½, or is at most `width` wide.
    Waudby-Smith & Ramdas 2024, §4, https://doi.org/10.1093/jrsssb/qkad009; `log_e_values` has K.

    It assumes that each outcome, given those before it, has the same expectation: prompts drawn at random, the side of
    each answer by a coin, the next prompt not chosen by what came out so far. Where a prompt is judged more than once
    that fails; pass `completed_prompts`, which makes the prompt the unit.

    Args:
        outcomes: (T,) in the order in which they were judged: 1 won, 0.5 tie, 0 lost, or a prompt's mean.
        level: of the interval; 1 − level is the chance of ever calling equal policies different.
        width: stop too when the interval is at most this wide, such as 0.1; None for never.

    Returns:
        e and the interval do not depend on the order, p does. Where nothing was judged yet the interval is [0, 1].
        e is cut at e^700.

    Raises:
        ValueError: an outcome lies outside [0, 1], or level is not inside (0, 1).
    """
    won = _checked_outcomes(outcomes)
    if won.ndim != 1:
        raise ValueError(f"outcomes has shape {won.shape}; expected (T,)")
    _check_level(level)
    if not len(won):
        return Verdict(0, Interval(float("nan"), 0.0, 1.0), 1.0, 1.0, False)
    mean = float(won.mean())
    low, high = (_interval_end(won, mean, end, np.log(1 / (1 - level))) for end in (0.0, 1.0))
    evidence = log_e_values(won)
    return Verdict(
        judged=len(won),
        win_rate=Interval(mean, low, high),
        e_value=float(np.exp(min(evidence[-1], 700))),
        p_value=float(np.exp(min(0.0, -evidence.max()))),
        enough=low > 0.5 or high < 0.5 or (width is not None and high - low <= width),
    )


def _interval_end(won: Array, inside: float, outside: float, threshold: float) -> float:
    """Where log K_t(m) crosses the threshold between the mean and an end of [0, 1]; on the far side of it."""
    if inside == outside:
        return outside
    outcome, times = np.unique(won, return_counts=True)

    def log_capital(m: float) -> float:
        factors = outcome[:, None] * BETS / m + (1 - outcome[:, None]) * (1 - BETS) / (1 - m)
        return float(np.logaddexp.reduce(np.log(STAKES) + times @ np.log(factors)))

    while abs(outside - inside) > 1e-13:
        middle = (inside + outside) / 2
        if log_capital(middle) < threshold:
            inside = middle
        else:
            outside = middle
    return outside


def _pairable_counts(ratings_AI: Array) -> tuple[NDArray[np.intp], Array, Array]:
    """Which items have two ratings or more, the values that occur in them, and how often each item got each."""
    kept_I = np.flatnonzero((~np.isnan(ratings_AI)).sum(axis=0) >= 2)
    kept = ratings_AI[:, kept_I]
    if not kept.size:
        raise ValueError("found no item with two ratings; agreement needs some")
    values = np.unique(kept[~np.isnan(kept)])
    return kept_I, values, (kept[:, :, None] == values).sum(axis=0).astype(np.float64)


def _alpha(coincidences_VV: Array, values: Array, metric: Metric) -> Array:
    """α of coincidences (…, V, V); NaN where only one value occurs."""
    n_V = coincidences_VV.sum(axis=-1)
    # The ordinal distance is that between mid-ranks: Σ_{g=c…k} n_g − (n_c + n_k)/2 = (C_k − n_k/2) − (C_c − n_c/2),
    # C the running sum of n.
    place_V = np.cumsum(n_V, axis=-1) - n_V / 2 if metric == "ordinal" else np.broadcast_to(values, n_V.shape)
    distance_VV = place_V[..., :, None] - place_V[..., None, :]
    squared_VV = (distance_VV != 0).astype(np.float64) if metric == "nominal" else distance_VV**2
    observed = (coincidences_VV * squared_VV).sum(axis=(-2, -1))
    expected = (n_V[..., :, None] * n_V[..., None, :] * squared_VV).sum(axis=(-2, -1)) / (n_V.sum(axis=-1) - 1)
    ratio = np.divide(observed, expected, out=np.full_like(expected, np.nan), where=expected > 0)
    return np.asarray(1 - ratio)


def _shares(
    hit: NDArray[np.bool_], counts: NDArray[np.bool_], annotators: Sequence[Hashable], level: float
) -> dict[Hashable, Bias]:
    found: dict[Hashable, Bias] = {}
    for annotator in dict.fromkeys(annotators):
        own = counts & np.array([one == annotator for one in annotators])
        found[annotator] = Bias(wilson(int((hit & own).sum()), int(own.sum()), level=level), int(own.sum()))
    return found


def _expanded(number: int, level: float) -> tuple[float, float]:
    """Percentiles of a bootstrap over so many, for an interval as wide as Student's."""
    if number < 2:
        return 0.0, 1.0
    outer = NormalDist().cdf(float(np.sqrt(number / (number - 1)) * stdtrit(number - 1, (1 + level) / 2)))
    return 1 - outer, outer


def _matrix(ratings_AI: ArrayLike) -> Array:
    ratings = np.asarray(ratings_AI, dtype=np.float64)
    if ratings.ndim != 2 or np.isinf(ratings).any():
        raise ValueError(f"ratings have shape {ratings.shape}; expected (annotators, items), finite or NaN for none")
    return ratings


def _checked_choices(choices: ArrayLike, annotators: Sequence[Hashable]) -> Array:
    chosen = np.asarray(choices, dtype=np.float64)
    if chosen.shape != (len(annotators),):
        raise ValueError(f"choices has shape {chosen.shape} and annotators {len(annotators)} entries; expected as many")
    if not np.isin(chosen, (0, 0.5, 1)).all():
        raise ValueError("choices holds other numbers than 1 (left), 0 (right) and 0.5 (tie)")
    return chosen


def _checked_outcomes(outcomes: ArrayLike) -> Array:
    won = np.asarray(outcomes, dtype=np.float64)
    if not ((won >= 0) & (won <= 1)).all():  # NaN fails too
        raise ValueError("outcomes holds numbers outside [0, 1]; expected 1 won, 0.5 tie, 0 lost, or means of these")
    return won


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share such as 0.95")
