"""Direct preference optimisation: a policy from rankings alone, with no reward model and no sampling.

A baseline beside PPO on the same rankings (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). The reference is
the SFT policy: the same model with its adapter off, on the same trunk.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.checkpoints import NO_CHECKPOINTS, Checkpoints, LoopState
from rlhf_core.config import DPO
from rlhf_core.data import encode_prompt, encode_response
from rlhf_core.functional import dpo_loss
from rlhf_core.models import REFERENCE, Roles, TrunkCache
from rlhf_core.optimisation import adamw, copy_into, epochs_of, rate_factor, require_finite, set_rate, step_clipped
from rlhf_core.records import Ranking
from rlhf_core.sft import Example, pack_examples, response_logprobs
from rlhf_core.tracking import Tracker

POLICY = "policy"


class Preference(NamedTuple):
    """Ids of a ranking's K responses, each with the prompt, and its pairs (better, worse) of them."""

    examples: list[Example]
    pairs: list[tuple[int, int]]

    def __len__(self) -> int:
        return sum(map(len, self.examples))  # tokens


def pairs_of(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs of a ranking that are no ties, the better one first."""
    return [(i, j) for i, better in enumerate(ranks) for j, worse in enumerate(ranks) if better < worse]


def encode_preferences(
    rankings: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, *, system: str, max_response_tokens: int
) -> list[Preference]:
    """Rankings as ids; one of nothing but ties is left out."""
    found = []
    for record in rankings:
        if pairs := pairs_of(record.ranks):
            prompt = encode_prompt(tokenizer, record.prompt, system)
            responses = [encode_response(tokenizer, text, limit=max_response_tokens) for text in record.responses]
            found.append(Preference([Example(prompt, response) for response in responses], pairs))
    return found


def whole_logprobs(
    roles: Roles, role: str, preferences: Sequence[Preference], pad_id: int, cache: TrunkCache | None = None
) -> list[Tensor]:
    """(K,) log-probabilities of each ranking's whole responses, nats."""
    rows = list(chain.from_iterable(preference.examples for preference in preferences))
    logprobs_BT, _ = response_logprobs(roles, role, rows, pad_id, cache)  # 0 beyond the response
    return list(logprobs_BT.sum(1).split([len(preference.examples) for preference in preferences]))


@torch.no_grad()
def all_logprobs(
    roles: Roles,
    role: str,
    preferences: Sequence[Preference],
    pad_id: int,
    *,
    size: int,
    cache: TrunkCache | None = None,
    tracker: Tracker | None = None,
) -> list[Tensor]:
    """`whole_logprobs` of many rankings, `size` at a time and without gradients, in the order given."""
    own, found = processes.own(preferences), []
    for start in range(0, len(own), size):
        part = own[start : start + size]
        found += [logprobs_K.tolist() for logprobs_K in whole_logprobs(roles, role, part, pad_id, cache)]
        if tracker is not None:
            tracker.progress(len(found), len(own), unit="rankings read by SFT", tokens=sum(map(len, part)))
    return [torch.tensor(row) for row in processes.gather(found)]


def pair_loss(
    preference: Preference, logprobs_K: Tensor, ref_K: Tensor, *, beta: float, label_smoothing: float
) -> tuple[Tensor, dict[str, float]]:
    """A ranking's loss, the mean over its pairs, and what is to be seen of them: means over the same pairs.

    A reward is β(log π − log π_ref), nats: what the policy would have to be paid to be the best one.
    """
    better, worse = torch.tensor(preference.pairs, device=logprobs_K.device).T
    ref_K = ref_K.to(logprobs_K)
    loss = dpo_loss(
        logprobs_K[better], logprobs_K[worse], ref_K[better], ref_K[worse], beta=beta, label_smoothing=label_smoothing
    )
    with torch.no_grad():
        reward_K = beta * (logprobs_K - ref_K)
        margin = reward_K[better] - reward_K[worse]
        means = {
            "accuracy": (margin > 0).double() + 0.5 * (margin == 0).double(),
            "reward_margin": margin,
            "chosen_reward": reward_K[better],
            "rejected_reward": reward_K[worse],
            "chosen_logprob": logprobs_K[better],
            "rejected_logprob": logprobs_K[worse],
        }
        numbers = torch.stack([loss.double(), *(value.double().mean() for value in means.values())]).tolist()
    return loss, dict(zip(("loss", *means), numbers, strict=True))


def validate(
    roles: Roles,
    preferences: Sequence[Preference],
    references: Sequence[Tensor],
    pad_id: int,
    *,
    beta: float,
    size: int,
    cache: TrunkCache | None = None,
) -> dict[str, float]:
    """Loss without smoothing and accuracy on held-out rankings, each ranking weighing the same."""
    found = all_logprobs(roles, POLICY, preferences, pad_id, size=size, cache=cache)
    rows = [
        pair_loss(preference, logprobs_K, ref_K, beta=beta, label_smoothing=0.0)[1]
        for preference, logprobs_K, ref_K in zip(preferences, found, references, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("loss", "accuracy")}


def train_dpo(
    roles: Roles,
    train: Sequence[Preference],
    validation: Sequence[Preference],
    config: DPO,
    *,
    pad_id: int,
    tracker: Tracker,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """Train role "policy" on the pairs of rankings, and leave it at the epoch with the lowest validation loss.

    Args:
        checkpoints: where a loop that was stopped goes on from.

    Returns:
        Final metrics: `validation_loss` and `validation_accuracy` (the kept epoch's; log 2 and ½ where it is the SFT
        policy itself, epoch 0), `best_epoch`, `rankings`, `pairs`, `steps`, `tokens`.

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
    size = config.micro_batch_size
    # The reference never changes, so it reads everything once; after a stop again, to the same bytes.
    by_reference = all_logprobs(
        roles, REFERENCE, [*train, *validation], pad_id, size=size, cache=cache, tracker=tracker
    )
    references, held_out = by_reference[: len(train)], by_reference[len(train) :]
    state = LoopState({"policy": parameters, "kept": kept}, {"policy": optimiser})
    so_far = checkpoints.restore(state)
    if so_far is None:
        so_far = {"step": 0, "best": math.log(2), "best_accuracy": 0.5, "best_epoch": 0, "tokens": 0}
    for step, batch_of in enumerate(batches[so_far["step"] :], start=so_far["step"] + 1):
        batch = sorted(batch_of.rows, key=lambda row: max(map(len, train[row].examples)))
        rate = config.learning_rate * rate_factor(step - 1, steps=steps, warmup=warmup, schedule=config.schedule)
        set_rate(optimiser, rate)
        means: dict[str, float] = {}
        own = processes.own(batch)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            logprobs = whole_logprobs(roles, POLICY, [train[row] for row in part], pad_id, cache)
            # Each ranking weighs the same, however many pairs it has and however a batch is cut.
            found = [
                pair_loss(train[row], logprobs_K, references[row], beta=config.beta,
                          label_smoothing=config.label_smoothing)
                for row, logprobs_K in zip(part, logprobs, strict=True)
            ]  # fmt: skip
            share = torch.stack([loss for loss, _ in found]).sum() / len(batch)
            require_finite(
                {"A log-probability": torch.cat(logprobs), "The loss": share},
                where="dpo",
                batch=partial(_tensors, [train[row] for row in part], pad_id),
            )
            share.backward()
            for _, numbers in found:
                means = {name: means.get(name, 0.0) + value / len(batch) for name, value in numbers.items()}
        means = processes.add_up(means)
        norm = step_clipped(
            optimiser,
            parameters,
            max_grad_norm=config.max_grad_norm,
            where="dpo",
            batch=partial(_tensors, [train[row] for row in batch], pad_id),
        )
        batch_tokens = sum(len(train[row]) for row in batch)
        so_far["tokens"] += batch_tokens
        tracker.metrics(
            {
                "dpo/loss": means["loss"],
                "dpo/accuracy": means["accuracy"],
                "dpo/reward_margin": means["reward_margin"],
                "dpo/chosen_reward": means["chosen_reward"],
                "dpo/rejected_reward": means["rejected_reward"],
                "dpo/chosen_logprob": means["chosen_logprob"],
                "dpo/rejected_logprob": means["rejected_logprob"],
                "dpo/grad_norm": norm,
                "dpo/learning_rate": rate,
            },
            step=step,
        )
        note = f"loss {means['loss']:.3f}  accuracy {means['accuracy']:.2f}"
        tracker.progress(step, steps, unit="steps", tokens=batch_tokens, note=note)
        if batch_of.ends_epoch:
            current = validate(roles, validation, held_out, pad_id, beta=config.beta, size=size, cache=cache)
            tracker.metrics(
                {"dpo/validation_loss": current["loss"], "dpo/validation_accuracy": current["accuracy"]}, step=step
            )
            if current["loss"] < so_far["best"]:
                so_far |= {
                    "best": current["loss"],
                    "best_accuracy": current["accuracy"],
                    "best_epoch": batch_of.epoch,
                }
                copy_into(kept, parameters)
        so_far["step"] = step
        checkpoints.offer(step, state, so_far)
    copy_into(parameters, kept)
    return {
        "validation_accuracy": so_far["best_accuracy"],
        "validation_loss": so_far["best"],
        "best_epoch": so_far["best_epoch"],
        "rankings": len(train),
        "pairs": sum(len(preference.pairs) for preference in train),
        "steps": steps,
        "tokens": so_far["tokens"],
    }


def _tensors(preferences: Sequence[Preference], pad_id: int) -> dict[str, Tensor]:
    rows = list(chain.from_iterable(preference.examples for preference in preferences))
    return pack_examples(rows, pad_id)._asdict()
