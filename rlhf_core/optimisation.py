"""What loops need around an optimiser step: batches, AdamW, a rate that warms up and decays, a clipped gradient.

And the stop where numbers are none any more, before they reach the weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rlhf_core import processes
from rlhf_core.config import Schedule
from rlhf_core.errors import TrainingDiverged

EXPLODED = 1e6  # a loss or a log-probability beyond this is on its way to infinity
Tensors = Callable[[], Mapping[str, Tensor]]  # made where they are wanted


class Batch(NamedTuple):
    """Row numbers of one optimiser step."""

    epoch: int
    rows: list[int]
    ends_epoch: bool


def epochs_of(count: int, *, epochs: int, batch_size: int, generator: torch.Generator) -> list[Batch]:
    """All batches of all epochs, each epoch over all rows in an order of its own."""
    batches = []
    for epoch in range(1, epochs + 1):
        parts = torch.randperm(count, generator=generator).split(batch_size)
        batches += [Batch(epoch, part.tolist(), i == len(parts) - 1) for i, part in enumerate(parts)]
    return batches


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Give each target its source's values."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def adamw(parameters: Sequence[nn.Parameter], *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with ε = 1e-5, as in the published PPO code bases (Huang et al. 2024, arXiv:2403.17031)."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, eps=1e-5, fused=True)


def rate_factor(step: int, *, steps: int, warmup: int, schedule: Schedule) -> float:
    """What the peak learning rate is multiplied by at a step.

        (t + 1) / (w + 1) while t < w, so that the first rate is not 0; then, over p = (t − w) / (n − w):
        1 (constant)          1 − p (linear)          (1 + cos πp) / 2 (cosine)

    Args:
        step: t, from 0 to steps − 1.
        steps: n, all steps.
        warmup: w, steps of warm-up.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return 1 - progress
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of the optimiser this learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def require_finite(
    quantities: Mapping[str, Tensor | float], *, where: str, batch: Tensors, limit: float = EXPLODED
) -> None:
    """Stop at the first quantity that is not finite, or beyond the limit.

    Args:
        quantities: by names that the message uses, in the order in which they are computed.
        where: whose they are, such as "ppo's policy".
        batch: gives what they were computed from, for whoever looks for the cause.

    Raises:
        TrainingDiverged: names the quantity.
    """
    for name, value in quantities.items():
        worst = torch.as_tensor(value).detach().abs().max().item()
        if not worst < limit:  # NaN is not, either
            raise TrainingDiverged(
                f"{name} of {where} is {worst:g}, expected a finite number below {limit:g}. "
                "A learning rate that is too high is the usual cause: halve it in params.yaml.",
                {**batch(), **{key: found for key, found in quantities.items() if isinstance(found, Tensor)}},
            )


def step_clipped(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    *,
    max_grad_norm: float,
    where: str,
    batch: Tensors,
) -> float:
    """Add up the gradients of all processes, clip them to a global norm, step, and clear them.

    Returns:
        The norm before clipping.

    Raises:
        TrainingDiverged: the norm is not finite; the weights are left as they were.
    """
    processes.add_up_gradients(parameters)
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    require_finite({"The gradient": norm.item()}, where=where, batch=batch, limit=math.inf)
    optimiser.step()
    increment_version(parameters)  # what is made from weights is made anew, and a fused step does not say that it wrote
    optimiser.zero_grad(set_to_none=True)
    return norm.item()
