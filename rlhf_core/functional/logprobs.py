"""From a model's logits to log-probabilities of tokens and to entropy, in float32 or better.

The temperature that divided the logits in sampling divides them here too, or ratios and KL are wrong.
"""

import torch
from torch import Tensor

from rlhf_core.functional.masks import describe_shapes, require_same_shape


def token_logprobs(logits_BTV: Tensor, ids_BT: Tensor, *, temperature: float) -> Tensor:
    """Log-probability of each given token.

        log π(a_t) = z_{a_t} − log Σ_v exp z_v          z = logits / temperature

    Args:
        logits_BTV: (B, T, V) float. Position t predicts token t of `ids_BT`: the caller has shifted them.
        ids_BT: (B, T) int64, in [0, V).
        temperature: above 0.

    Returns:
        (B, T) float32 in nats; float64 where the logits are float64.

    Raises:
        ValueError: ids are not shaped like the logits without V, or the temperature is not above 0.
    """
    if logits_BTV.dim() != 3 or logits_BTV.shape[:2] != ids_BT.shape:
        raise ValueError(
            f"expected logits (B, T, V) and ids (B, T); found {describe_shapes(logits_BTV=logits_BTV, ids_BT=ids_BT)}"
        )
    return _log_softmax(logits_BTV, temperature).gather(2, ids_BT[:, :, None]).squeeze(2)


def entropy(logits_BTV: Tensor, *, temperature: float) -> Tensor:
    """Entropy of the next token's distribution.

        H_t = −Σ_v p_v log p_v          p = softmax(logits / temperature), 0 · log 0 = 0

    Args:
        logits_BTV: (B, T, V) float; −∞ rules a token out.
        temperature: above 0.

    Returns:
        (B, T) float32 in nats; float64 where the logits are float64.

    Raises:
        ValueError: the logits are not of three dimensions, or the temperature is not above 0.
    """
    require_same_shape(rank=3, logits_BTV=logits_BTV)
    logprobs_BTV = _log_softmax(logits_BTV, temperature)
    finite_BTV = logprobs_BTV.clamp(min=torch.finfo(logprobs_BTV.dtype).min)
    return -(finite_BTV.exp() * finite_BTV).sum(dim=2)


def _log_softmax(logits_BTV: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0; found {temperature}")
    precise = torch.promote_types(logits_BTV.dtype, torch.float32)
    return (logits_BTV.to(precise) / temperature).log_softmax(dim=2)
