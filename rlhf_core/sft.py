"""Supervised fine-tuning: learn demonstrations by the likelihood of their responses, prompts left out of the loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.checkpoints import NO_CHECKPOINTS, Checkpoints, LoopState
from rlhf_core.config import SFT
from rlhf_core.data import encode_prompt, encode_response
from rlhf_core.models import Packed, Roles, TrunkCache, pack
from rlhf_core.optimisation import adamw, copy_into, epochs_of, rate_factor, require_finite, set_rate, step_clipped
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


def pack_examples(examples: Sequence[Example], pad_id: int) -> Packed:
    """Examples as one batch."""
    return pack([example.prompt for example in examples], [example.response for example in examples], pad_id)


def _tensors(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    return pack_examples(examples, pad_id)._asdict()


def response_logprobs(
    roles: Roles, role: str, examples: Sequence[Example], pad_id: int, cache: TrunkCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) log-probs of each response token in nats, and the mask that is True where there is one."""
    packed = pack_examples(examples, pad_id)
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
    ordered = processes.own(sorted(examples, key=len))
    for start in range(0, len(ordered), batch_size):
        logprobs_BT, mask_BT = response_logprobs(roles, role, ordered[start : start + batch_size], pad_id, cache)
        total -= logprobs_BT[mask_BT].double().sum().item()
        count += int(mask_BT.sum())
    summed = processes.add_up({"total": total, "count": count})
    mean = summed["total"] / summed["count"]
    return math.exp(mean) if mean < 700 else math.inf  # beyond, a float64 ends


def train_sft(
    roles: Roles,
    train: Sequence[Example],
    validation: Sequence[Example],
    config: SFT,
    *,
    pad_id: int,
    tracker: Tracker,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """Train role "policy" on demonstrations and leave it at the epoch that `config.keep` names.

    Args:
        checkpoints: where a loop that was stopped goes on from.

    Returns:
        Final metrics: `validation_perplexity` (the kept epoch's), `base_perplexity`, `best_epoch` (the one with the
        lowest perplexity), `train_loss` (nats a token, mean over the last epoch), `steps`, `tokens`.

    Raises:
        TrainingDiverged: a log-probability, a loss or a gradient is not finite.
    """
    torch.manual_seed(config.seed)
    order, cache = torch.Generator().manual_seed(config.seed), TrunkCache()
    parameters = roles.trainable(POLICY)
    kept = [value.detach().clone() for value in parameters]
    optimiser = adamw(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    batches = epochs_of(len(train), epochs=config.epochs, batch_size=config.batch_size, generator=order)
    steps = len(batches)
    warmup = round(config.warmup_fraction * steps)
    state = LoopState({"policy": parameters, "kept": kept}, {"policy": optimiser})
    so_far = checkpoints.restore(state)
    if so_far is None:
        base = perplexity(roles, POLICY, validation, pad_id, cache=cache)
        tracker.metrics({"sft/validation_perplexity": base}, step=0)
        so_far = {"step": 0, "base": base, "best": base, "kept": base, "best_epoch": 0, "train_loss": 0.0, "tokens": 0}
        so_far |= {"epoch_loss": 0.0, "epoch_tokens": 0}
    for step, batch_of in enumerate(batches[so_far["step"] :], start=so_far["step"] + 1):
        # Sorted by length, a batch's pieces carry little padding; what the batch holds stays random.
        batch = sorted((train[row] for row in batch_of.rows), key=len)
        rate = config.learning_rate * rate_factor(step - 1, steps=steps, warmup=warmup, schedule=config.schedule)
        set_rate(optimiser, rate)
        token_count = sum(len(example.response) for example in batch)
        loss, own = 0.0, processes.own(batch)
        for start in range(0, len(own), config.micro_batch_size):
            part = own[start : start + config.micro_batch_size]
            logprobs_BT, mask_BT = response_logprobs(roles, POLICY, part, pad_id, cache)
            share = -logprobs_BT.masked_fill(~mask_BT, 0).sum() / token_count
            require_finite(
                {"A log-probability": logprobs_BT, "The loss": share},
                where="sft",
                batch=partial(_tensors, part, pad_id),
            )
            share.backward()
            loss += share.item()
        loss = processes.add_up({"loss": loss})["loss"]
        norm = step_clipped(
            optimiser,
            parameters,
            max_grad_norm=config.max_grad_norm,
            where="sft",
            batch=partial(_tensors, batch, pad_id),
        )
        batch_tokens = sum(map(len, batch))
        so_far["epoch_loss"] += loss * token_count
        so_far["epoch_tokens"] += token_count
        so_far["tokens"] += batch_tokens
        tracker.metrics({"sft/loss": loss, "sft/grad_norm": norm, "sft/learning_rate": rate}, step=step)
        tracker.progress(step, steps, unit="steps", tokens=batch_tokens, note=f"loss {loss:.3f}")
        if batch_of.ends_epoch:
            current = perplexity(roles, POLICY, validation, pad_id, cache=cache)
            tracker.metrics({"sft/validation_perplexity": current, "sft/epoch": batch_of.epoch}, step=step)
            if better := current < so_far["best"]:
                so_far |= {"best": current, "best_epoch": batch_of.epoch}
            if better or config.keep == "last":
                so_far["kept"] = current
                copy_into(kept, parameters)
            so_far |= {
                "train_loss": so_far["epoch_loss"] / so_far["epoch_tokens"],
                "epoch_loss": 0.0,
                "epoch_tokens": 0,
            }
        so_far["step"] = step
        checkpoints.offer(step, state, so_far)
    copy_into(parameters, kept)
    return {
        "validation_perplexity": so_far["kept"],
        "base_perplexity": so_far["base"],
        "best_epoch": so_far["best_epoch"],
        "train_loss": so_far["train_loss"],
        "steps": steps,
        "tokens": so_far["tokens"],
    }
