"""Sample responses from a causal language model, by temperature and nothing else.

transformers' `generate` is not used: top-k, repetition penalties and minimal lengths leak into it from a model's own
generation_config, and then the sampled tokens do not follow the log-probs that learning works with.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core import processes
from rlhf_core.decoding import decoder
from rlhf_core.errors import ConfigError
from rlhf_core.functional import token_logprobs
from rlhf_core.records import Sampled

DRAW_BLOCK = 256  # tokens whose probabilities are summed before the running sum


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
    greedy: bool | Sequence[bool] = False,
    keep_depth: int = 0,
    keep_tops: bool = False,
    logprobs: bool = False,
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
        greedy: take the likeliest token instead; of some rows, where it says for each of them.
        keep_depth: keep the hidden states below this layer where that costs nothing; 0 keeps none.
        keep_tops: keep the last hidden states of responses where that costs nothing.
        logprobs: tell the tokens' log-probs too, at this temperature also where the likeliest were taken. An update
            learns from those that the head gives of `keep_tops`: rounding would look like a ratio.
        on_step: called with the step and the number of rows still running.

    Returns:
        `Sampled`; T is the longest response that came out.

    Raises:
        ConfigError: prompt and response could become longer than the model's context.
    """
    count, longest = len(prompts), max(map(len, prompts)) + max_tokens
    context = getattr(model.config, "max_position_embeddings", None)
    if context and longest > context:
        raise ConfigError(
            f"A prompt of {longest - max_tokens} tokens and a response of {max_tokens} make {longest}; the model's "
            f"context is {context}. Lower response_tokens, or prepare.max_prompt_tokens, in params.yaml."
        )
    out_BT = torch.full((count, max_tokens), pad_id, dtype=torch.long)
    kept_BT = torch.zeros((count, max_tokens), dtype=torch.bool)
    stopped_B = torch.zeros(count, dtype=torch.bool)
    said_BT = torch.zeros((count, max_tokens if logprobs else 0))

    greedy_B = torch.tensor([greedy] * count if isinstance(greedy, bool) else list(greedy), dtype=torch.bool)
    uniform_TB = torch.rand((max_tokens, count), generator=generator, dtype=torch.float64)
    own, states, tops = processes.own(range(count)), None, None
    if own:
        batch = decoder(
            model, [prompts[row] for row in own], max_tokens=max_tokens, pad_id=pad_id, keep_depth=keep_depth,
            keep_tops=keep_tops,
        )  # fmt: skip
        numbers = torch.tensor(own, dtype=torch.long)
        logits_LV = batch.start()
        for step in range(max_tokens):
            live_L = numbers[batch.rows_L]
            tokens_L = _next_tokens(logits_LV, uniform_TB[step, live_L], temperature, greedy_B[live_L])
            running_L = ~stopped_B[live_L]
            rows = live_L[running_L]
            out_BT[rows, step] = tokens_L[running_L]
            kept_BT[rows, step] = True
            if logprobs:
                tokens_1L = tokens_L[None].to(logits_LV.device)
                said_1L = token_logprobs(logits_LV[None], tokens_1L, temperature=temperature)
                said_BT[rows, step] = said_1L[0].cpu()[running_L]
            stopped_B[rows] = tokens_L[running_L] == stop_id
            running_L = ~stopped_B[live_L]
            if on_step:
                on_step(step, int(running_L.sum()))
            if step + 1 == max_tokens or not running_L.any():
                batch.end(tokens_L)
                break
            logits_LV = batch.step(tokens_L, running_L)
        states, whole = batch.states(), batch.tops()
        if whole is not None:
            tops = [top_TD[:length] for top_TD, length in zip(whole, kept_BT[own].sum(1).tolist(), strict=True)]
    out_BT, kept_BT, stopped_B, said_BT = (
        processes.place(part[own], own, count) for part in (out_BT, kept_BT, stopped_B, said_BT)
    )
    length = int(kept_BT.sum(1).max())
    rows_of_ids = [list(row) for row in prompts]
    said = said_BT[:, :length] if logprobs else None
    return Sampled(rows_of_ids, out_BT[:, :length], kept_BT[:, :length], stopped_B, states, said, tops)


def _next_tokens(logits_LV: Tensor, uniform_L: Tensor, temperature: float, greedy_L: Tensor) -> Tensor:
    """(L,) tokens, on the CPU: the likeliest of the greedy rows, and of the others one that is drawn."""
    if not greedy_L.any():
        return draw(logits_LV.cpu(), uniform_L, temperature)
    tokens_L = logits_LV.argmax(1).cpu()
    if not greedy_L.all():
        drawn_L = ~greedy_L
        tokens_L[drawn_L] = draw(logits_LV.cpu()[drawn_L], uniform_L[drawn_L], temperature)
    return tokens_L


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """(B,) tokens from softmax(logits / temperature) by inverting its distribution function at `uniform_B`.

    Running sums are float64, since in float32 one over 50,000 tokens loses the rare ones; first over blocks of tokens,
    each summed in float32, then within the one block that is met.
    """
    count, tokens = logits_BV.shape
    weights_BV = (logits_BV / temperature).softmax(1)
    if tokens % DRAW_BLOCK:
        weights_BV = F.pad(weights_BV, (0, -tokens % DRAW_BLOCK))
    weights_BKN = weights_BV.view(count, -1, DRAW_BLOCK)
    sums_BK = weights_BKN.sum(-1).double().cumsum(1)
    block_B1, rest_B1 = _invert(sums_BK, uniform_B[:, None] * sums_BK[:, -1:])
    chosen_BN = weights_BKN[torch.arange(count), block_B1[:, 0]].double().cumsum(1)
    place_B1, _ = _invert(chosen_BN, rest_B1)
    return (block_B1 * DRAW_BLOCK + place_B1).squeeze(1)


def _invert(sums_BN: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry whose running sum is above the target, and by how much the target is above the sum before it."""
    # Below the whole, also where rounding has put it there: an entry that adds nothing is never the first above.
    below_B1 = torch.minimum(target_B1, torch.nextafter(sums_BN[:, -1:], sums_BN.new_zeros(())))
    found_B1 = torch.searchsorted(sums_BN, below_B1.contiguous(), right=True)
    before_B1 = F.pad(sums_BN, (1, 0)).gather(1, found_B1)
    return found_B1, (below_B1 - before_B1).clamp(min=0)
