"""Supervised fine-tuning: the loss is the responses' alone, however a batch is cut, and the best epoch is kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core.data import encode_prompt
from rlhf_core.errors import TrainingDiverged
from rlhf_core.models import REFERENCE, Roles, load_policy
from rlhf_core.records import Demonstration
from rlhf_core.sft import (
    POLICY,
    Example,
    encode_demonstrations,
    perplexity,
    response_logprobs,
    train_sft,
)
from rlhf_core.tracking import MemoryTracker, NullTracker

PAD = 0
# Uneven prompts and responses; the PAD ids inside the first are ordinary tokens.
EXAMPLES = [
    Example([7, 20, PAD], [35, PAD, 90, 2]),
    Example([12, 5, 77, 31, 8, 64, 19], [250, 3, 2]),
    Example([40], [41, 42, 2]),
    Example([9, 9], [10, 11, 12, 13, 14, 15, 2]),
]
OTHERS = [Example([50, 51, 52], [60, 61, 2]), Example([70, 71], [80, 81, 82, 83, 2])]


def policy(folder: Path, config: Any, *, method: str = "lora") -> Roles:
    roles = Roles(folder, config)
    torch.manual_seed(7)  # the adapter's A is drawn here
    roles.add(POLICY, method=method)
    return roles


def slow_logprobs(folder: Path, example: Example) -> Tensor:
    """Log-probs of the response's tokens by the plain model, one example at a time and without padding."""
    with torch.no_grad():
        logits_SV = load_policy(folder)(input_ids=torch.tensor([example.prompt + example.response])).logits[0]
    logits_TV = logits_SV[len(example.prompt) - 1 : -1]
    return logits_TV.log_softmax(-1)[torch.arange(len(example.response)), torch.tensor(example.response)]


def weights(roles: Roles) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in roles.trainable(POLICY)]


def test_demonstrations_are_encoded_with_their_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [Demonstration((("user", "hi"),), "A yellow lemon."), Demonstration((("user", "why?"),), "Because.")]
    whole = encode_demonstrations(records, tokenizer, system="", max_response_tokens=100)
    for record, example in zip(records, whole, strict=True):
        assert example.prompt == encode_prompt(tokenizer, record.prompt, "")
        assert tokenizer.decode(example.response[:-1]) == record.response
        assert example.response[-1] == tokenizer.eos_token_id
        assert len(example) == len(example.prompt) + len(example.response)
    cut = encode_demonstrations(records, tokenizer, system="", max_response_tokens=3)
    assert [example.response for example in cut] == [example.response[:3] for example in whole]
    (system,) = encode_demonstrations(records[:1], tokenizer, system="Be brief.", max_response_tokens=3)
    assert system.prompt == encode_prompt(tokenizer, records[0].prompt, "Be brief.")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logprobs_are_those_of_the_responses_alone(request: pytest.FixtureRequest, name: str) -> None:
    folder = request.getfixturevalue(name)
    with torch.no_grad():
        logprobs_BT, mask_BT = response_logprobs(Roles(folder), REFERENCE, EXAMPLES, PAD)
    assert mask_BT.sum(1).tolist() == [len(example.response) for example in EXAMPLES]
    for row, example in enumerate(EXAMPLES):
        expected = slow_logprobs(folder, example)
        torch.testing.assert_close(logprobs_BT[row][mask_BT[row]], expected, rtol=1e-4, atol=1e-5)  # float32


def test_perplexity_equals_the_slow_version_whatever_the_batch(llama: Path) -> None:
    every = torch.cat([slow_logprobs(llama, example) for example in EXAMPLES])  # each token weighs the same
    roles = Roles(llama)
    for size in (1, 3, 16):
        found = perplexity(roles, REFERENCE, EXAMPLES, PAD, batch_size=size)
        assert found == pytest.approx(math.exp(-every.double().mean().item()), rel=1e-5)  # float32


