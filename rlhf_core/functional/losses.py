"""The losses of reward modelling, PPO and DPO.

A loss is the mean over True entries, or their sum divided by `token_count` where that is given: accumulated and
multi-process batches then weigh every token the same. No batch, and no True entry, gives 0 with gradients of 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.functional.masks import describe_shapes, masked_mean, require_same_shape, zero_masked


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: scalars, of which only the loss carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor


class ValueLoss(NamedTuple):
    """What `value_loss` returns: scalars, of which only the loss carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> Tensor:
    """Bradley–Terry loss of a reward model on pairs.

        L = mean(−log σ(c − r − margin)) + center_coef · mean((c + r)²)

    Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155; margin: Touvron et al. 2023, eq. 2,
    https://arxiv.org/abs/2307.09288; centring: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244

    Args:
        chosen: any shape, float. Scores of the better responses.
        rejected: the same shape. Scores of the worse ones.
        margin: the same shape. By how much the better one ought to win, in score units.
        center_coef: weight of the term that keeps scores around 0.

    Returns:
        A scalar, nats.

    Raises:
        ValueError: the shapes differ.
    """
    if margin is None:
        require_same_shape(chosen=chosen, rejected=rejected)
        lead = chosen - rejected
    else:
        require_same_shape(chosen=chosen, rejected=rejected, margin=margin)
        lead = chosen - rejected - margin
    return _mean(-logsigmoid(lead)) + center_coef * _mean((chosen + rejected).square())


def ranking_loss(
    scores_BK: Tensor,
    mask_BK: Tensor,
    *,
    ranks_BK: Tensor | None = None,
    margins_BKK: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of a reward model on whole rankings.

        d_ij = s_i − s_j − margin_ij
        L = mean over prompts of mean over pairs (i better than j) of −(1 − ε) log σ(d_ij) − ε log σ(−d_ij)

    Ties make no pair. A prompt without a pair says nothing and is left out of the mean.
    Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155; margin: Touvron et al. 2023, eq. 2,
    https://arxiv.org/abs/2307.09288; smoothing: Mitchell 2023, conservative DPO, https://ericmitchell.ai/cdpo.pdf

    Args:
        scores_BK: (B, K) float. Scores of the responses, best first unless `ranks_BK` is given.
        mask_BK: (B, K) bool. True where there is a response.
        ranks_BK: (B, K) int or float. 1 is best, ties share a rank.
        margins_BKK: (B, K, K) float. By how much i ought to lead j, in score units; read where i is better than j.
        label_smoothing: ε in [0, ½), the share of pairs that are judged the wrong way round.

    Returns:
        A scalar, nats.

    Raises:
        ValueError: the shapes differ or are not of two dimensions (three for the margins), or ε is not in [0, ½).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5); found {label_smoothing}")
    ranks_BK = _ranks(scores_BK, mask_BK, ranks_BK, margins_BKK)
    better_BKK = (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & mask_BK[:, :, None] & mask_BK[:, None, :]
    scores_BK = zero_masked(scores_BK, mask_BK)
    lead_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]  # [b, i, j]: by how much i leads j
    if margins_BKK is not None:
        lead_BKK = lead_BKK - zero_masked(margins_BKK, better_BKK)
    each_BKK = -logsigmoid(lead_BKK) + label_smoothing * lead_BKK  # since −log σ(−d) = −log σ(d) + d
    pair_count_B = better_BKK.sum(dim=(1, 2))
    loss_B = zero_masked(each_BKK, better_BKK).sum(dim=(1, 2)) / pair_count_B.clamp(min=1)
    return masked_mean(loss_B, pair_count_B > 0)


