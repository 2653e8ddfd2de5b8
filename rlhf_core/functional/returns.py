"""From scores of whole responses to a reward, an advantage and a return for each token.

Whitening is the caller's: it takes the whole rollout batch, not one minibatch.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional.masks import describe_shapes, require_same_shape, zero_masked


@dataclass
class RunningMoments:
    """Mean and variance of all numbers seen so far, as if they had come at once.

        n = n_a + n_b          δ = mean_b − mean_a          mean = mean_a + δ n_b / n
        M = M_a + M_b + δ² n_a n_b / n          std = √(M / n), and 1 while that is 0

    Chan, Golub & LeVeque 1983, eq. 1.5, https://doi.org/10.1080/00031305.1983.10483115
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # M, the sum of squared differences from the mean

    def update(self, values_N: Tensor) -> None:
        """Take in some more numbers; raises ValueError where one is not finite, and then takes in none."""
        values_N = values_N.double()
        if not values_N.isfinite().all():
            raise ValueError("expected finite numbers; found " + str(values_N[~values_N.isfinite()][0].item()))
        if not values_N.numel():
            return
        count, mean = values_N.numel(), values_N.mean().item()
        squares = (values_N - mean).square().sum().item()
        total, apart = self.count + count, mean - self.mean
        self.squares += squares + apart**2 * self.count * count / total
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 1 where nothing varies yet, so that dividing by it changes nothing."""
        return math.sqrt(self.squares / self.count) if self.squares > 0 else 1.0


class Returns(NamedTuple):
    """What `gae` estimates, both (B, T) in reward units and 0 where the mask is False."""

    advantages_BT: Tensor
    returns_BT: Tensor


def shape_rewards(
    scores_B: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, *, kl_coef: float
) -> Tensor:
    """Reward of each token: the KL penalty everywhere, the score on the last kept token.

        r_t = −β (log π(a_t) − log π_ref(a_t)) + [t is the last kept token] · score

    A row that keeps no token has no reward. Ouyang et al. 2022, eq. 2, https://arxiv.org/abs/2203.02155

    Args:
        scores_B: (B,) float. The reward model's score of each response.
        logprobs_BT: (B, T) float, nats. Under the policy that sampled the tokens.
        ref_logprobs_BT: (B, T) float, nats. Under the reference.
        mask_BT: (B, T) bool. True for response tokens, the stop token included.
        kl_coef: β, reward units a nat.

    Returns:
        (B, T) float, reward units, 0 where the mask is False.

    Raises:
        ValueError: a shape is wrong.
    """
    same = logprobs_BT.shape == ref_logprobs_BT.shape == mask_BT.shape
    if not (same and mask_BT.dim() == 2 and scores_B.shape == mask_BT.shape[:1]):
        raise ValueError(
            "expected scores (B,) and the others (B, T); found "
            + describe_shapes(
                scores_B=scores_B, logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT, mask_BT=mask_BT
            )
        )
    log_ratio_BT = zero_masked(logprobs_BT - ref_logprobs_BT, mask_BT)
    kept_from_here_BT = mask_BT.flip(1).cumsum(dim=1).flip(1)
    last_BT = mask_BT & (kept_from_here_BT == 1)
    return torch.where(last_BT, scores_B[:, None], 0) - kl_coef * log_ratio_BT


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float) -> Returns:
    """Generalised advantage estimation over response tokens.

        δ_t = r_t + γ V_{t+1} − V_t          A_t = δ_t + γλ A_{t+1}          G_t = A_t + V_t

    V and A are 0 past the last kept token: a response never borrows value from padding. Entries under a False are no
    time steps: where they stand between kept tokens, t + 1 is the next kept one.
    Schulman et al. 2016, eq. 16, https://arxiv.org/abs/1506.02438

    Args:
        rewards_BT: (B, T) float. Reward per token, in reward-model units.
        values_BT: (B, T) float. V(s_t), before token t is emitted.
        mask_BT: (B, T) bool. True for response tokens; in general a prefix of each row.
        gamma, lam: discount γ and trace decay λ, both in [0, 1].

    Returns:
        `Returns(advantages_BT, returns_BT)`, not whitened.

    Raises:
        ValueError: the shapes differ or are not of two dimensions.
    """
    require_same_shape(rank=2, rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    values_BT = zero_masked(values_BT, mask_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(len(values_BT))
    columns: list[Tensor] = []
    for t in reversed(range(values_BT.shape[1])):
        value_B, mask_B = values_BT[:, t], mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * next_advantage_B
        columns.append(zero_masked(advantage_B, mask_B))
        next_value_B = torch.where(mask_B, value_B, next_value_B)
        next_advantage_B = torch.where(mask_B, advantage_B, next_advantage_B)
    advantages_BT = torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values_BT)
    return Returns(advantages_BT, advantages_BT + values_BT)