def test_the_first_loss_is_the_mean_over_response_tokens(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("sft", batch_size=4, micro_batch_size=2)
    train_sft(policy(llama, config), EXAMPLES, OTHERS, config, pad_id=PAD, tracker=tracker)
    losses = [values["sft/loss"] for _, values in tracker.history if "sft/loss" in values]
    expected = -torch.cat([slow_logprobs(llama, example) for example in EXAMPLES]).mean().item()
    assert losses == pytest.approx([expected], rel=1e-5)  # float32


def test_prompts_teach_nothing(llama: Path, section: Callable[..., Any]) -> None:
    config = section("sft", epochs=1, micro_batch_size=4)
    roles = policy(llama, config, method="full")
    for name, parameter in roles.full[POLICY].named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    logprobs_BT, mask_BT = response_logprobs(roles, POLICY, EXAMPLES[1:2], PAD)
    (-logprobs_BT[mask_BT].sum()).backward()
    gradient_VD = roles.full[POLICY].lm_head.weight.grad
    # A row's gradient is −Σ (1[target] − p) h: the targets' rows are where it is large.
    response, prompt = set(EXAMPLES[1].response), set(EXAMPLES[1].prompt)
    norms = gradient_VD.norm(dim=1)
    assert norms[sorted(response)].min() > 2 * norms[sorted(prompt - response)].max()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_cutting_a_batch_changes_no_weight(llama: Path, section: Callable[..., Any], method: str) -> None:
    found = {}
    for size in (1, 2, 4):
        config = section("sft", method=method, learning_rate=1e-3, epochs=3, micro_batch_size=size)
        roles = policy(llama, config, method=method)
        train_sft(roles, EXAMPLES, EXAMPLES, config, pad_id=PAD, tracker=NullTracker())
        found[size] = weights(roles)
    for size in (1, 2):
        for ours, theirs in zip(found[size], found[4], strict=True):
            # float32: a gradient near 0 differs in its last digits, which AdamW divides by ε = 1e-5
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_last_batch_of_an_epoch_may_be_small(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("sft", epochs=2, batch_size=3)
    final = train_sft(policy(llama, config), EXAMPLES, OTHERS, config, pad_id=PAD, tracker=tracker)
    assert final["steps"] == 2 * 2
    assert final["tokens"] == 2 * sum(map(len, EXAMPLES))
    assert [step for step, values in tracker.history if "sft/loss" in values] == [1, 2, 3, 4]
    assert [step for step, values in tracker.history if "sft/validation_perplexity" in values] == [0, 2, 4]


def test_it_learns(llama: Path, section: Callable[..., Any]) -> None:
    config = section("sft", lora_layers=0, epochs=12)
    roles = policy(llama, config)
    final = train_sft(roles, EXAMPLES, EXAMPLES, config, pad_id=PAD, tracker=NullTracker())
    assert final["validation_perplexity"] < 0.2 * final["base_perplexity"]
    assert final["train_loss"] < 0.7 * math.log(final["base_perplexity"])


def test_the_best_epoch_is_kept(llama: Path, section: Callable[..., Any]) -> None:
    # What is learnt by heart soon makes other responses unlikely: the last epoch is not the best.
    tracker, config = MemoryTracker(), section("sft", lora_layers=0, epochs=6, learning_rate=2e-2)
    roles = policy(llama, config)
    final = train_sft(roles, EXAMPLES, [*OTHERS, EXAMPLES[2]], config, pad_id=PAD, tracker=tracker)
    history = [v["sft/validation_perplexity"] for _, v in tracker.history if "sft/validation_perplexity" in v]
    assert final["base_perplexity"] == history[0]
    assert final["validation_perplexity"] == min(history)
    assert final["best_epoch"] == history.index(min(history))
    assert 0 < final["best_epoch"] < 6, history  # otherwise nothing was brought back
    found = perplexity(roles, POLICY, [*OTHERS, EXAMPLES[2]], PAD)
    assert found == pytest.approx(final["validation_perplexity"], rel=1e-9)


def test_the_last_epoch_is_kept_where_that_is_asked_for(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("sft", lora_layers=0, epochs=6, learning_rate=2e-2, keep="last")
    roles = policy(llama, config)
    final = train_sft(roles, EXAMPLES, [*OTHERS, EXAMPLES[2]], config, pad_id=PAD, tracker=tracker)
    history = [v["sft/validation_perplexity"] for _, v in tracker.history if "sft/validation_perplexity" in v]
    assert final["validation_perplexity"] == history[-1] > min(history)
    assert final["best_epoch"] == history.index(min(history)) < 6
    found = perplexity(roles, POLICY, [*OTHERS, EXAMPLES[2]], PAD)
    assert found == pytest.approx(history[-1], rel=1e-9)


def test_where_every_epoch_is_worse_the_base_stays(llama: Path, section: Callable[..., Any]) -> None:
    config = section("sft", method="full", learning_rate=0.5, epochs=2)
    roles = policy(llama, config, method="full")
    before = weights(roles)
    final = train_sft(roles, EXAMPLES, OTHERS, config, pad_id=PAD, tracker=NullTracker())
    assert final["best_epoch"] == 0
    assert final["validation_perplexity"] == final["base_perplexity"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(roles), before, strict=True))


def test_the_seed_decides_the_order(llama: Path, section: Callable[..., Any]) -> None:
    found = []
    for seed in (0, 0, 1):
        config = section("sft", seed=seed, batch_size=1)
        roles = policy(llama, config)
        train_sft(roles, EXAMPLES, EXAMPLES, config, pad_id=PAD, tracker=NullTracker())
        found.append(weights(roles))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], found[2], strict=True))


def test_the_rate_follows_its_schedule_and_the_gradient_is_clipped(llama: Path, section: Callable[..., Any]) -> None:
    settings = {"epochs": 4, "batch_size": 2, "schedule": "linear", "warmup_fraction": 0.25, "learning_rate": 1e-2}
    moved = {}
    for limit in (1e-9, 1.0):
        tracker, config = MemoryTracker(), section("sft", **settings, max_grad_norm=limit)
        roles = policy(llama, config)
        before = weights(roles)
        train_sft(roles, EXAMPLES, EXAMPLES, config, pad_id=PAD, tracker=tracker)
        moved[limit] = max((a - b).abs().max().item() for a, b in zip(weights(roles), before, strict=True))
        steps = [values for _, values in tracker.history if "sft/learning_rate" in values]
        # 8 steps, 2 of warm-up: ⅓ ⅔, then 1 down to ⅙
        expected = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert [step["sft/learning_rate"] for step in steps] == pytest.approx([1e-2 * x for x in expected], rel=1e-9)
        assert min(step["sft/grad_norm"] for step in steps) > 1e-3  # the norm before clipping
    assert moved[1e-9] < 1e-4 * moved[1.0]


def test_a_loss_that_is_no_number_stops_the_run(llama: Path, section: Callable[..., Any]) -> None:
    config = section("sft", method="full")
    roles = policy(llama, config, method="full")
    with torch.no_grad():
        next(iter(roles.full[POLICY].parameters())).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="A log-probability of sft is nan") as found:
        train_sft(roles, EXAMPLES, OTHERS, config, pad_id=PAD, tracker=NullTracker())
    assert found.value.batch["ids_BS"].shape[0] == 4  # the batch that showed it
