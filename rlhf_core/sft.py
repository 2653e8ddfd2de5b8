"""Supervised fine-tuning: learn demonstrations by the likelihood of their responses, prompts left out of the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.config import SFT
from rlhf_core.data import encode_prompt, encode_response
from rlhf_core.models import Roles, TrunkCache, pack
from rlhf_core.optimisation import adamw, rate_factor, set_rate, step_clipped
from rlhf_core.records import Demonstration
from rlhf_core.tracking import Tracker

POLICY = "policy"


@dataclass(frozen=True)
class Example:
    """Ids of a prompt and its response."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str,
    max_response_tokens: int,
) -> list[Example]:
    """Demonstrations as ids; a response longer than the limit is cut, and then has no end-of-turn token."""
    examples = []
    for record in demonstrations:
        prompt = encode_prompt(tokenizer, record.prompt, system)
        response = encode_response(tokenizer, record.response, limit=max_response_tokens)
        examples.append(Example(prompt, response))
    return examples


def response_logprobs(
    roles: Roles, role: str, examples: Sequence[Example], pad_id: int, cache: TrunkCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) log-probs of each response token in nats, and the mask that is True where there is one."""
    packed = pack([example.prompt for example in examples], [example.response for example in examples], pad_id)
    logprobs_BT, _ = roles.logprobs(roles.trunk(packed, cache), role, packed.ids_BT, packed.mask_BT, temperature=1.0)
    return logprobs_BT, packed.mask_BT.to(logprobs_BT.device)


@torch.no_grad()
def perplexity(
    roles: Roles,
    role: str,
    examples: Sequence[Example],
    pad_id: int,
    *,
    batch_size: int = 16,
    cache: TrunkCache | None = None,
) -> float:
    """exp of the mean negative log-likelihood a response token, every token weighing the same."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=len)
    for start in range(0, len(ordered), batch_size):
        logprobs_BT, mask_BT = response_logprobs(roles, role, ordered[start : start + batch_size], pad_id, cache)
        total -= logprobs_BT[mask_BT].double().sum().item()
        count += int(mask_BT.sum())
    return math.exp(total / count)


def train_sft(
    roles: Roles, train: Sequence[Example], validation: Sequence[Example], config: SFT, *, pad_id: int, tracker: Tracker
) -> dict[str, Any]:
    """Train role "policy" on demonstrations and leave it at the epoch with the lowest validation perplexity.

    Returns:
        Final metrics: `validation_perplexity` (the kept epoch's), `base_perplexity`, `best_epoch`, `train_loss` (nats
        a token, mean over the last epoch), `steps`, `tokens`.

    Raises:
        TrainingDiverged: a gradient is not finite.
    """
    torch.manual_seed(config.seed)
    order, cache = torch.Generator().manual_seed(config.seed), TrunkCache()
    parameters = roles.trainable(POLICY)
    optimiser = adamw(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    warmup = round(config.warmup_fraction * steps)
    base_perplexity = best = perplexity(roles, POLICY, validation, pad_id, cache=cache)
    tracker.metrics({"sft/validation_perplexity": base_perplexity}, step=0)
    best_epoch, kept, seen_tokens, step = 0, [value.detach().clone() for value in parameters], 0, 0
    for epoch in range(1, config.epochs + 1):
        epoch_loss = epoch_tokens = 0.0
        for index in torch.randperm(len(train), generator=order).split(config.batch_size):
            # Sorted by length, a batch's pieces carry little padding; what the batch holds stays random.
            batch = sorted((train[row] for row in index.tolist()), key=len)
            rate = config.learning_rate * rate_factor(step, steps=steps, warmup=warmup, schedule=config.schedule)
            set_rate(optimiser, rate)
            token_count = sum(len(example.response) for example in batch)
            loss = 0.0
            for start in range(0, len(batch), config.micro_batch_size):
                logprobs_BT, mask_BT = response_logprobs(
                    roles, POLICY, batch[start : start + config.micro_batch_size], pad_id, cache
                )
                part = -logprobs_BT.masked_fill(~mask_BT, 0).sum() / token_count
                part.backward()
                loss += part.item()
            norm = step_clipped(optimiser, parameters, max_grad_norm=config.max_grad_norm, where="sft")
            step += 1
            epoch_loss += loss * token_count
            epoch_tokens += token_count
            batch_tokens = sum(map(len, batch))
            seen_tokens += batch_tokens
            tracker.metrics({"sft/loss": loss, "sft/grad_norm": norm, "sft/learning_rate": rate}, step=step)
            tracker.progress(step, steps, unit="steps", tokens=batch_tokens, note=f"loss {loss:.3f}")
        current = perplexity(roles, POLICY, validation, pad_id, cache=cache)
        tracker.metrics({"sft/validation_perplexity": current, "sft/epoch": epoch}, step=step)
        if current < best:
            best, best_epoch, kept = current, epoch, [value.detach().clone() for value in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return {
        "validation_perplexity": best,
        "base_perplexity": base_perplexity,
        "best_epoch": best_epoch,
        "train_loss": epoch_loss / epoch_tokens,
        "steps": step,
        "tokens": seen_tokens,
    }
