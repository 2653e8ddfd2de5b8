"""PPO: what has to hold in the first update, what a reward is made of, and that the policy follows it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small import passes_of, perturb
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_core.errors import TrainingDiverged
from rlhf_core.functional import RunningMoments, gae, policy_loss, shape_rewards, value_loss
from rlhf_core.models import REFERENCE, Normaliser, Roles, load_policy, pack
from rlhf_core.ppo import POLICY, REWARD, VALUE, Measured, _minibatches, add_roles, losses, measure_rollouts, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.reward import score_samples
from rlhf_core.rollouts import sample
from rlhf_core.tracking import MemoryTracker, NullTracker

# PEFT sees by itself that GPT-2's Conv1D is transposed, and says so each time.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13], [100, 101, 102, 103]]
NORMALISER = Normaliser(0.3, 0.7, 1.0)


@pytest.fixture
def ready(section: Callable[..., Any], tmp_path: Path) -> Callable[..., Roles]:
    """A model with PPO's roles, its reward model saved and loaded as the stages do."""

    def build(folder: Path, *, method: str = "lora", value_network: Any = "own") -> Roles:
        reward = Roles(folder, section("reward"))
        torch.manual_seed(3)
        reward.add(REWARD, method=method, head=True)
        perturb(reward, REWARD)
        reward.normalisers[REWARD] = NORMALISER
        reward.save(REWARD, tmp_path / "reward")
        roles = Roles(folder, section("ppo"))
        torch.manual_seed(4)
        add_roles(roles, str(tmp_path / "reward"), method=method, value_network=value_network)
        return roles

    return build


class Watching(MemoryTracker):
    """Keeps a copy of some parameters at each update."""

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        self.roles = roles
        self.seen: list[dict[str, list[Tensor]]] = [self.copy()]

    def copy(self) -> dict[str, list[Tensor]]:
        return {role: [value.detach().clone() for value in self.roles.trainable(role)] for role in (POLICY, VALUE)}

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        super().metrics(values, step=step)
        self.seen.append(self.copy())

    def moved(self, role: str, before: int, after: int) -> float:
        pairs = zip(self.seen[before][role], self.seen[after][role], strict=True)
        return max((left - right).abs().max().item() for left, right in pairs)


def roll(roles: Roles, tokenizer: PreTrainedTokenizerFast, *, temperature: float = 1.0, tokens: int = 6) -> Sampled:
    found = sample(
        roles.language_model(POLICY),
        PROMPTS * 2,
        max_tokens=tokens,
        temperature=temperature,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(1),
        keep_tops=True,
    )
    assert 0 < found.stopped_B.float().mean().item() < 1  # some end early and some never
    assert len(set(found.mask_BT.sum(1).tolist())) > 2
    return found


def learn(roles: Roles, config: Any, tokenizer: PreTrainedTokenizerFast, tracker: Any = None) -> dict[str, Any]:
    final, _ = train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker or NullTracker())
    return final


# ---- roles -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_value_model_starts_as_the_normalised_reward_model(
    llama: Path, ready: Callable[..., Roles], method: str
) -> None:
    roles = ready(llama, method=method)
    trunk = roles.trunk(pack(PROMPTS, None, 0))
    expected_B = (roles.scores(trunk, REWARD) - NORMALISER.mean) / NORMALISER.std
    torch.testing.assert_close(roles.scores(trunk, VALUE), expected_B, rtol=1e-5, atol=1e-5)  # float32
    assert roles.normalisers[VALUE] == Normaliser()  # or whoever loads it would normalise twice
    assert expected_B.std() > 0.1


@torch.no_grad()
def test_the_policy_starts_as_the_reference_and_the_reward_model_is_frozen(
    llama: Path, ready: Callable[..., Roles]
) -> None:
    roles = ready(llama)
    trunk = roles.trunk(pack(PROMPTS, None, 0))
    assert torch.equal(roles.hidden(trunk, POLICY), roles.hidden(trunk, REFERENCE))
    names = [name for name, parameter in roles.named_parameters() if parameter.requires_grad]
    assert not [name for name in names if REWARD in name]


