"""What PPO climbs where a response is scored on several axes: the score, axes by weight or in order, a constraint.

The formulas are in functional/objectives.py; here they meet the configuration and the reward model's members. A cost is
the normalised score on an axis with the opposite sign.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.config import PPO
from rlhf_core.ensemble import combine
from rlhf_core.errors import ConfigError
from rlhf_core.functional import CostMultiplier, lexicographic_scores, weighted_scores

SCORE = "score"  # beside the axes: the scalar head's own, or what stands for it


class Worth(NamedTuple):
    """What responses are worth, in reward units, before scale, clip and penalties."""

    score_B: Tensor  # (B,) what is climbed
    spread_B: Tensor  # (B,) its deviation over the reward model's members; 0 where there is but one
    axes: dict[str, Tensor]  # (B,) of each axis, whether climbed or not
    cost_B: Tensor | None  # (B,) what is limited, where something is


def require_axes(config: PPO, axes: Sequence[str]) -> None:
    """Stop where the objective names an axis that nothing scores.

    Raises:
        ConfigError: names the axis and those that there are.
    """
    for axis in config.axes:
        if axis not in axes:
            held = ", ".join(axes) or "none"
            raise ConfigError(
                f"ppo.objective {config.objective} names the axis {axis!r}, which the reward model does not have; "
                f"found {held}. Name it in reward.axes, and run `rlhf run`."
            )


def as_outputs(found: Tensor | Mapping[str, Tensor], like: Tensor) -> tuple[list[str], Tensor]:
    """A score of one's own as if a reward model of one member had given it.

    Args:
        found: (B,) scores, or such scores by the name of their axis; there "score" is the overall one, 0 if missing.
        like: what dtype and device are taken from.

    Returns:
        The names of the axes, and (B, 1, 1 + A) outputs.
    """
    if not isinstance(found, Mapping):
        return [], found.to(like)[:, None, None]
    axes = [name for name in found if name != SCORE]
    whole = found.get(SCORE, torch.zeros_like(found[axes[0]]))
    return axes, torch.stack([whole.to(like), *(found[axis].to(like) for axis in axes)], 1)[:, None]


def worth_of(outputs_BMH: Tensor, axes: Sequence[str], config: PPO) -> Worth:
    """What responses are worth by `config.objective`.

    The spread is taken off the score as `config.spread_coef` says: that of the members' own weighted scores, where
    there are weights.

    Args:
        outputs_BMH: (B, M, 1 + A) normalised scores by each member: overall, then on each axis.
        axes: the names of the A axes.
    """
    by_axis = {axis: outputs_BMH[..., place].mean(1) for place, axis in enumerate(axes, start=1)}
    members_BM = outputs_BMH[..., 0].contiguous()
    if config.axis_weights:
        places = [1 + axes.index(axis) for axis in config.axis_weights]
        weights = list(config.axis_weights.values())
        members_BM = torch.stack([weighted_scores(one_BH[:, places], weights) for one_BH in outputs_BMH.unbind(1)], 1)
    score_B, spread_B, _ = combine(members_BM)
    score_B = score_B - config.spread_coef * spread_B  # conservative: what the members disagree about is worth less
    if config.objective == "lexicographic":
        thresholds = [config.thresholds[axis] for axis in config.axis_order[:-1]]
        ordered_BA = torch.stack([by_axis[axis] for axis in config.axis_order], 1)
        limit = config.score_clip  # each axis, since a clip of the whole would upset the order
        score_B = lexicographic_scores(ordered_BA.clamp(-limit, limit), thresholds, floor=limit)
    return Worth(score_B, spread_B, by_axis, -by_axis[config.cost_axis] if config.cost_axis else None)


def multiplier_of(config: PPO) -> CostMultiplier | None:
    """The multiplier of the constraint as it is before the first update; None where nothing is limited."""
    if config.objective != "constrained":
        return None
    return CostMultiplier(
        config.lambda_init,
        limit=config.cost_limit,
        learning_rate=config.lambda_learning_rate,
        minimum=config.lambda_min,
        maximum=config.lambda_max,
        memory=config.cost_memory,
    )
