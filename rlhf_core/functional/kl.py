"""How far the policy has moved from its reference, and the coefficient that prices it.

The estimators are per entry and know no mask: put a number under the mask's False entries before, or average with
`masked_mean` where no gradient is wanted.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlhf_core.functional.masks import require_same_shape

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: Estimator) -> Tensor:
    """Estimate KL(π ‖ π_ref) at each token sampled from π.

        k1 = log π − log π_ref          k2 = k1² / 2          k3 = exp(−k1) − 1 + k1

    k1 is unbiased, k3 too and never negative; k2 has low variance and a small bias.
    Schulman 2020, http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: any shape, float, nats. Under the policy.
        ref_logprobs: the same shape. Under the reference.
        estimator: "k1", "k2" or "k3".

    Returns:
        The same shape and dtype, nats.

    Raises:
        ValueError: the shapes differ, or there is no such estimator.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return (-log_ratio).expm1() + log_ratio  # expm1: near ratio 1, exp(x) − 1 has no digits left
    raise ValueError(f"expected estimator k1, k2 or k3; found {estimator!r}")


class AdaptiveKL:
    """A KL coefficient steered so that the KL stays near a target.

        coef ← coef · (1 + clip(kl / target − 1, −0.2, 0.2) · n / horizon)

    Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593. An update of five horizons or more can turn the
    coefficient negative: keep n well under the horizon.

    Args:
        initial: the coefficient to begin with, 0 or more, reward units a nat; `.coef` is the one that holds now.
        target: nats a sequence, above 0.
        horizon: sequences over which the controller acts, above 0.

    Raises:
        ValueError: target or horizon is not above 0, or initial is negative.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        if not (initial >= 0 and target > 0 and horizon > 0):
            raise ValueError(
                f"expected initial >= 0, target > 0 and horizon > 0; found initial {initial}, target {target}, "
                f"horizon {horizon}"
            )
        self.coef = initial
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move the coefficient after n sequences whose mean KL was `kl` nats; raises ValueError for NaN."""
        if math.isnan(kl):
            raise ValueError("expected kl in nats a sequence; found nan")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon


@dataclass
class FixedKL:
    """A KL coefficient that stays as it is, in the place of `AdaptiveKL`."""

    coef: float

    def update(self, kl: float, n: int) -> None:
        """Change nothing."""
