"""DPO: every pair of a ranking counts, rankings weigh alike, the reference stays, and the best epoch is kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core.data import encode_prompt
from rlhf_core.dpo import (
    POLICY,
    Preference,
    all_logprobs,
    encode_preferences,
    pair_loss,
    pairs_of,
    train_dpo,
    validate,
    whole_logprobs,
)
from rlhf_core.errors import TrainingDiverged
from rlhf_core.models import REFERENCE, Roles, load_policy
from rlhf_core.records import Ranking
from rlhf_core.sft import Example
from rlhf_core.tracking import MemoryTracker, NullTracker

PAD = 0


def preference(prompt: list[int], *responses: list[int], ranks: tuple[int, ...]) -> Preference:
    return Preference([Example(prompt, response) for response in responses], pairs_of(ranks))


# K of 2 to 4, a tie, uneven lengths, and a PAD id that is an ordinary token
MIXED = [
    preference([7, 20], [35, PAD, 2], [36, 37, 2], ranks=(1, 2)),
    preference([12, 5, 9], [77, 2], [31, 8, 64, 2], [2], ranks=(3, 1, 2)),
    preference([40], [41, 42, 2], [43, 44, 44, 44, 2], [45, 2], [46, 2], ranks=(1, 2, 2, 4)),
    preference([9, 9, 30, 31, 32], [10, 2], [11, 12, 2], ranks=(2, 1)),
]
# A toy that can be separated: token 100 is in every better response, and nowhere else.
TOY = [preference([n, n + 1], [100, n + 2, 2], [n + 2, n + 3, 2], [2], ranks=(1, 2, 2)) for n in range(10, 58, 4)]


def policy(folder: Path, config: Any) -> Roles:
    roles = Roles(folder, config)
    torch.manual_seed(7)
    roles.add(POLICY, method=config.method)
    return roles


def move(roles: Roles, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.trainable(POLICY):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def weights(roles: Roles) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in roles.trainable(POLICY)]


def train(roles: Roles, rows: list[Preference], config: Any, tracker: Any = None) -> dict[str, Any]:
    return train_dpo(roles, rows, rows, config, pad_id=PAD, tracker=tracker or NullTracker())


def slow_logprob(folder: Path, example: Example) -> float:
    """Of a whole response by the plain model, without padding."""
    with torch.no_grad():
        logits_SV = load_policy(folder)(input_ids=torch.tensor([example.prompt + example.response])).logits[0]
    logprobs_TV = logits_SV[len(example.prompt) - 1 : -1].log_softmax(-1)
    return logprobs_TV[torch.arange(len(example.response)), torch.tensor(example.response)].double().sum().item()


def test_the_pairs_of_a_ranking_are_all_that_are_no_ties() -> None:
    assert pairs_of((1, 2)) == [(0, 1)]
    assert pairs_of((3, 1, 2)) == [(1, 0), (1, 2), (2, 0)]
    assert pairs_of((1, 2, 2)) == [(0, 1), (0, 2)]
    assert pairs_of((2, 2)) == []


def test_rankings_are_encoded_as_rollouts_are_and_ties_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    record = Ranking((("user", "hi"),), ("A lemon.", "A yellow banana."), (2, 1))
    (found,) = encode_preferences(
        [record._replace(ranks=(1, 1)), record], tokenizer, system="Be brief.", max_response_tokens=50
    )
    assert found.pairs == [(1, 0)]
    assert len(found) == sum(map(len, found.examples))
    for example, text in zip(found.examples, record.responses, strict=True):
        assert example.prompt == encode_prompt(tokenizer, record.prompt, "Be brief.")
        assert tokenizer.decode(example.response[:-1]) == text
        assert example.response[-1] == tokenizer.eos_token_id
    (cut,) = encode_preferences([record], tokenizer, system="Be brief.", max_response_tokens=2)
    assert [example.response for example in cut.examples] == [example.response[:2] for example in found.examples]


def test_logprobs_are_sums_over_whole_responses(llama: Path, section: Callable[..., Any]) -> None:
    roles = policy(llama, section("dpo"))
    for found in (
        whole_logprobs(roles, REFERENCE, MIXED, PAD),
        all_logprobs(roles, REFERENCE, MIXED, PAD, size=3),
    ):
        for one, logprobs_K in zip(MIXED, found, strict=True):
            expected = [slow_logprob(llama, example) for example in one.examples]
            assert logprobs_K.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)  # float32


def test_the_loss_of_a_ranking_by_hand() -> None:
    one = preference([1], [2], [2], [2], ranks=(1, 2, 2))
    logprobs_K, ref_K = torch.tensor([-1.0, -4.0, -2.0]), torch.tensor([-3.0, -3.0, -4.0])
    # log-ratios 2, −1, 2; at β = ½ rewards 1, −½, 1: margins 3/2 and 0
    loss, found = pair_loss(one, logprobs_K, ref_K, beta=0.5, label_smoothing=0.0)
    expected = (math.log(1 + math.exp(-1.5)) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # float32, and below
    assert found == pytest.approx(
        {
            "loss": expected,
            "accuracy": (1 + 0.5) / 2,
            "reward_margin": 0.75,
            "chosen_reward": 1.0,
            "rejected_reward": (-0.5 + 1.0) / 2,
            "chosen_logprob": -1.0,
            "rejected_logprob": -3.0,
        },
        rel=1e-6,
    )
    smoothed, _ = pair_loss(one, logprobs_K, ref_K, beta=0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(expected + 0.1 * 0.75, rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_first_loss_is_that_of_equal_policies(llama: Path, section: Callable[..., Any], method: str) -> None:
    tracker, config = MemoryTracker(), section("dpo", method=method, micro_batch_size=2)
    train(policy(llama, config), MIXED, config, tracker)
    first = next(values for _, values in tracker.history if "dpo/loss" in values)
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)  # float32: other rows share the batch
    for name in ("reward_margin", "chosen_reward", "rejected_reward"):
        assert first[f"dpo/{name}"] == pytest.approx(0, abs=1e-5)
    assert first["dpo/grad_norm"] > 1e-3
    assert {name for _, values in tracker.history for name in values} == {
        f"dpo/{name}"
        for name in (
            "loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_logprob",
            "rejected_logprob", "grad_norm", "learning_rate", "validation_loss", "validation_accuracy",
        )
    }  # fmt: skip


def test_each_ranking_weighs_the_same(llama: Path, section: Callable[..., Any]) -> None:
    tracker, config = MemoryTracker(), section("dpo", micro_batch_size=3, label_smoothing=0.1)
    roles = policy(llama, config)
    references = all_logprobs(roles, REFERENCE, MIXED, PAD, size=4)
    move(roles)
    with torch.no_grad():
        each = [
            pair_loss(one, *pair, beta=0.1, label_smoothing=0.1)[1]["loss"]
            for one, *pair in zip(MIXED, whole_logprobs(roles, POLICY, MIXED, PAD), references, strict=True)
        ]
    train(roles, MIXED, config, tracker)
    assert [values["dpo/loss"] for _, values in tracker.history if "dpo/loss" in values] == pytest.approx(
        [sum(each) / 4], rel=1e-5
    )


def test_validation_is_not_smoothed(llama: Path, section: Callable[..., Any]) -> None:
    roles = policy(llama, section("dpo"))
    references = all_logprobs(roles, REFERENCE, MIXED, PAD, size=4)
    found = validate(roles, MIXED, references, PAD, beta=0.3, size=2)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-5)
    move(roles)
    found = validate(roles, MIXED, references, PAD, beta=0.3, size=2)
    with torch.no_grad():
        rows = [
            pair_loss(one, *pair, beta=0.3, label_smoothing=0.0)[1]
            for one, *pair in zip(MIXED, whole_logprobs(roles, POLICY, MIXED, PAD), references, strict=True)
        ]
    for name in ("loss", "accuracy"):
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / 4, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_cutting_a_batch_changes_no_weight(llama: Path, section: Callable[..., Any], method: str) -> None:
    found = {}
    for size in (1, 2, 4):
        config = section("dpo", method=method, learning_rate=1e-3, epochs=3, micro_batch_size=size)
        roles = policy(llama, config)
        train(roles, MIXED, config)
        found[size] = weights(roles)
    for size in (1, 2):
        for ours, theirs in zip(found[size], found[4], strict=True):
            # float32: a gradient near 0 differs in its last digits, which AdamW divides by ε = 1e-5
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_a_preference_that_can_be_separated(llama: Path, section: Callable[..., Any], method: str) -> None:
    rate = 1e-2 if method == "lora" else 2e-3
    tracker, config = MemoryTracker(), section("dpo", method=method, lora_layers=0, learning_rate=rate, epochs=8)
    roles = policy(llama, config)
    final = train_dpo(roles, TOY[:9], TOY[9:], config, pad_id=PAD, tracker=tracker)
    assert final["validation_accuracy"] == 1.0
    assert final["validation_loss"] < 0.5 < math.log(2)
    assert final["rankings"] == 9
    assert final["pairs"] == 9 * 2
    assert final["steps"] == 8 * 3
    assert final["tokens"] == 8 * sum(map(len, TOY[:9]))
    steps = [values for _, values in tracker.history if "dpo/loss" in values]
    assert steps[-1]["dpo/reward_margin"] > 0.5 + steps[0]["dpo/reward_margin"]
    assert steps[-1]["dpo/loss"] < steps[0]["dpo/loss"] - 0.2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_is_not_touched(llama: Path, section: Callable[..., Any], method: str) -> None:
    config = section("dpo", method=method, epochs=2)
    roles = policy(llama, config)
    before = all_logprobs(roles, REFERENCE, MIXED, PAD, size=2)
    train(roles, MIXED, config)
    moved = all_logprobs(roles, POLICY, MIXED, PAD, size=2)
    after = all_logprobs(roles, REFERENCE, MIXED, PAD, size=2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(moved, before, strict=True))


def test_beta_holds_the_policy_to_the_reference(llama: Path, section: Callable[..., Any]) -> None:
    far = {}
    for beta in (0.05, 2.0):
        config = section("dpo", beta=beta, epochs=10, lora_layers=0)
        roles = policy(llama, config)
        train_dpo(roles, TOY, TOY, config, pad_id=PAD, tracker=NullTracker())
        pairs = zip(*(all_logprobs(roles, role, TOY, PAD, size=4) for role in (POLICY, REFERENCE)), strict=True)
        far[beta] = sum((ours - theirs).abs().sum().item() for ours, theirs in pairs)
    assert far[2.0] < 0.7 * far[0.05]


def test_the_best_epoch_is_kept(llama: Path, section: Callable[..., Any]) -> None:
    # Held out is the toy's opposite, and one of its own: what is learnt soon makes the loss on it larger.
    opposite = Preference(TOY[10].examples, [(1, 0)])
    held_out = [TOY[9], TOY[10], opposite]
    tracker, config = MemoryTracker(), section("dpo", lora_layers=0, epochs=12, learning_rate=5e-3, beta=0.5)
    roles = policy(llama, config)
    final = train_dpo(roles, TOY[:8], held_out, config, pad_id=PAD, tracker=tracker)
    history = [values for _, values in tracker.history if "dpo/validation_loss" in values]
    losses = [math.log(2), *(values["dpo/validation_loss"] for values in history)]
    assert final["validation_loss"] == min(losses)
    assert final["best_epoch"] == losses.index(min(losses))
    assert 0 < final["best_epoch"] < 12, losses  # otherwise nothing was brought back
    assert final["validation_accuracy"] == history[final["best_epoch"] - 1]["dpo/validation_accuracy"]
    references = all_logprobs(roles, REFERENCE, held_out, PAD, size=4)
    found = validate(roles, held_out, references, PAD, beta=0.5, size=4)
    assert found["loss"] == pytest.approx(final["validation_loss"], rel=1e-6)


def test_where_every_epoch_is_worse_sft_stays(llama: Path, section: Callable[..., Any]) -> None:
    config = section("dpo", method="full", epochs=2)
    roles = policy(llama, config)
    before = weights(roles)
    opposite = [Preference(one.examples, [(j, i) for i, j in one.pairs]) for one in TOY[:4]]
    final = train_dpo(roles, TOY[:4], opposite, config, pad_id=PAD, tracker=NullTracker())
    assert (final["best_epoch"], final["validation_loss"], final["validation_accuracy"]) == (0, math.log(2), 0.5)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(roles), before, strict=True))


def test_the_seed_decides_the_order(llama: Path, section: Callable[..., Any]) -> None:
    found = []
    for seed in (0, 0, 1):
        config = section("dpo", seed=seed, batch_size=1)
        roles = policy(llama, config)
        train(roles, MIXED, config)
        found.append(weights(roles))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], found[2], strict=True))


def test_the_rate_follows_its_schedule_and_the_gradient_is_clipped(llama: Path, section: Callable[..., Any]) -> None:
    settings = {"epochs": 4, "batch_size": 2, "schedule": "linear", "warmup_fraction": 0.25}
    moved = {}
    for limit in (1e-9, 1.0):
        tracker, config = MemoryTracker(), section("dpo", **settings, max_grad_norm=limit)
        roles = policy(llama, config)
        before = weights(roles)
        train(roles, MIXED, config, tracker)
        moved[limit] = max((a - b).abs().max().item() for a, b in zip(weights(roles), before, strict=True))
        steps = [values for _, values in tracker.history if "dpo/learning_rate" in values]
        # 8 steps, 2 of warm-up: ⅓ ⅔, then 1 down to ⅙
        expected = [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert [step["dpo/learning_rate"] for step in steps] == pytest.approx([1e-2 * x for x in expected], rel=1e-9)
        assert min(step["dpo/grad_norm"] for step in steps) > 1e-3  # the norm before clipping
    assert moved[1e-9] < 1e-3 * moved[1.0]


def test_a_loss_that_is_no_number_stops_the_run(llama: Path, section: Callable[..., Any]) -> None:
    config = section("dpo", method="full")
    roles = policy(llama, config)
    with torch.no_grad():
        next(iter(roles.full[POLICY].parameters())).fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="A log-probability of dpo is nan") as found:
        train(roles, MIXED, config)
    assert found.value.batch["ids_BS"].shape[0] == sum(len(one.examples) for one in MIXED)
