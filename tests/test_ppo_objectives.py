"""Several objectives: what responses are worth, what the policy then learns from, and that a limit is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core.errors import ConfigError
from rlhf_core.functional import gae, shape_rewards, whiten
from rlhf_core.models import Normaliser, Roles, pack
from rlhf_core.objectives import as_outputs, multiplier_of, require_axes, worth_of
from rlhf_core.ppo import COST, POLICY, REWARD, VALUE, add_roles, measure_rollouts, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.rollouts import sample
from rlhf_core.tracking import MemoryTracker, NullTracker

PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13], [100, 101, 102, 103]]
CONSTRAINED = {"objective": "constrained", "cost_axis": "harmless", "missing_eos_penalty": 0.5}
OF_AXES = {"helpful": Normaliser(0.2, 0.5), "harmless": Normaliser(-0.4, 1.5)}
# Two members, an overall score and two axes, of two responses.
OUTPUTS_BMH = torch.tensor([[[1.0, 2.0, -1.0], [3.0, 4.0, 0.0]], [[0.0, -2.0, 1.0], [0.0, -2.0, 2.0]]])
AXES = ["helpful", "harmless"]


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-4, atol=1e-5)  # float32


# ---- what responses are worth ----------------------------------------------------------------------------------------


def test_the_score_is_the_mean_of_the_members_and_axes_are_told_beside_it(section: Callable[..., Any]) -> None:
    found = worth_of(OUTPUTS_BMH, AXES, section("ppo", spread_coef=0.5))
    close(found.spread_B, [1.0, 0.0])
    close(found.score_B, [2.0 - 0.5, 0.0])
    close(found.axes["helpful"], [3.0, -2.0])
    close(found.axes["harmless"], [-0.5, 1.5])
    assert found.cost_B is None


def test_weights_come_before_members_are_compared(section: Callable[..., Any]) -> None:
    # Members' sums 0.5 · 2 − (−1) = 2 and 0.5 · 4 − 0 = 2: they agree. Then −1 − 1 = −2 and −1 − 2 = −3.
    weights = {"harmless": -1.0, "helpful": 0.5}
    found = worth_of(OUTPUTS_BMH, AXES, section("ppo", objective="weighted", axis_weights=weights, spread_coef=1.0))
    close(found.spread_B, [0.0, 0.5])
    close(found.score_B, [2.0, -2.5 - 0.5])


def test_an_order_of_axes_clips_each_and_needs_the_first(section: Callable[..., Any]) -> None:
    # harmless −0.5 is short of 1; 1.5 counts as 1 and lets helpful −2, at the clip of 1.8 counts as −1.8, add 0.
    config = section(
        "ppo", objective="lexicographic", axis_order=["harmless", "helpful"], thresholds={"harmless": 1.0},
        score_clip=1.8,
    )  # fmt: skip
    close(worth_of(OUTPUTS_BMH, AXES, config).score_B, [-0.5, 1.0])
    close(worth_of(OUTPUTS_BMH + torch.tensor([0.0, 1.0, 1.0]), AXES, config).score_B, [0.5, 1.0 + 0.8])


def test_a_cost_is_the_score_of_its_axis_with_the_opposite_sign(section: Callable[..., Any]) -> None:
    found = worth_of(OUTPUTS_BMH, AXES, section("ppo", **CONSTRAINED))
    assert found.cost_B is not None
    close(found.cost_B, [0.5, -1.5])
    close(found.score_B, [2.0, 0.0])
    weighted = worth_of(OUTPUTS_BMH, AXES, section("ppo", **CONSTRAINED, axis_weights={"helpful": 2.0}))
    close(weighted.score_B, [6.0, -4.0])


def test_a_score_of_ones_own_may_have_axes() -> None:
    like = torch.zeros(1, dtype=torch.float32)
    axes, outputs_BMH = as_outputs({"a": torch.tensor([1, 2]), "score": torch.tensor([5.0, 6.0])}, like)
    assert axes == ["a"]
    assert outputs_BMH.tolist() == [[[5.0, 1.0]], [[6.0, 2.0]]]
    assert as_outputs({"a": torch.tensor([1.0])}, like)[1].tolist() == [[[0.0, 1.0]]]
    assert as_outputs(torch.tensor([3.0], dtype=torch.float64), like)[1].dtype == torch.float32


def test_an_axis_that_nothing_scores_is_named(section: Callable[..., Any]) -> None:
    config = section("ppo", **CONSTRAINED)
    require_axes(config, ["harmless"])
    with pytest.raises(ConfigError, match=r"names the axis 'harmless', which .* does not have; found kind"):
        require_axes(config, ["kind"])
    assert multiplier_of(section("ppo")) is None


# ---- a cost that is limited ------------------------------------------------------------------------------------------


@pytest.fixture
def ready(llama: Path, section: Callable[..., Any], tmp_path: Path) -> Callable[..., Roles]:
    """A model with PPO's roles, of a reward model with two axes."""

    def build(cost_axis: str = "harmless") -> Roles:
        if not (tmp_path / "reward").is_dir():
            reward = Roles(llama, section("reward"))
            torch.manual_seed(3)
            reward.add(REWARD, head=True, axes=AXES)
            with torch.no_grad():
                for parameter in reward.trainable(REWARD):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            reward.normalisers[REWARD], reward.axes[REWARD] = Normaliser(0.3, 0.7), dict(OF_AXES)
            reward.save(REWARD, tmp_path / "reward")
        roles = Roles(llama, section("ppo"))
        torch.manual_seed(4)
        add_roles(roles, str(tmp_path / "reward"), method="lora", cost_axis=cost_axis)
        return roles

    return build


