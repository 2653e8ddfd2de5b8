"""PPO whose value model is a head on the policy: one pass for both, and all else as with a value model of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import passes_of, perturb
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core.errors import ConfigError
from rlhf_core.functional import policy_loss, value_loss
from rlhf_core.models import Normaliser, Roles, pack
from rlhf_core.ppo import COST, POLICY, REWARD, VALUE, add_roles, losses, measure_rollouts, train_ppo
from rlhf_core.rollouts import sample
from rlhf_core.tracking import MemoryTracker

# PEFT sees by itself that GPT-2's Conv1D is transposed, and says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13], [100, 101, 102, 103]]
LIMITED = {"objective": "constrained", "cost_axis": "harmless", "missing_eos_penalty": 0.5}
KINDS = [("llama", "lora"), ("llama", "full"), ("gpt2", "lora"), ("gpt2", "full")]


@pytest.fixture
def ready(section: Callable[..., Any], tmp_path: Path) -> Callable[..., Roles]:
    """A model with PPO's roles, the value model a head; of a reward model with an axis, saved and loaded."""

    def build(folder: Path, *, method: str = "lora", value_network: Any = "shared", **options: str) -> Roles:
        if not (tmp_path / "reward").is_dir():
            reward = Roles(folder, section("reward"))
            torch.manual_seed(3)
            reward.add(REWARD, method=method, head=True, axes=["harmless"])
            perturb(reward, REWARD, seed=0)
            reward.normalisers[REWARD], reward.axes[REWARD] = Normaliser(0.3, 0.7), {"harmless": Normaliser(-0.4, 1.5)}
            reward.save(REWARD, tmp_path / "reward")
        roles = Roles(folder, section("ppo"))
        torch.manual_seed(4)
        add_roles(roles, str(tmp_path / "reward"), method=method, value_network=value_network, **options)
        return roles

    return build


def learn(roles: Roles, config: Any, tokenizer: PreTrainedTokenizerFast) -> list[dict[str, float]]:
    """Metrics of each update."""
    tracker = MemoryTracker()
    train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker)
    return [metrics for _, metrics in tracker.history]