def plackett_luce_loss(scores_BK: Tensor, mask_BK: Tensor, *, ranks_BK: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of rankings drawn best first, each from what is left.

        L = mean over prompts of −Σ_i (s_i − log Σ_{j not better than i} exp s_j)

    Each response of a tie is drawn from all that are left, its whole tie among them. A prompt with fewer than two
    responses, or with nothing but ties, says nothing and is left out of the mean.
    Plackett 1975, The analysis of permutations; as a loss: Xia et al. 2008, ListMLE; ties: Breslow 1974, Covariance
    analysis of censored survival data, https://doi.org/10.2307/2529620

    Args:
        scores_BK: (B, K) float. Scores of the responses, best first unless `ranks_BK` is given.
        mask_BK: (B, K) bool. True where there is a response.
        ranks_BK: (B, K) int or float. 1 is best, ties share a rank.

    Returns:
        A scalar, nats a ranking.

    Raises:
        ValueError: the shapes differ or are not of two dimensions.
    """
    ranks_BK = _ranks(scores_BK, mask_BK, ranks_BK)
    there_BKK = mask_BK[:, :, None] & mask_BK[:, None, :]
    left_BKK = (ranks_BK[:, :, None] <= ranks_BK[:, None, :]) & there_BKK  # [b, i, j]: j is left when i is drawn
    lowest = torch.finfo(scores_BK.dtype).min  # finite: −∞ − −∞ would be NaN
    log_total_BK = torch.where(left_BKK, scores_BK[:, None, :], lowest).logsumexp(dim=2)
    loss_B = zero_masked(log_total_BK - scores_BK, mask_BK).sum(dim=1)
    return masked_mean(loss_B, (left_BKK != there_BKK).any(dim=(1, 2)))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    dual_clip: float | None = None,
    token_count: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, as a loss.

        ρ = π / π_old          L = max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))          dual: min(L, −A c) where A < 0

    Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347; dual clip: Ye et al. 2020, eq. 3,
    https://arxiv.org/abs/1912.09729

    Args:
        logprobs: any shape, float, nats. Under the policy that is trained.
        old_logprobs: the same shape. Under the policy that sampled.
        advantages: the same shape.
        mask: the same shape, bool. True for response tokens.
        clip_range: ε.
        dual_clip: c, above 1: bounds the loss of a bad token that became much likelier.
        token_count: what the sum is divided by; the count of True entries if not given.

    Returns:
        `PolicyLoss`: the loss; the share of tokens at which the clipped term is the larger; KL(π_old ‖ π) by k3,
        ρ − 1 − log ρ, nats a token; the mean ratio. The last three are means over this call's True entries, whatever
        `token_count` says.

    Raises:
        ValueError: the shapes differ, or dual_clip is not above 1.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip above 1; found {dual_clip}")
    advantages = zero_masked(advantages, mask)
    log_ratio = zero_masked(logprobs - old_logprobs, mask)
    ceiling = math.log(torch.finfo(log_ratio.dtype).max) / 2  # an infinite ratio makes NaN of a gradient of 0
    log_ratio = log_ratio.clamp(max=ceiling)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    worst = torch.maximum(plain, clipped)
    if dual_clip is not None:
        worst = torch.minimum(worst, advantages.abs() * dual_clip)  # where A > 0, worst is below 0 already
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(ratio.dtype), mask)
        approx_kl = masked_mean(log_ratio.expm1() - log_ratio, mask)
        ratio_mean = masked_mean(ratio, mask)
    return PolicyLoss(_mean_or_share(worst, mask, token_count), clip_fraction, approx_kl, ratio_mean)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float,
    token_count: float | None = None,
) -> ValueLoss:
    """Squared error of the value model, clipped like the policy.

        L = ½ max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²)

    Schulman et al. 2017's own code, https://github.com/openai/baselines (ppo2).

    Args:
        values: any shape, float, reward units. Of the value model that is trained.
        old_values: the same shape. At the time of sampling.
        returns: the same shape. What is to be predicted.
        mask: the same shape, bool. True for response tokens.
        clip_range: ε, reward units.
        token_count: what the sum is divided by; the count of True entries if not given.

    Returns:
        `ValueLoss`: the loss, and the share of tokens at which the clipped square is the larger, a mean over this
        call's True entries.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = (zero_masked(x, mask) for x in (values, old_values, returns))
    plain = (values - returns).square()
    near_old = values.clamp(old_values - clip_range, old_values + clip_range)  # exactly V where V is in reach
    clipped = (near_old - returns).square()
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > plain).to(values.dtype), mask)
    return ValueLoss(_mean_or_share(torch.maximum(plain, clipped) / 2, mask, token_count), clip_fraction)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation.

        d = β ((log π_c − log π_ref,c) − (log π_r − log π_ref,r))          L = mean(−(1 − ε) log σ(d) − ε log σ(−d))

    Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; with ε: Mitchell 2023, conservative DPO,
    https://ericmitchell.ai/cdpo.pdf

    Args:
        policy_chosen, policy_rejected: any shape, float, nats. Log-probabilities of whole responses under the policy.
        ref_chosen, ref_rejected: the same shape. Under the reference.
        beta: β, how dear it is to leave the reference.
        label_smoothing: ε in [0, ½), the share of pairs that are judged the wrong way round.

    Returns:
        A scalar, nats.

    Raises:
        ValueError: the shapes differ, or ε is not in [0, ½).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"expected label_smoothing in [0, 0.5); found {label_smoothing}")
    require_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    lead = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    return _mean(-logsigmoid(lead) + label_smoothing * lead)  # since −log σ(−d) = −log σ(d) + d


def _ranks(scores_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None, margins_BKK: Tensor | None = None) -> Tensor:
    """The ranks, or those of responses that stand best first; raises ValueError for a wrong shape of any argument."""
    same = scores_BK.shape == mask_BK.shape == (scores_BK if ranks_BK is None else ranks_BK).shape
    square = margins_BKK is None or margins_BKK.shape == (*scores_BK.shape, *scores_BK.shape[1:])
    if not (same and square and scores_BK.dim() == 2):
        raise ValueError(
            "expected one shape of 2 dimensions for all, but (B, K, K) for margins; found "
            + describe_shapes(scores_BK=scores_BK, mask_BK=mask_BK, ranks_BK=ranks_BK, margins_BKK=margins_BKK)
        )
    if ranks_BK is not None:
        return ranks_BK
    return torch.arange(scores_BK.shape[1], device=scores_BK.device).expand_as(scores_BK)


def _mean(values: Tensor) -> Tensor:
    """Mean of all entries, 0 where there are none."""
    return values.sum() / max(values.numel(), 1)


def _mean_or_share(values: Tensor, mask: Tensor, token_count: float | None) -> Tensor:
    """Mean of values that are 0 under a False, or their sum over the count of a batch that these are a part of."""
    return values.sum() / (mask.sum().clamp(min=1) if token_count is None else max(token_count, 1))
