"""The public maths: tensors and plain numbers in, tensors out. No config, files, devices or hidden randomness."""

from rlhf_core.functional.kl import AdaptiveKL, FixedKL, kl_estimate
from rlhf_core.functional.logprobs import entropy, token_logprobs
from rlhf_core.functional.losses import (
    PolicyLoss,
    ValueLoss,
    dpo_loss,
    pairwise_loss,
    plackett_luce_loss,
    policy_loss,
    ranking_loss,
    value_loss,
)
from rlhf_core.functional.masks import first_true_index, masked_mean, masked_var, truncate_at_stop, whiten
from rlhf_core.functional.objectives import (
    CostMultiplier,
    constrained_advantages,
    lexicographic_scores,
    weighted_scores,
)
from rlhf_core.functional.returns import Returns, RunningMoments, gae, shape_rewards

__all__ = [
    "AdaptiveKL",
    "CostMultiplier",
    "FixedKL",
    "PolicyLoss",
    "Returns",
    "RunningMoments",
    "ValueLoss",
    "constrained_advantages",
    "dpo_loss",
    "entropy",
    "first_true_index",
    "gae",
    "kl_estimate",
    "lexicographic_scores",
    "masked_mean",
    "masked_var",
    "pairwise_loss",
    "plackett_luce_loss",
    "policy_loss",
    "ranking_loss",
    "shape_rewards",
    "token_logprobs",
    "truncate_at_stop",
    "value_loss",
    "weighted_scores",
    "whiten",
]
