"""Length regressed out of a reward model: what length is worth in the rankings, learned beside the score.

While the model trains, the log-odds of a pair are r(a) − r(b) + β (length of a − length of b). The score is r alone, so
it has to tell only what length does not. Rankings rather than pairs need no more: β · length is added to each
response's score before the loss. Why it is done this way: docs/decisions/0022-length-regressed-out.md.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from rlhf_core.optimisation import Tensors, adamw, set_rate, step_clipped

PEAK_RATE = 0.02  # of β, a step, in standard deviations; it is one number and has to keep pace with the whole model
RIDGE = 1e-3  # keeps the first β finite where the longer one always wins, and at 0 where length never differs


class Ranked(Protocol):
    """What is asked of a ranking."""

    @property
    def ranks(self) -> Sequence[float]: ...  # 1 is best
    @property
    def lengths(self) -> Sequence[int]: ...  # tokens of each response


class LengthTerm:
    """β, one for the score and one for each axis, with an optimiser of its own.

    Inside, a length is counted in standard deviations of the difference within a pair, so that a step means the same
    for short and long responses.

    Args:
        rankings: what the model is trained on.
        losses: for the score and each axis, the loss of all these rankings as a function of their (B, K) scores.
        known: β as saved with the model that training starts from, a token; None where there is none.
    """

    def __init__(
        self,
        rankings: Sequence[Ranked],
        losses: Sequence[Callable[[Tensor], Tensor]],
        known: Sequence[float | None],
        device: torch.device,
    ) -> None:
        self.scale = deviation(rankings)
        lengths_BK = self._lengths(rankings).double()
        start = [
            fit(partial(_at, loss, lengths_BK)) if before is None else before * self.scale
            for loss, before in zip(losses, known, strict=True)
        ]
        self.betas_H = nn.Parameter(torch.tensor(start, dtype=torch.float32, device=device))
        self.kept_H = self.betas_H.detach().clone()
        self.optimiser = adamw([self.betas_H], learning_rate=PEAK_RATE, weight_decay=0.0)

    def added(self, rankings: Sequence[Ranked]) -> Tensor:
        """(B, K, 1 + A) what length adds to the score and to each axis's; 0 past the last response."""
        return self._lengths(rankings).to(self.betas_H)[..., None] * self.betas_H

    def step(self, factor: float, *, max_grad_norm: float, where: str, batch: Tensors) -> None:
        """Learn from the gradients that the model's own losses left.

        Args:
            factor: of the peak rate, the same as the model's.
        """
        set_rate(self.optimiser, PEAK_RATE * factor)
        step_clipped(self.optimiser, [self.betas_H], max_grad_norm=max_grad_norm, where=where, batch=batch)

    def worth(self) -> list[float]:
        """By how much one token more raises a response's log-odds beside the score, then on each axis."""
        return [beta / self.scale for beta in self.betas_H.tolist()]

    def _lengths(self, rankings: Sequence[Ranked]) -> Tensor:
        width = max(len(ranking.lengths) for ranking in rankings)
        return torch.tensor([[*each.lengths, *[0] * (width - len(each.lengths))] for each in rankings]) / self.scale


def deviation(rankings: Sequence[Ranked]) -> float:
    """√ of the mean squared difference in length within pairs that are not ties; 1 where lengths never differ."""
    differences = [
        better - worse
        for ranking in rankings
        for better, rank in zip(ranking.lengths, ranking.ranks, strict=True)
        for worse, other in zip(ranking.lengths, ranking.ranks, strict=True)
        if rank < other
    ]
    return float(np.sqrt(np.mean(np.square(differences or [0])))) or 1.0


def fit(loss: Callable[[float], float]) -> float:
    """The β at which length alone explains most: argmin loss(β) + ½ ridge β², convex.

    There the residuals of the preferences are uncorrelated with length, so that a score of 0 has no gradient towards
    counting tokens: what length can say is said before the score learns anything.
    """
    found = minimize_scalar(
        lambda beta: loss(beta) + RIDGE * beta * beta / 2, bounds=(-10, 10), method="bounded", options={"xatol": 1e-6}
    )
    return float(found.x)


def _at(loss: Callable[[Tensor], Tensor], lengths_BK: Tensor, beta: float) -> float:
    return float(loss(beta * lengths_BK))


def length_correlation(margins: np.ndarray, length_differences: np.ndarray) -> float:
    """Correlation of a score's lead with the lead in length, over pairs taken in both orders.

        Σ m d / √(Σ m² · Σ d²)        1: it counts tokens, 0: it does not care, −1: it likes short ones

    Both orders, so that which response of a pair is named first does not matter; the means are then 0.

    Args:
        margins, length_differences: (N,) score and length of one response minus the other's.

    Returns:
        0 where all margins or all differences are 0.
    """
    size = float(np.sqrt(np.square(margins).sum() * np.square(length_differences).sum()))
    return float((margins * length_differences).sum() / size) if size > 0 else 0.0
