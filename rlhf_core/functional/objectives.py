"""Several objectives at once: scores on axes as one number, and a constraint with a multiplier that is learned.

What the axes mean, and which of them are costs, is the caller's business.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.functional.masks import describe_shapes, require_same_shape


def weighted_scores(scores_BA: Tensor, weights: Sequence[float]) -> Tensor:
    """One score a response from scores on several axes, by weights.

        s = Σ_a w_a s_a

    Linear scalarisation: it reaches only the convex hull of what policies can reach. Roijers et al. 2013, section 4.1,
    https://doi.org/10.1613/jair.3987

    Args:
        scores_BA: (B, A) float, reward units of each axis.
        weights: A numbers, below 0 for what there should be less of. Where they add up to 1, a response that is one
            unit better on every axis is one unit better.

    Returns:
        (B,) float, reward units.

    Raises:
        ValueError: there are not as many weights as axes.
    """
    _require_axes(scores_BA, "weights", len(weights), 0)
    return (scores_BA * scores_BA.new_tensor(list(weights))).sum(1)


def lexicographic_scores(scores_BA: Tensor, thresholds: Sequence[float], *, floor: float) -> Tensor:
    """One score a response, in which an axis counts only once every more important one has reached its threshold.

        u = min(s_1, θ_1) + Σ_{k > 1} [s_1 ≥ θ_1 ∧ … ∧ s_{k−1} ≥ θ_{k−1}] · (min(max(s_k, −f), θ_k) + f)       θ_A = ∞

    A larger u is what the thresholded lexicographic order prefers: the first axis that is short of its threshold
    decides, and what is above a threshold earns nothing. The floor f makes every summand of a further axis 0 or more,
    so that a response never loses by reaching a threshold. Gábor, Kalmár & Szepesvári 1998, Multi-criteria
    reinforcement learning, ICML, section 3; as a utility: Vamplew et al. 2011,
    https://doi.org/10.1007/s10994-010-5232-5

    Args:
        scores_BA: (B, A) float, reward units of each axis, the most important axis first.
        thresholds: A − 1 numbers θ, of every axis but the last.
        floor: f; a score below −f on any but the first axis counts as −f. Thresholds lie above −f.

    Returns:
        (B,) float, reward units: the first axis's own score while that is below its threshold.

    Raises:
        ValueError: there are not as many thresholds as axes but one, or one of them is not above −f.
    """
    _require_axes(scores_BA, "thresholds", len(thresholds), 1)
    if not all(threshold > -floor for threshold in thresholds):
        raise ValueError(f"expected thresholds above minus the floor {floor:g}; found {list(thresholds)}")
    reached_B = torch.ones_like(scores_BA[:, 0], dtype=torch.bool)
    total_B = torch.zeros_like(scores_BA[:, 0])
    for place, threshold in enumerate((*thresholds, math.inf)):
        score_B = scores_BA[:, place]
        counted_B = score_B.clamp(max=threshold)
        if place:
            counted_B = counted_B.clamp(min=-floor) + floor
        total_B = total_B + torch.where(reached_B, counted_B, 0)
        reached_B = reached_B & (score_B >= threshold)
    return total_B


def constrained_advantages(advantages: Tensor, cost_advantages: Tensor, *, multiplier: float) -> Tensor:
    """What a policy learns from that shall earn reward while its mean cost stays within a limit.

        A = (A_r − λ A_c) / (1 + λ)

    The division bounds the step as λ grows. A side condition x that is a part of both rewards, with the opposite sign
    in the cost, has a weight that does not depend on λ, since advantages are linear in rewards:

        r' = r + x,  c' = c − x       A' = (A_r + A_x − λ (A_c − A_x)) / (1 + λ) = A + (1 + λ) A_x / (1 + λ) = A + A_x

    So the KL penalty x = −β k1 stands whole in both, and β means what it means without a constraint; with one half in
    each, as in the paper, it would be β / 2. In one of them alone it would be β / (1 + λ) or β λ / (1 + λ).
    Dai et al. 2023, section 3.3 and appendix B, https://arxiv.org/abs/2310.12773

    Args:
        advantages: any shape, float. A_r, of the reward.
        cost_advantages: the same shape. A_c, of the cost.
        multiplier: λ, 0 or more.

    Returns:
        The same shape, neither whitened nor masked.

    Raises:
        ValueError: the shapes differ, or λ is below 0.
    """
    require_same_shape(advantages=advantages, cost_advantages=cost_advantages)
    if not multiplier >= 0:
        raise ValueError(f"expected a multiplier of 0 or more; found {multiplier}")
    return (advantages - multiplier * cost_advantages) / (1 + multiplier)


class CostMultiplier:
    """The multiplier λ of a constraint on the mean cost, learned by gradient ascent on its logarithm.

        m ← m + (c − m) / min(n, memory)          log λ ← clip(log λ + η λ (m − d), log λ_min, log λ_max)

    λ (m − d) is the derivative of λ (m − d) by log λ: λ grows while the moving mean m of the cost is above the limit d
    and shrinks while it is below. n counts the costs seen, so m is their plain mean at first. The clamp from below lets
    a λ that was not needed for long come back: its step is a share of itself.
    Dai et al. 2023, appendix B, https://arxiv.org/abs/2310.12773

    Args:
        initial: λ to begin with, from minimum to maximum; `.value` is the one that holds now.
        limit: d, cost units.
        learning_rate: η, above 0, an update and cost unit.
        minimum, maximum: bounds of λ, above 0.
        memory: over how many costs the mean moves, 1 or more.

    Raises:
        ValueError: one of them is not as said.
    """

    def __init__(
        self, initial: float, *, limit: float, learning_rate: float, minimum: float, maximum: float, memory: int
    ) -> None:
        if not (0 < minimum <= initial <= maximum and learning_rate > 0 and memory >= 1):
            raise ValueError(
                "expected 0 < minimum <= initial <= maximum, learning_rate > 0 and memory >= 1; found minimum "
                f"{minimum}, initial {initial}, maximum {maximum}, learning_rate {learning_rate}, memory {memory}"
            )
        self.limit, self.learning_rate, self.memory = limit, learning_rate, memory
        self.low, self.high = math.log(minimum), math.log(maximum)
        self.log, self.mean, self.seen = math.log(initial), 0.0, 0

    @property
    def value(self) -> float:
        """λ as it is now."""
        return math.exp(self.log)

    def update(self, cost: float) -> None:
        """Take in the mean cost of an update's responses, and move λ; raises ValueError where it is not finite."""
        if not math.isfinite(cost):
            raise ValueError(f"expected a finite cost; found {cost}")
        self.seen += 1
        self.mean += (cost - self.mean) / min(self.seen, self.memory)
        step = self.learning_rate * self.value * (self.mean - self.limit)
        self.log = min(max(self.log + step, self.low), self.high)

    def state(self) -> dict[str, float]:
        """All that moves, as numbers that `restore` takes."""
        return {"log": self.log, "mean": self.mean, "seen": self.seen}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from there."""
        self.log, self.mean, self.seen = state["log"], state["mean"], int(state["seen"])


def _require_axes(scores_BA: Tensor, name: str, given: int, fewer: int) -> None:
    if scores_BA.dim() != 2 or not scores_BA.shape[1] or scores_BA.shape[1] - fewer != given:
        wanted = "as many as axes" if not fewer else "one fewer than axes"
        raise ValueError(
            f"expected scores (B, A) and {name} {wanted}; found {given} {name}, " + describe_shapes(scores_BA=scores_BA)
        )