def roll(roles: Roles, tokenizer: PreTrainedTokenizerFast) -> Sampled:
    return sample(
        roles.language_model(POLICY), PROMPTS * 2, max_tokens=6, temperature=1.0,
        stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


@torch.no_grad()
def test_the_cost_head_starts_as_the_cost_and_the_other_as_the_score(ready: Callable[..., Roles]) -> None:
    roles = ready()
    trunk = roles.trunk(pack(PROMPTS, None, 0))
    raw_BH, value_BH = roles.outputs(trunk, REWARD), roles.outputs(trunk, VALUE)
    close(value_BH[:, 0], (raw_BH[:, 0] - 0.3) / 0.7)
    close(value_BH[:, 1], -(raw_BH[:, 2] + 0.4) / 1.5)
    assert list(roles.axes[VALUE]) == [COST]
    assert not ready("").axes[VALUE]


@torch.no_grad()
def test_a_value_model_with_a_cost_head_is_continued(ready: Callable[..., Roles], llama: Path, tmp_path: Path,
                                                     section: Callable[..., Any]) -> None:  # fmt: skip
    for before in ("harmless", ""):
        first = ready(before)
        first.trainable(VALUE)[-1].add_(0.25)
        for role in (POLICY, VALUE):
            first.save(role, tmp_path / f"run{before}" / role)
        for after in ("harmless", ""):
            roles = Roles(llama, section("ppo"))
            add_roles(
                roles, str(tmp_path / "reward"), method="lora", start=str(tmp_path / f"run{before}"), cost_axis=after
            )
            assert list(roles.axes[VALUE]) == ([COST] if after else [])
            found, theirs = (one.outputs(one.trunk(pack(PROMPTS, None, 0)), VALUE) for one in (roles, first))
            if before == after:
                close(found, theirs)


@torch.no_grad()
def test_an_unknown_cost_axis_is_named(ready: Callable[..., Roles]) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.cost_axis names 'kind'; expected .*: helpful, harmless"):
        ready("kind")


@torch.no_grad()
def test_advantages_are_those_of_reward_and_cost_by_the_multiplier(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles, config = ready(), section("ppo", **CONSTRAINED, whiten_advantages=False, score_clip=1.5, lam=0.9)
    for parameter in roles.trainable(POLICY):
        parameter.add_(torch.randn_like(parameter) * 0.1)
    sampled = roll(roles, tokenizer)
    assert 0 < sampled.stopped_B.float().mean() < 1
    measured = measure_rollouts(roles, sampled, config, kl_coef=0.3, multiplier=3.0)
    rollouts, mask_BT = measured.rollouts, sampled.mask_BT
    assert rollouts.old_cost_values_BT is not None
    assert rollouts.cost_returns_BT is not None
    rows = [prompt + answer for prompt, answer in zip(sampled.prompts, sampled.responses(), strict=True)]
    raw_BH = roles.output_rows(rows, [REWARD], 0)[:, 0]
    cost_B, score_B = -(raw_BH[:, 2] + 0.4) / 1.5, (raw_BH[:, 0] - 0.3) / 0.7
    missing_B = 0.5 * (~sampled.stopped_B).float()
    pair = (rollouts.old_logprobs_BT, rollouts.ref_logprobs_BT, mask_BT)
    rewards_BT = shape_rewards(score_B.clamp(-1.5, 1.5) - missing_B, *pair, kl_coef=0.3)
    costs_BT = -shape_rewards(-cost_B.clamp(-1.5, 1.5) - missing_B, *pair, kl_coef=0.3)
    of_reward = gae(rewards_BT, rollouts.old_values_BT, mask_BT, gamma=1.0, lam=0.9)
    of_cost = gae(costs_BT, rollouts.old_cost_values_BT, mask_BT, gamma=1.0, lam=0.9)
    close(rollouts.advantages_BT, (of_reward.advantages_BT - 3 * of_cost.advantages_BT) / 4)
    close(rollouts.cost_returns_BT, of_cost.returns_BT)
    close(rollouts.returns_BT, of_reward.returns_BT)
    assert measured.metrics["ppo/cost"] == pytest.approx(cost_B.mean().item(), rel=1e-4)
    assert measured.metrics["ppo/axes/harmless/score"] == pytest.approx(-cost_B.mean().item(), rel=1e-4)
    assert measured.metrics["ppo/lambda"] == 3.0
    white = measure_rollouts(
        roles, sampled, config.model_copy(update={"whiten_advantages": True}), kl_coef=0.3, multiplier=3.0
    ).rollouts
    close(white.advantages_BT, whiten(rollouts.advantages_BT, mask_BT))


def test_both_value_heads_learn_and_the_multiplier_waits_for_the_policy(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles, tracker = ready(), MemoryTracker()
    heads: Any = roles.axis_heads[VALUE]
    before = heads.weight.detach().clone()
    config = section("ppo", **CONSTRAINED, updates=4, value_warmup_updates=2, cost_limit=-9.0, cost_memory=2,
                     micro_batch_size=2)  # fmt: skip
    final, _ = train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker)
    seen = [metrics for _, metrics in tracker.history]
    assert (heads.weight - before).abs().max() > 1e-3
    assert [metrics["ppo/lambda"] == 1.0 for metrics in seen] == [True, True, True, False]
    assert ["ppo/mean_cost" in metrics for metrics in seen] == [False, False, True, True]
    assert seen[3]["ppo/mean_cost"] == pytest.approx((seen[2]["ppo/cost"] + seen[3]["ppo/cost"]) / 2, rel=1e-9)
    # log λ ← 0 + 0.2 · 1 · (cost + 9)
    expected = torch.tensor(0.2 * (seen[2]["ppo/cost"] + 9), dtype=torch.float64).exp().item()
    assert seen[3]["ppo/lambda"] == pytest.approx(expected, rel=1e-9)
    assert all(metrics["ppo/cost_value_loss"] > 0 for metrics in seen)
    assert final["axes/helpful/score"] == seen[3]["ppo/axes/helpful/score"]


def test_the_first_update_has_moved_nothing_with_a_cost_too(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    train_ppo(ready(), PROMPTS, section("ppo", **CONSTRAINED), tokenizer=tokenizer, tracker=tracker)
    ((_, metrics),) = tracker.history
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)  # float32
    assert metrics["ppo/policy_loss"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_without_the_axis_is_refused_before_anything_is_sampled(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = section("ppo", objective="weighted", axis_weights={"kind": 1.0})
    with pytest.raises(ConfigError, match=r"names the axis 'kind'.* found helpful, harmless"):
        train_ppo(ready(""), PROMPTS, config, tokenizer=tokenizer, tracker=NullTracker())


# ---- a toy task whose answer is known --------------------------------------------------------------------------------

LIMIT = 0.2  # 3.6 tokens; answers begin at 4.7


def low_and_brief(found: Sampled) -> dict[str, Tensor]:
    """Low tokens are worth something, each one less than the one before it, and every token costs."""
    lengths_B = found.mask_BT.sum(1).float()
    low_B = ((found.ids_BT < 150) & found.mask_BT).sum(1).float()
    return {"score": 2 * low_B.sqrt() - 2, "brevity": 1 - lengths_B / 3, "low": low_B / lengths_B}


def climb(llama: Path, section: Callable[..., Any], tokenizer: Any, seed: int, **changes: Any) -> tuple[Any, ...]:
    """Mean cost and share of low tokens in the first update and in the last eight, with a score of its own."""
    config = section(
        "ppo", seed=seed, method="full", updates=30, rollouts=64, minibatch_size=32, micro_batch_size=32, epochs=2,
        learning_rate=4e-3, value_learning_rate=4e-3, schedule="linear", lam=0.95, kl_coef=0.1, early_stop_kl=0.2,
        lambda_learning_rate=0.1, cost_memory=2, **changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    roles, tracker = Roles(llama, config), MemoryTracker()
    roles.add(POLICY, method="full")
    roles.add(VALUE, method="full", head=True, axes=[COST] if config.cost_axis else [])
    train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker, score=low_and_brief)
    seen = [(-metrics["ppo/axes/brevity/score"], metrics["ppo/axes/low/score"]) for _, metrics in tracker.history]
    last = [sum(column) / 8 for column in zip(*seen[-8:], strict=True)]
    return (*seen[0], *last)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2, 3))])
def test_a_constraint_brings_the_cost_under_its_limit_and_the_reward_is_learned_all_the_same(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    limits = {"objective": "constrained", "cost_axis": "brevity", "cost_limit": LIMIT}
    first_cost, first_low, cost, low = climb(llama, section, tokenizer, seed, **limits)
    assert first_cost > LIMIT + 0.2
    assert cost <= LIMIT
    assert low > first_low + 0.2


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_without_the_constraint_the_cost_rises(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    first_cost, _, cost, _ = climb(llama, section, tokenizer, seed)
    assert cost > max(first_cost, LIMIT + 0.2)