# ---- the first update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "lora"), ("llama", "full"), ("gpt2", "lora"), ("gpt2", "full"), ("llama_with_dropout", "lora")],
)
def test_before_anything_is_learnt_nothing_has_moved(
    request: pytest.FixtureRequest,
    ready: Callable[..., Roles],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    method: str,
    micro: int,
) -> None:
    # One wrong position, temperature, mask, adapter or a dropout that is on, and these are not what they have to be.
    roles = ready(request.getfixturevalue(name), method=method)
    perturb(roles, POLICY)  # a policy that is no copy of the reference
    tracker = MemoryTracker()
    learn(roles, section("ppo", method=method, micro_batch_size=micro, temperature=0.7), tokenizer, tracker)
    ((_, metrics),) = tracker.history
    assert 0 < metrics["ppo/eos_rate"] < 1
    # float32: the pieces of learning are cut otherwise than those of measuring
    assert metrics["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["ppo/approx_kl"] == pytest.approx(0, abs=1e-8)
    assert metrics["ppo/clip_fraction"] == 0
    assert metrics["ppo/policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["ppo/value_clip_fraction"] == 0
    assert abs(metrics["ppo/kl"]) > 0.01  # to the reference, which the perturbed policy has left


@pytest.mark.parametrize("network", ["shared", "own"])
@pytest.mark.parametrize(("name", "spared"), [("llama", True), ("gpt2", False)])
def test_what_the_policy_computed_while_it_sampled_is_measured_and_not_computed_again(
    request: pytest.FixtureRequest,
    ready: Callable[..., Roles],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spared: bool,
    network: str,
) -> None:
    roles = ready(request.getfixturevalue(name), value_network=network)
    perturb(roles, POLICY)
    sampled, config = roll(roles, tokenizer, temperature=0.7), section("ppo", temperature=0.7, value_network=network)
    assert (sampled.tops is not None) == spared
    passes = passes_of(monkeypatch)
    ours = measure_rollouts(roles, sampled, config, kl_coef=0.1)
    assert (POLICY in passes) == (not spared)
    theirs = measure_rollouts(roles, sampled._replace(tops=None), config, kl_coef=0.1)
    assert POLICY in passes
    for part in ("old_logprobs_BT", "old_values_BT", "advantages_BT"):
        found = [getattr(each.rollouts, part) for each in (ours, theirs)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)  # float32
    assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-4, abs=1e-5)
    if spared:
        with pytest.raises(AssertionError, match="other responses"):
            measure_rollouts(
                roles, sampled._replace(tops=[top_TD[1:] for top_TD in sampled.tops or []]), config, kl_coef=0
            )


def test_a_second_epoch_has_moved(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    learn(ready(llama), section("ppo", epochs=3), tokenizer, tracker)
    ((_, metrics),) = tracker.history
    assert metrics["ppo/minibatches"] == 3
    assert metrics["ppo/approx_kl"] > 1e-5
    assert metrics["ppo/clip_fraction"] > 0


def test_cutting_a_minibatch_changes_no_gradient(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled, config = roll(roles, tokenizer), section("ppo")
    rollouts = measure_rollouts(roles, sampled, config, kl_coef=0.1).rollouts
    perturb(roles, POLICY)  # so that ratios differ and some are clipped
    perturb(roles, VALUE, seed=1)
    count = int(rollouts.mask_BT.sum())
    found: dict[int, tuple[list[Tensor], dict[str, float]]] = {}
    for size in (1, 3, 10):
        metrics: dict[str, float] = {}
        for rows in torch.arange(10).split(size):
            for name, value in losses(roles, rollouts.rows(rows), config, count, kl_coef=0.1).items():
                metrics[name] = metrics.get(name, 0.0) + value
        parameters = [*roles.trainable(POLICY), *roles.trainable(VALUE)]
        found[size] = ([parameter.grad.clone() for parameter in parameters if parameter.grad is not None], metrics)
        for parameter in parameters:
            parameter.grad = None
    assert 0 < found[10][1]["ppo/clip_fraction"] < 1
    for size in (1, 3):
        assert found[size][1] == pytest.approx(found[10][1], rel=1e-4)  # float32
        for ours, theirs in zip(found[size][0], found[10][0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32


# ---- options of the loss ---------------------------------------------------------------------------------------------


def test_answers_to_one_prompt_share_a_minibatch(section: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    config = section("ppo", rollouts=12, samples_per_prompt=3, minibatch_size=6, micro_batch_size=2)
    first, second = ([rows.tolist() for rows in _minibatches(config, generator)] for _ in range(2))
    assert first != second
    for epoch in (first, second):
        assert sorted(row for rows in epoch for row in rows) == list(range(12))
        assert all(rows[start] % 3 == 0 for rows in epoch for start in (0, 3))
        assert all(
            rows[start : start + 3] == list(range(rows[start], rows[start] + 3)) for rows in epoch for start in (0, 3)
        )
    config = section(
        "ppo", rollouts=12, samples_per_prompt=3, minibatch_size=4, micro_batch_size=2
    )  # which three do not fit
    found = [rows.tolist() for rows in _minibatches(config, generator)]
    assert [len(rows) for rows in found] == [4, 4, 4]
    assert sorted(row for rows in found for row in rows) == list(range(12))
    assert found[0] != sorted(found[0])


@pytest.mark.parametrize("network", ["own", "shared"])
def test_a_prompt_computed_once_for_its_answers_changes_no_number(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: Any, network: str
) -> None:
    config = section("ppo", micro_batch_size=4, value_network=network)
    long = [[*prompt, *range(50, 58)] for prompt in PROMPTS[:2] for _ in range(2)]
    found: dict[bool, tuple[Measured, Tensor]] = {}
    for folds in (True, False):
        roles = ready(llama, value_network=network)
        perturb(roles, POLICY)
        roles._folds = folds
        options = {"stop_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id, "max_tokens": 6}
        generator = torch.Generator().manual_seed(1)
        sampled = sample(roles.language_model(POLICY), long, temperature=1.0, generator=generator, **options)
        measured = measure_rollouts(roles, sampled, config, kl_coef=0.05)
        part = measured.rollouts._replace(trunk=roles.folded(measured.rollouts.trunk))
        assert (part.trunk.fold is not None) == folds
        count = int(sampled.mask_BT.sum())
        found[folds] = measured, gradient(roles, lambda: losses(roles, part, config, count, kl_coef=0.05))  # noqa: B023
    ours, plain = found[True], found[False]
    assert ours[0].metrics == pytest.approx(plain[0].metrics, rel=1e-4, abs=1e-5)  # float32
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-5 * float(plain[1].abs().max()))


def gradient(roles: Roles, compute: Callable[[], Any]) -> Tensor:
    """The policy's gradient as one vector after a computation that calls backward."""
    parameters = roles.trainable(POLICY)
    for parameter in parameters:
        parameter.grad = None
    compute()
    found = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


@pytest.fixture
def moved(llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: Any) -> Any:
    """A policy that has left the one that sampled; its rollouts, their token count, and its log-probs and entropies."""
    roles = ready(llama)
    perturb(roles, POLICY, seed=5)
    rollouts = measure_rollouts(roles, roll(roles, tokenizer), section("ppo"), kl_coef=0.1).rollouts
    perturb(roles, POLICY, seed=6)

    def now() -> tuple[Tensor, Tensor]:
        logprobs_BT, entropy_BT = roles.logprobs(
            rollouts.trunk, POLICY, rollouts.ids_BT, rollouts.mask_BT, temperature=1.0, entropy=True
        )
        assert entropy_BT is not None
        return logprobs_BT, entropy_BT

    return roles, rollouts, int(rollouts.mask_BT.sum()), now


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_in_the_loss_adds_its_own_gradient(section: Callable[..., Any], moved: Any, estimator: str) -> None:
    roles, rollouts, count, now = moved
    config = section("ppo", kl_penalty="loss", kl_estimator=estimator)
    plain = gradient(roles, lambda: losses(roles, rollouts, section("ppo"), count, kl_coef=0.3))
    with_kl = gradient(roles, lambda: losses(roles, rollouts, config, count, kl_coef=0.3))

    def own() -> None:
        gap_BT = now()[0] - rollouts.ref_logprobs_BT
        kl_BT = {"k1": gap_BT, "k2": gap_BT**2 / 2, "k3": torch.exp(-gap_BT) - 1 + gap_BT}[estimator]
        (0.3 * kl_BT[rollouts.mask_BT].sum() / count).backward()  # type: ignore[no-untyped-call]

    expected = gradient(roles, own)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(with_kl - plain, expected, rtol=1e-3, atol=1e-6)  # float32, a difference
    found = losses(roles, rollouts, config, count, kl_coef=0.3)
    gap_BT = now()[0].detach() - rollouts.ref_logprobs_BT
    kl_BT = {"k1": gap_BT, "k2": gap_BT**2 / 2, "k3": torch.exp(-gap_BT) - 1 + gap_BT}[estimator]
    assert found["ppo/kl_loss"] == pytest.approx((kl_BT[rollouts.mask_BT].sum() / count).item(), rel=1e-5)  # float32
    assert "ppo/kl_loss" not in losses(roles, rollouts, section("ppo"), count, kl_coef=0.3)


@torch.no_grad()
def test_a_kl_in_the_loss_is_not_in_the_reward_too(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    perturb(roles, POLICY)
    sampled = roll(roles, tokenizer)
    free = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.0)
    paid = measure_rollouts(roles, sampled, section("ppo", kl_penalty="loss"), kl_coef=0.5)
    assert torch.equal(rewards_of(free), rewards_of(paid))
    assert paid.metrics["ppo/kl_coef"] == 0.5
    assert paid.metrics["ppo/kl"] == free.metrics["ppo/kl"]


def test_an_entropy_bonus_adds_its_own_gradient(section: Callable[..., Any], moved: Any) -> None:
    roles, rollouts, count, now = moved
    plain = gradient(roles, lambda: losses(roles, rollouts, section("ppo"), count, kl_coef=0.0))
    config = section("ppo", entropy_coef=0.2)
    with_bonus = gradient(roles, lambda: losses(roles, rollouts, config, count, kl_coef=0.0))
    expected = gradient(roles, lambda: (-0.2 * now()[1][rollouts.mask_BT].sum() / count).backward())
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(with_bonus - plain, expected, rtol=1e-3, atol=1e-6)  # float32, a difference


def test_policy_and_value_are_clipped_each_at_its_own_range(section: Callable[..., Any], moved: Any) -> None:
    roles, rollouts, count, now = moved
    perturb(roles, VALUE, seed=7)

    def expected(clip_range: float, value_clip_range: float) -> tuple[float, float]:
        old = (rollouts.old_logprobs_BT, rollouts.advantages_BT, rollouts.mask_BT)
        policy = policy_loss(now()[0], *old, clip_range=clip_range, token_count=count)
        values_BT = roles.values(rollouts.trunk, VALUE, rollouts.mask_BT)
        old = (rollouts.old_values_BT, rollouts.returns_BT, rollouts.mask_BT)
        value = value_loss(values_BT, *old, clip_range=value_clip_range, token_count=count)
        return policy.loss.item(), value.loss.item()

    config = section("ppo", clip_range=0.05, value_clip_range=0.5)
    found = losses(roles, rollouts, config, count, kl_coef=0.0)
    both = (found["ppo/policy_loss"], found["ppo/value_loss"])
    assert both == pytest.approx(expected(0.05, 0.5), rel=1e-5)  # float32
    for mine, other in zip(both, expected(0.5, 0.05), strict=True):
        assert abs(mine - other) > 1e-3


@torch.no_grad()
def test_returns_are_discounted_as_configured(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    perturb(roles, POLICY)
    sampled = roll(roles, tokenizer)
    config = section("ppo", gamma=0.9, lam=0.8, whiten_advantages=False)
    found = measure_rollouts(roles, sampled, config, kl_coef=0.1)
    kept = found.rollouts
    paid_B = found.scores_B - config.missing_eos_penalty * (~sampled.stopped_B).float()
    rewards_BT = shape_rewards(paid_B, kept.old_logprobs_BT, kept.ref_logprobs_BT, kept.mask_BT, kl_coef=0.1)
    values = (rewards_BT, kept.old_values_BT, kept.mask_BT)
    advantages_BT, returns_BT = gae(*values, gamma=0.9, lam=0.8)
    torch.testing.assert_close(kept.advantages_BT, advantages_BT)
    torch.testing.assert_close(kept.returns_BT, returns_BT)
    for gamma, lam in ((1.0, 0.8), (0.9, 0.95)):
        assert not torch.allclose(kept.returns_BT, gae(*values, gamma=gamma, lam=lam)[1], atol=1e-3)


def test_a_dual_clip_bounds_bad_tokens_that_became_likelier(section: Callable[..., Any], moved: Any) -> None:
    roles, rollouts, count, now = moved
    rollouts = rollouts._replace(advantages_BT=-torch.ones_like(rollouts.advantages_BT))
    plain = losses(roles, rollouts, section("ppo"), count, kl_coef=0.0)["ppo/policy_loss"]
    clipped = losses(roles, rollouts, section("ppo", dual_clip=1.05), count, kl_coef=0.0)["ppo/policy_loss"]
    ratio_BT = torch.exp(now()[0] - rollouts.old_logprobs_BT).detach()
    expected = torch.maximum(ratio_BT, ratio_BT.clamp(0.8, 1.2)).clamp(max=1.05)[rollouts.mask_BT].sum() / count
    assert clipped == pytest.approx(expected.item(), rel=1e-5)  # float32
    assert plain > clipped + 0.01


@torch.no_grad()
def test_scores_are_divided_by_the_deviation_of_all_so_far(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled = roll(roles, tokenizer)
    plain_B = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.0).scores_B
    moments = RunningMoments()
    moments.update(torch.tensor([5.0, -5.0, 0.5]))
    config = section("ppo", scale_scores=True, score_clip=0.4)
    found = measure_rollouts(roles, sampled, config, kl_coef=0.0, moments=moments)
    everything = torch.cat([torch.tensor([5.0, -5.0, 0.5]), plain_B])
    scaled_B = (plain_B / everything.std(correction=0)).clamp(-0.4, 0.4)  # the clip comes after
    torch.testing.assert_close(found.scores_B, scaled_B, rtol=1e-5, atol=1e-6)  # float32
    assert (scaled_B.abs() < 0.4).any()
    assert moments.count == 3 + len(plain_B)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def rewards_of(measured: Measured) -> Tensor:
    """With γ = λ = 1 a return is the sum of the rewards from there on: their differences are the rewards."""
    returns_BT, mask_BT = measured.rollouts.returns_BT, measured.rollouts.mask_BT
    later_BT = torch.cat([returns_BT[:, 1:], torch.zeros(len(returns_BT), 1)], 1)
    return (returns_BT - later_BT).masked_fill(~mask_BT, 0)


def at_the_end(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    placed_BT = torch.zeros(mask_BT.shape)
    placed_BT[torch.arange(len(mask_BT)), mask_BT.sum(1) - 1] = values_B
    return placed_BT


@torch.no_grad()
def test_a_reward_is_the_kl_penalty_and_the_score_at_the_last_token(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    perturb(roles, POLICY)
    sampled = roll(roles, tokenizer)
    measured = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.1)
    rollouts = measured.rollouts
    k1_BT = (rollouts.old_logprobs_BT - rollouts.ref_logprobs_BT).masked_fill(~rollouts.mask_BT, 0)
    assert k1_BT.abs().max() > 0.1
    scores_B = (score_samples(roles, REWARD, sampled) - NORMALISER.mean) / NORMALISER.std
    torch.testing.assert_close(measured.scores_B, scores_B, rtol=1e-4, atol=1e-5)  # float32, here and below
    expected_BT = at_the_end(scores_B, rollouts.mask_BT) - 0.1 * k1_BT
    torch.testing.assert_close(rewards_of(measured), expected_BT, rtol=1e-4, atol=1e-5)
    assert measured.metrics["ppo/reward"] == pytest.approx(expected_BT.sum(1).mean().item(), rel=1e-4, abs=1e-5)
    assert measured.metrics["ppo/score"] == pytest.approx(scores_B.mean().item(), rel=1e-4, abs=1e-5)
    assert measured.metrics["ppo/kl"] == pytest.approx(k1_BT.sum(1).mean().item(), rel=1e-4, abs=1e-5)
    assert measured.metrics["ppo/kl_coef"] == 0.1
    assert measured.metrics["ppo/response_length"] == pytest.approx(sampled.mask_BT.sum().item() / 10, rel=1e-6)
    assert measured.metrics["ppo/eos_rate"] == pytest.approx(sampled.stopped_B.float().mean().item(), rel=1e-6)


@torch.no_grad()
def test_a_score_of_ones_own_takes_the_reward_models_place(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = Roles(llama, section("ppo"))
    roles.add(POLICY)
    roles.add(VALUE, head=True)
    sampled = roll(roles, tokenizer)
    lengths_B = sampled.mask_BT.sum(1).float() - 3
    config = section("ppo", score_clip=2.0, missing_eos_penalty=0.0)
    measured = measure_rollouts(roles, sampled, config, kl_coef=0.0, score=lambda found: found.mask_BT.sum(1) - 3.0)
    assert torch.equal(measured.scores_B, lengths_B.clamp(max=2.0))
    expected_BT = at_the_end(lengths_B.clamp(max=2.0), sampled.mask_BT)
    torch.testing.assert_close(rewards_of(measured), expected_BT, rtol=1e-5, atol=1e-5)  # float32


@torch.no_grad()
def test_a_response_that_never_stopped_pays_exactly_its_penalty(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled = roll(roles, tokenizer)
    free = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.0)
    paid = measure_rollouts(roles, sampled, section("ppo", missing_eos_penalty=2.5), kl_coef=0.0)
    expected_BT = at_the_end(2.5 * (~sampled.stopped_B).float(), sampled.mask_BT)
    torch.testing.assert_close(rewards_of(free) - rewards_of(paid), expected_BT, rtol=1e-5, atol=1e-5)  # float32
    assert torch.equal(free.scores_B, paid.scores_B)  # the score that is reported is the model's own
    share = 1 - sampled.stopped_B.float().mean().item()
    assert free.metrics["ppo/reward"] - paid.metrics["ppo/reward"] == pytest.approx(2.5 * share, abs=1e-5)


@torch.no_grad()
def test_the_penalty_comes_after_the_clip(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled = roll(roles, tokenizer)
    raw_B = (score_samples(roles, REWARD, sampled) - NORMALISER.mean) / NORMALISER.std
    limit = raw_B.abs().median().item()
    config = section("ppo", score_clip=limit, missing_eos_penalty=3.0)
    measured = measure_rollouts(roles, sampled, config, kl_coef=0.0)
    clipped_B = raw_B.clamp(-limit, limit)
    assert 0 < (raw_B.abs() > limit).sum() < 10
    torch.testing.assert_close(measured.scores_B, clipped_B, rtol=1e-4, atol=1e-5)  # float32
    expected_B = clipped_B - 3.0 * (~sampled.stopped_B).float()
    torch.testing.assert_close(rewards_of(measured).sum(1), expected_B, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_old_and_reference_are_the_plain_models_at_the_sampling_temperature(
    llama: Path,
    ready: Callable[..., Roles],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    temperature: float,
) -> None:
    roles = ready(llama)
    perturb(roles, POLICY)
    roles.save(POLICY, tmp_path / "policy")
    sampled = roll(roles, tokenizer, temperature=temperature)
    config = section("ppo", temperature=temperature)
    rollouts = measure_rollouts(roles, sampled, config, kl_coef=0.0).rollouts
    for folder, found_BT in ((tmp_path / "policy", rollouts.old_logprobs_BT), (llama, rollouts.ref_logprobs_BT)):
        model = load_policy(folder)
        for row, (prompt, response) in enumerate(zip(sampled.prompts, sampled.responses(), strict=True)):
            logits_TV = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            log_TV = (logits_TV / temperature).log_softmax(-1)
            expected_T = log_TV[torch.arange(len(response)), torch.tensor(response)]
            torch.testing.assert_close(found_BT[row, : len(response)], expected_T, rtol=1e-4, atol=1e-5)  # float32


@torch.no_grad()
def test_advantages_are_returns_less_values_and_whitened_when_asked(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled = roll(roles, tokenizer)
    plain = measure_rollouts(roles, sampled, section("ppo", whiten_advantages=False), kl_coef=0.1).rollouts
    mask_BT = plain.mask_BT
    expected_BT = (plain.returns_BT - plain.old_values_BT).masked_fill(~mask_BT, 0)
    torch.testing.assert_close(plain.advantages_BT, expected_BT, rtol=1e-4, atol=1e-5)  # float32, here and below
    white = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.1).rollouts
    torch.testing.assert_close(white.returns_BT, plain.returns_BT)  # from advantages before they are whitened
    kept = expected_BT[mask_BT]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(white.advantages_BT[mask_BT], expected, rtol=1e-4, atol=1e-5)
    assert not white.advantages_BT[~mask_BT].any()


@torch.no_grad()
def test_whitened_rewards_keep_their_mean(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    sampled = roll(roles, tokenizer)
    plain, white = (
        rewards_of(measure_rollouts(roles, sampled, section("ppo", whiten_rewards=on), kl_coef=0.1))[sampled.mask_BT]
        for on in (False, True)
    )
    reward, whitened = (
        measure_rollouts(roles, sampled, section("ppo", whiten_rewards=on), kl_coef=0.1).metrics["ppo/reward"]
        for on in (False, True)
    )
    assert whitened == reward  # it stays in reward units
    assert white.mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)  # float32
    assert white.std(correction=0).item() == pytest.approx(1, rel=1e-4)


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_learning_moves_policy_and_value_and_nothing_else(
    llama: Path,
    ready: Callable[..., Roles],
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    method: str,
) -> None:
    roles = ready(llama, method=method)
    packed = pack(PROMPTS, None, 0)

    @torch.no_grad()
    def others() -> tuple[Tensor, Tensor]:
        trunk = roles.trunk(packed)
        return roles.hidden(trunk, REFERENCE), roles.scores(trunk, REWARD)

    before, tracker = others(), Watching(roles)
    learn(roles, section("ppo", method=method, updates=2), tokenizer, tracker)
    assert all(torch.equal(left, right) for left, right in zip(before, others(), strict=True))
    assert tracker.moved(POLICY, 0, 2) > 1e-3
    assert tracker.moved(VALUE, 0, 2) > 1e-3


def test_the_policy_waits_while_the_value_model_warms_up(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    tracker = Watching(roles)
    config = section("ppo", updates=3, value_warmup_updates=2, epochs=2, weight_decay=0.1)
    learn(roles, config, tokenizer, tracker)
    assert tracker.moved(POLICY, 0, 2) == 0.0
    assert tracker.moved(VALUE, 0, 1) > 1e-3
    assert tracker.moved(VALUE, 1, 2) > 1e-3
    assert tracker.moved(POLICY, 2, 3) > 1e-3
    assert "ppo/policy_loss" not in tracker.history[1][1]
    assert "ppo/policy_loss" in tracker.history[2][1]


def test_gradients_are_really_clipped_policy_and_value_each(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    moved = {}
    for limit in (1e-10, 1.0):
        roles = ready(llama)
        tracker = Watching(roles)
        learn(roles, section("ppo", max_grad_norm=limit), tokenizer, tracker)
        ((_, metrics),) = tracker.history
        assert metrics["ppo/grad_norm"] > 1e-3  # the norms before clipping
        assert metrics["ppo/value_grad_norm"] > 1e-3
        moved[limit] = {role: tracker.moved(role, 0, 1) for role in (POLICY, VALUE)}
    # A gradient of norm 1e-10 is nothing beside AdamW's ε of 1e-5; without clipping every weight moves by its rate.
    for role in (POLICY, VALUE):
        assert moved[1e-10][role] < 1e-4 * moved[1.0][role], role


def test_an_update_stops_early_once_the_policy_has_moved_too_far(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {"updates": 2, "epochs": 3, "minibatch_size": 4}
    counts = {}
    for limit in (1e-6, 100.0):
        tracker = MemoryTracker()
        learn(ready(llama), section("ppo", **settings, early_stop_kl=limit), tokenizer, tracker)
        counts[limit] = [metrics["ppo/minibatches"] for _, metrics in tracker.history]
        if limit == 1e-6:  # what stopped the update is seen, at half its weight beside the first minibatch's 0
            assert all(metrics["ppo/approx_kl"] > limit / 2 for _, metrics in tracker.history)
            assert all(metrics["ppo/ratio"] != 1 for _, metrics in tracker.history)
    # The first minibatch of an update has moved nothing yet; the second sees what the first did.
    assert counts == {1e-6: [1, 1], 100.0: [6, 6]}


def test_the_minibatch_that_stopped_an_update_teaches_nothing(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = []
    for epochs in (1, 5):
        roles = ready(llama)
        tracker = Watching(roles)
        learn(roles, section("ppo", epochs=epochs, early_stop_kl=1e-6), tokenizer, tracker)
        seen.append(tracker.seen[-1])
        assert all(parameter.grad is None for parameter in roles.parameters())
    for role in (POLICY, VALUE):
        assert all(torch.equal(left, right) for left, right in zip(seen[0][role], seen[1][role], strict=True))


def test_rates_warm_up_and_decay_an_update(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    config = section("ppo", updates=4, warmup_updates=1, schedule="linear", learning_rate=0.01)
    learn(ready(llama), config, tokenizer, tracker)
    # ½, then 1 down by ⅓
    rates = [metrics["ppo/learning_rate"] for _, metrics in tracker.history]
    assert rates == pytest.approx([0.005, 0.01, 0.01 * 2 / 3, 0.01 / 3], rel=1e-9)


def test_the_adaptive_coefficient_follows_the_kl(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    config = section("ppo", updates=3, kl_controller="adaptive", kl_coef=0.1, kl_target=0.5, kl_horizon=80)
    learn(ready(llama), config, tokenizer, tracker)
    coefs = [metrics["ppo/kl_coef"] for _, metrics in tracker.history]
    kls = [metrics["ppo/kl"] for _, metrics in tracker.history]
    assert coefs[0] == 0.1
    for index in range(2):
        error = min(max(kls[index] / 0.5 - 1, -0.2), 0.2)
        assert coefs[index + 1] == pytest.approx(coefs[index] * (1 + error * 8 / 80), rel=1e-9)
    assert coefs[1] < 0.1  # at first there is no KL at all


def test_every_prompt_has_its_turn_and_shares_its_samples(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    config = section("ppo", updates=2, rollouts=4, minibatch_size=4)
    prompts = PROMPTS[:4]
    train_ppo(ready(llama), prompts, config, tokenizer=tokenizer, tracker=tracker)
    texts = sorted(tokenizer.decode(prompt) for prompt in prompts)
    for _, name, rows in tracker.tables:
        assert name == "ppo/samples"
        assert sorted(row["prompt"] for row in rows) == texts
    tracker = MemoryTracker()
    config = section("ppo", rollouts=8, samples_per_prompt=4)
    train_ppo(ready(llama), prompts, config, tokenizer=tokenizer, tracker=tracker)
    ((_, _, rows),) = tracker.tables
    assert len({row["prompt"] for row in rows}) == 1
    assert len({row["response"] for row in rows}) > 1


def test_the_same_seed_ends_the_same_and_another_does_not(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    found, histories = [], []
    for seed in (0, 0, 1):
        roles, tracker = ready(llama), MemoryTracker()
        learn(roles, section("ppo", updates=2, seed=seed), tokenizer, tracker)
        found.append([parameter.detach().clone() for parameter in roles.trainable(POLICY)])
        for _, metrics in tracker.history:
            del metrics["ppo/tokens_per_second"]
        histories.append(tracker.history)
    assert histories[0] == histories[1] != histories[2]
    assert all(torch.equal(left, right) for left, right in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(left, right) for left, right in zip(found[0], found[2], strict=True))


def test_what_training_hands_back(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    tracker = MemoryTracker()
    config = section("ppo", updates=20, rollouts=4, minibatch_size=4, response_tokens=2)
    final, shown = train_ppo(ready(llama), PROMPTS, config, tokenizer=tokenizer, tracker=tracker)
    last = [metrics for _, metrics in tracker.history[-2:]]  # a tenth of the updates
    assert [step for step, _ in tracker.history] == list(range(1, 21))
    for name in ("reward", "score", "kl", "policy_loss", "value_loss", "grad_norm", "explained_variance", "entropy"):
        assert final[name] == pytest.approx(sum(metrics[f"ppo/{name}"] for metrics in last) / 2, rel=1e-9)
    assert final["updates"] == 20
    assert "tokens_per_second" not in final
    assert len(shown) == 20 * 4
    assert set(shown[0]) == {"update", "prompt", "response", "score", "stopped"}


def test_a_loss_that_is_no_number_stops_the_run(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    with torch.no_grad():
        roles.heads[REWARD].bias.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"^A score of ppo is nan") as found:
        learn(roles, section("ppo"), tokenizer)
    assert found.value.batch["ids_BS"].shape[0] == 8


def test_a_policy_that_is_lost_in_a_step_is_noticed_before_the_next(
    llama: Path, ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles = ready(llama)
    rollouts = measure_rollouts(roles, roll(roles, tokenizer), section("ppo"), kl_coef=0.1).rollouts
    perturb(roles, VALUE)
    with torch.no_grad():
        roles.trainable(VALUE)[-1].fill_(float("inf"))
    with pytest.raises(TrainingDiverged, match=r"^A value of ppo's value model is inf") as found:
        losses(roles, rollouts, section("ppo"), int(rollouts.mask_BT.sum()), kl_coef=0.1)
    assert set(found.value.batch) >= {"prompt_and_response_ids_BS", "advantages_BT", "returns_BT", "A value"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_policy_follows_a_simple_reward(
    llama: Path,
    section: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    method: str,
) -> None:
    # A reward model made by hand, which likes the responses that have ended: its body is the base's and its head is
    # what sets hidden states at an end of turn apart from those at other tokens.
    reward = Roles(llama, section("reward"))
    torch.manual_seed(3)
    reward.add(REWARD, method=method, head=True)
    with torch.no_grad():
        ended = reward.hidden(reward.trunk(pack([[*prompt, 2] for prompt in PROMPTS], None, 0)), REWARD)
        going = reward.hidden(reward.trunk(pack([[*prompt, 50] for prompt in PROMPTS], None, 0)), REWARD)
        last = torch.tensor([len(prompt) for prompt in PROMPTS])
        rows = torch.arange(len(PROMPTS))
        reward.heads[REWARD].weight.copy_((ended[rows, last] - going[rows, last]).mean(0)[None] / 5)
    reward.save(REWARD, tmp_path / "made")
    roles = Roles(llama, section("ppo", lora_layers=0))
    torch.manual_seed(4)
    add_roles(roles, str(tmp_path / "made"), method=method)
    tracker = MemoryTracker()
    rate = 1e-2 if method == "lora" else 2e-3
    config = section(
        "ppo",
        method=method,
        updates=16,
        rollouts=32,
        minibatch_size=16,
        micro_batch_size=16,
        epochs=2,
        lam=0.95,
        learning_rate=rate,
        value_learning_rate=rate,
        missing_eos_penalty=1.0,
    )
    learn(roles, config, tokenizer, tracker)
    rewards = [metrics["ppo/reward"] for _, metrics in tracker.history]
    stopped = [metrics["ppo/eos_rate"] for _, metrics in tracker.history]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0, rewards
    assert sum(stopped[-3:]) / 3 > max(0.9, stopped[0] + 0.3), stopped