def measured(roles: Roles, config: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Rollouts of a policy that is no copy of the reference."""
    perturb(roles, POLICY, seed=5)
    sampled = sample(
        roles.language_model(POLICY), PROMPTS * 2, max_tokens=6, temperature=1.0,
        stop_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return measure_rollouts(roles, sampled, config, kl_coef=0.1).rollouts


def copies(roles: Roles, role: str) -> list[Tensor]:
    return [value.detach().clone() for value in roles.trainable(role)]


def moved(before: list[Tensor], roles: Roles, role: str) -> float:
    pairs = zip(before, roles.trainable(role), strict=True)
    return max((left - right).abs().max().item() for left, right in pairs)


def gradients(roles: Roles) -> list[Tensor]:
    """Of all that is trained; they are cleared."""
    found = []
    for parameter in (*roles.trainable(POLICY), *roles.trainable(VALUE)):
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        parameter.grad = None
    return found


def close(found: Tensor, expected: Tensor) -> None:
    # float32: rtol 1e-5 of the largest entry, since entries near 0 are differences of larger numbers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(expected.abs().max().item(), 1e-3))


# ---- one pass for both -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_heads_start_at_0_and_read_the_policy(llama: Path, ready: Callable[..., Roles]) -> None:
    roles = ready(llama, cost_axis="harmless")
    perturb(roles, POLICY, seed=5)
    assert [list(value.shape) for value in roles.trainable(VALUE)] == [[1, 32], [1], [1, 32], [1]]
    assert not any(value.any() for value in roles.trainable(VALUE))
    assert roles.heads[REWARD].weight.all()
    perturb(roles, VALUE, seed=6)
    head = roles.heads[VALUE]
    trunk = roles.trunk(pack(PROMPTS, None, 0))
    rows_B = torch.arange(len(PROMPTS))
    last_BD = roles.hidden(trunk, POLICY)[rows_B, trunk.mask_BS.sum(1) - 1]
    close(roles.scores(trunk, VALUE), (last_BD @ head.weight.T + head.bias)[:, 0])


@pytest.mark.parametrize("limited", [{}, LIMITED])
@pytest.mark.parametrize(("name", "method"), KINDS)
def test_one_pass_gives_what_two_give(
    request: pytest.FixtureRequest, ready: Callable[..., Roles], section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast, name: str, method: str, limited: dict[str, Any],
) -> None:  # fmt: skip
    roles = ready(request.getfixturevalue(name), method=method, cost_axis=limited.get("cost_axis", ""))
    config = section("ppo", value_network="shared", value_coef=0.3, **limited)
    rollouts = measured(roles, config, tokenizer)
    with torch.no_grad():
        answer = (rollouts.ids_BT, rollouts.mask_BT)
        close(rollouts.old_logprobs_BT, roles.logprobs(rollouts.trunk, POLICY, *answer, temperature=1.0)[0])
        close(rollouts.old_values_BT, roles.values(rollouts.trunk, VALUE, rollouts.mask_BT))
    perturb(roles, POLICY, seed=6)  # so that ratios differ
    perturb(roles, VALUE, seed=7)
    count = int(rollouts.mask_BT.sum())
    losses(roles, rollouts, config, count, kl_coef=0.1)
    found = gradients(roles)

    mask_BT, options = rollouts.mask_BT, {"token_count": count, "clip_range": 0.2}
    logprobs_BT, _ = roles.logprobs(rollouts.trunk, POLICY, rollouts.ids_BT, mask_BT, temperature=1.0)
    of_policy: Any = policy_loss(logprobs_BT, rollouts.old_logprobs_BT, rollouts.advantages_BT, mask_BT, **options)
    of_policy.loss.backward()
    heads = roles.values_by_head(rollouts.trunk, VALUE, mask_BT)
    old = (rollouts.old_values_BT, rollouts.old_cost_values_BT)
    returns = (rollouts.returns_BT, rollouts.cost_returns_BT)
    for values_BT, old_BT, returns_BT in zip(heads, old, returns, strict=False):
        of_value: Any = value_loss(values_BT, old_BT, returns_BT, mask_BT, **options)
        (0.3 * of_value.loss).backward(retain_graph=True)
    assert len(heads) == 1 + len(limited) // 3
    for ours, theirs in zip(found, gradients(roles), strict=True):
        close(ours, theirs)


def test_it_passes_the_policy_once_where_a_body_of_its_own_is_a_pass_more(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    passes = passes_of(monkeypatch)
    found = {}
    for network in ("own", "shared"):
        roles, config = ready(llama, value_network=network), section("ppo", value_network=network)
        rollouts = measured(roles, config, tokenizer)
        looks = len(passes) // 3  # ten rollouts in pieces of four
        passes.clear()
        losses(roles, rollouts, config, int(rollouts.mask_BT.sum()), kl_coef=0.1)
        found[network] = (looks, list(passes))
        passes.clear()
    assert found == {"own": (4, [POLICY, VALUE]), "shared": (3, [POLICY])}


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(("name", "method"), [*KINDS, ("llama_with_dropout", "lora")])
def test_before_anything_is_learnt_nothing_has_moved(
    request: pytest.FixtureRequest, ready: Callable[..., Roles], section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast, name: str, method: str, micro: int,
) -> None:  # fmt: skip
    roles = ready(request.getfixturevalue(name), method=method)
    perturb(roles, POLICY, seed=5)
    config = section("ppo", value_network="shared", method=method, micro_batch_size=micro, temperature=0.7)
    (metrics,) = learn(roles, config, tokenizer)
    assert 0 < metrics["ppo/eos_rate"] < 1
    # float32: the pieces of learning are cut otherwise than those of measuring
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0, abs=1e-8)
    assert metrics["ppo/clip_fraction"] == 0
    assert metrics["ppo/policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["ppo/value_clip_fraction"] == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_while_the_policy_waits_the_head_alone_learns(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:  # fmt: skip
    roles = ready(llama, method=method)
    before = {role: copies(roles, role) for role in (POLICY, VALUE)}
    config = section("ppo", value_network="shared", method=method, updates=2, value_warmup_updates=1, weight_decay=0.1)
    rollouts = measured(ready(llama, method=method), config, tokenizer)
    losses(roles, rollouts, config, int(rollouts.mask_BT.sum()), kl_coef=0.1, learn_policy=False)
    *of_body, of_weight, of_bias = gradients(roles)
    assert not any(gradient.any() for gradient in of_body)
    assert of_weight.any()
    assert of_bias.any()
    (first, second) = learn(roles, config, tokenizer)
    assert "ppo/policy_loss" not in first
    assert first["ppo/value_grad_norm"] > 1e-3
    assert {"ppo/policy_loss", "ppo/grad_norm", "ppo/value_grad_norm"} <= set(second)
    assert min(moved(before[role], roles, role) for role in (POLICY, VALUE)) > 1e-3


def test_the_values_loss_moves_the_body_by_its_weight(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    perturb(roles, VALUE, seed=7)  # through a head of zeros nothing passes
    rollouts = measured(roles, section("ppo", value_network="shared"), tokenizer)
    rollouts = rollouts._replace(advantages_BT=torch.zeros_like(rollouts.advantages_BT))  # nothing from the policy
    found = {}
    for weight in (0.1, 0.4):
        config = section("ppo", value_network="shared", value_coef=weight)
        losses(roles, rollouts, config, int(rollouts.mask_BT.sum()), kl_coef=0.0)
        found[weight] = gradients(roles)
    assert found[0.1][0].shape != found[0.1][-1].shape
    assert sum(gradient.abs().max().item() > 1e-4 for gradient in found[0.1]) > 2  # more than the head's two
    for small, large in zip(found[0.1], found[0.4], strict=True):
        close(4 * small, large)


def test_body_and_head_are_clipped_each_and_go_at_their_own_rates(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    found = {}
    for limit, rate in ((1.0, 1e-2), (1e-10, 1e-2), (1.0, 1e-4)):
        roles = ready(llama)
        before = {role: copies(roles, role) for role in (POLICY, VALUE)}
        config = section("ppo", value_network="shared", max_grad_norm=limit, value_learning_rate=rate)
        (metrics,) = learn(roles, config, tokenizer)
        assert metrics["ppo/grad_norm"] > 1e-3  # the norms before clipping
        assert metrics["ppo/value_grad_norm"] > 1e-3
        found[limit, rate] = [moved(before[role], roles, role) for role in (POLICY, VALUE)]
    policy, head = found[1.0, 1e-2]
    assert max(found[1e-10, 1e-2]) < 1e-4 * min(policy, head)
    assert found[1.0, 1e-4][0] == pytest.approx(policy, rel=1e-6)
    assert found[1.0, 1e-4][1] < 0.02 * head


def test_recomputing_layers_changes_no_gradient(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles, config = ready(llama), section("ppo", value_network="shared")
    perturb(roles, VALUE, seed=7)
    rollouts = measured(roles, config, tokenizer)
    found = []
    for recompute in (False, True):
        roles.training_section = section("ppo", gradient_checkpointing=recompute)
        losses(roles, rollouts, config, int(rollouts.mask_BT.sum()), kl_coef=0.1)
        found.append(gradients(roles))
    for plain, again in zip(*found, strict=True):
        close(again, plain)


def test_roles_of_the_other_kind_are_noticed(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(AssertionError, match="other value_network"):
        learn(ready(llama), section("ppo"), tokenizer)


# ---- on disk ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cost_axis", ["", "harmless"])
def test_the_head_is_saved_alone_and_continued(
    llama: Path, ready: Callable[..., Roles], tmp_path: Path, cost_axis: str
) -> None:
    first = ready(llama, cost_axis=cost_axis)
    for role in (POLICY, VALUE):
        perturb(first, role, seed=8)
        first.save(role, tmp_path / "run" / role)
    files = {"score.json", "score_head.safetensors", *(["axis_heads.safetensors"] if cost_axis else [])}
    assert {path.name for path in (tmp_path / "run" / VALUE).iterdir()} == files
    second = ready(llama, start=str(tmp_path / "run"), cost_axis=cost_axis)
    assert list(second.axes[VALUE]) == ([COST] if cost_axis else [])
    packed = pack(PROMPTS, None, 0)
    close(*(roles.outputs(roles.trunk(packed), VALUE) for roles in (second, first)))


@pytest.mark.parametrize(("earlier", "wanted"), [("own", "shared"), ("shared", "own")])
def test_a_run_of_the_other_kind_is_not_continued(
    llama: Path, ready: Callable[..., Roles], tmp_path: Path, earlier: str, wanted: str
) -> None:
    first = ready(llama, value_network=earlier)
    for role in (POLICY, VALUE):
        first.save(role, tmp_path / "run" / role)
    what = {"own": "a model of its own", "shared": "a head alone"}[earlier]
    expected = rf"value_network {earlier}, expected {wanted}: .*/value is {what}. Set ppo.value_network to {earlier}\."
    with pytest.raises(ConfigError, match=expected):
        ready(llama, value_network=wanted, start=str(tmp_path / "run"))
