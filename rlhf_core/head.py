"""What a model says of tokens, from its last hidden states: logits some tokens at a time, and none kept.

(B, S, V) is never held, V being about 50,000. A log-probability's gradient for the hidden states needs nothing of what
follows, so a frozen head finds it in the same pass, while the logits are at hand: nothing has to be computed again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_core.functional import entropy as token_entropy
from rlhf_core.functional import token_logprobs
from rlhf_core.matrices import laid_out

LOGIT_TOKENS = 512  # how many tokens' logits are made at once


class Said(NamedTuple):
    """Of N tokens, each given what stands before it."""

    logprobs_N: Tensor  # nats, float32
    entropy_N: Tensor | None  # nats, float32, of the distribution that each is drawn from


def said(head: nn.Module, hidden_ND: Tensor, ids_N: Tensor, *, temperature: float, entropy: bool = False) -> Said:
    """Log-probabilities of tokens, and the entropies where asked.

    Args:
        head: the language-model head.
        hidden_ND: the last hidden states that predict them.
    """
    learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in head.parameters())
    moves = torch.is_grad_enabled() and hidden_ND.requires_grad
    if type(head) is not nn.Linear or head.bias is not None or learns or (entropy and moves):
        return _plainly(head, hidden_ND, ids_N, temperature=temperature, entropy=entropy)
    logprobs_N, entropy_N = _Frozen.apply(hidden_ND, ids_N, head.weight, temperature, entropy)
    return Said(logprobs_N, entropy_N if entropy else None)


class _Frozen(torch.autograd.Function):
    """The log-probabilities' gradient for hidden states, (W[id] − Σ_v p_v W[v]) / temperature, is found beside them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, ids_N: Tensor, weight_VD: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        found, spread, slopes = [], [], []
        for part_ND, part_N in zip(hidden_ND.split(LOGIT_TOKENS), ids_N.split(LOGIT_TOKENS), strict=True):
            logits_NV = laid_out(weight_VD)(part_ND)
            logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
            if temperature != 1:
                logits_NV.div_(temperature)
            chosen_N1 = logits_NV.gather(1, part_N[:, None])
            top_N1 = logits_NV.amax(1, keepdim=True)
            below_NV = logits_NV.sub_(top_N1)
            weights_NV = below_NV.exp() if entropy else below_NV.exp_()
            sum_N1 = weights_NV.sum(1, keepdim=True)
            found.append((chosen_N1 - top_N1 - sum_N1.log()).squeeze(1))
            if entropy:
                spread.append(sum_N1.squeeze(1).log() - torch.linalg.vecdot(weights_NV, below_NV) / sum_N1.squeeze(1))
            if ctx.needs_input_grad[0]:
                mean_ND = laid_out(weight_VD, turned=True)(weights_NV.to(weight_VD.dtype)) / sum_N1
                slopes.append(((weight_VD[part_N] - mean_ND) / temperature).to(hidden_ND.dtype))
        nothing_N = hidden_ND.new_zeros(0)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        entropy_N = torch.cat(spread) if spread else nothing_N
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(found) if found else nothing_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes_ND,) = ctx.saved_tensors
        return slopes_ND * to_N[:, None].to(slopes_ND.dtype), None, None, None, None


def _plainly(head: nn.Module, hidden_ND: Tensor, ids_N: Tensor, *, temperature: float, entropy: bool) -> Said:
    """By autograd, for a head that learns or is no plain matrix, and where entropies have gradients."""

    def of_part(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_1NV = head(part_ND)[None]
        logprobs_N = token_logprobs(logits_1NV, part_N[None], temperature=temperature)[0]
        return logprobs_N, token_entropy(logits_1NV, temperature=temperature)[0] if entropy else logprobs_N

    found, spread = [], []
    # The logits of more than one part are not kept for the gradient, which computes them again.
    again = len(hidden_ND) > LOGIT_TOKENS and torch.is_grad_enabled()
    for part in zip(hidden_ND.split(LOGIT_TOKENS), ids_N.split(LOGIT_TOKENS), strict=True):
        logprobs_N, entropy_N = checkpoint(of_part, *part, use_reentrant=False) if again else of_part(*part)
        found.append(logprobs_N)
        spread.append(entropy_N)
    return Said(torch.cat(found), torch.cat(spread) if entropy else None)
