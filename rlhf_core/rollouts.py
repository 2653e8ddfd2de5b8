"""Sample responses from a causal language model, by temperature and nothing else.

transformers' `generate` is not used: top-k, repetition penalties and minimal lengths leak into it from a model's own
generation_config, and then the sampled tokens do not follow the log-probs that learning works with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_core import processes
from rlhf_core.errors import ConfigError
from rlhf_core.records import Sampled

DROP_SHARE = 0.25  # finished rows leave the batch once this share of it has finished: copying the cache costs too


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, P) ids and their mask from prompts of uneven length, padding on the left."""
    width = max(len(row) for row in rows)
    ids_BP = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BP, torch.arange(width) >= width - lengths_B[:, None]


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    stop_id: int,
    pad_id: int,
    generator: torch.Generator,
    greedy: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Sampled:
    """Sample one response a prompt.

    Each row has a random number of its own at each step, all drawn at the start. So what a row becomes does not depend
    on which others have finished, nor what the generator gives next on how long they were. A response that stops at the
    very last position did stop.

    Args:
        model: a causal language model in eval mode.
        prompts: B lists of token ids.
        max_tokens: longest response, T at most.
        temperature: divides the logits; above 0.
        generator: where the random numbers come from.
        greedy: take the likeliest token instead.
        on_step: called with the step and the number of rows still running.

    Returns:
        `Sampled`; T is the longest response that came out.

    Raises:
        ConfigError: prompt and response could become longer than the model's context.
    """
    device = next(model.parameters()).device
    prompt_ids_BP, prompt_mask_BP = pad_left(prompts, pad_id)
    count = len(prompts)
    longest, context = prompt_ids_BP.shape[1] + max_tokens, getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        raise ConfigError(
            f"A prompt of {longest - max_tokens} tokens and a response of {max_tokens} make {longest}; the model's "
            f"context is {context}. Lower response_tokens, or prepare.max_prompt_tokens, in params.yaml."
        )
    out_BT = torch.full((count, max_tokens), pad_id, dtype=torch.long)
    kept_BT = torch.zeros((count, max_tokens), dtype=torch.bool)
    stopped_B = torch.zeros(count, dtype=torch.bool)

    uniform_TB = torch.rand((max_tokens, count), generator=generator, dtype=torch.float64)
    own = processes.own(range(count))
    live_L = torch.tensor(own, dtype=torch.long)  # the rows still in the batch; those that finished leave it by and by
    cache = DynamicCache(config=model.config)
    ids, mask = prompt_ids_BP[live_L], prompt_mask_BP[live_L].long()
    for step in range(max_tokens if own else 0):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens_L = logits.argmax(1).cpu() if greedy else draw(logits.cpu(), uniform_TB[step, live_L], temperature)
        running_L = ~stopped_B[live_L]
        rows = live_L[running_L]
        out_BT[rows, step] = tokens_L[running_L]
        kept_BT[rows, step] = True
        stopped_B[rows] = tokens_L[running_L] == stop_id
        running_L = ~stopped_B[live_L]
        if on_step:
            on_step(step, int(running_L.sum()))
        if not running_L.any():
            break
        ids, mask = tokens_L[:, None], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if (~running_L).float().mean() >= DROP_SHARE:
            keep = running_L.nonzero().squeeze(1)
            cache.batch_select_indices(keep.to(device))
            ids, mask, live_L = ids[keep], mask[keep], live_L[keep]
    out_BT, kept_BT, stopped_B = (processes.place(part[own], own, count) for part in (out_BT, kept_BT, stopped_B))
    length = int(kept_BT.sum(1).max())
    return Sampled([list(row) for row in prompts], out_BT[:, :length], kept_BT[:, :length], stopped_B)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """(B,) tokens from softmax(logits / temperature) by inverting its distribution function at `uniform_B`.

    In float64, since a float32 running sum over 50,000 tokens loses the rare ones.
    """
    cdf_BV = (logits_BV.double() / temperature).softmax(1).cumsum(1)
    target_B1 = (uniform_B[:, None] * cdf_BV[:, -1:]).contiguous()
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)
