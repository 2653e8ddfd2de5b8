"""A reward model of several members: what each is, what they say together, and what PPO makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf_core.checkpoints import Checkpoints
from rlhf_core.ensemble import (
    add_members,
    combine,
    load_ensemble,
    member_names,
    member_scores,
    member_seed,
    members_of,
    save_ensemble,
)
from rlhf_core.errors import ConfigError, MissingArtifact
from rlhf_core.models import Normaliser, Roles, TrunkCache, pack
from rlhf_core.ppo import POLICY, REWARD, VALUE, add_roles, measure_rollouts, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.reward import (
    EncodedRanking,
    ensemble_scores,
    judge_heads,
    judge_together,
    normalise_on_samples,
    train_reward,
)
from rlhf_core.tracking import MemoryTracker, NullTracker

PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13]]
ANSWERS = [[5, 6, 2], [8, 2, 0], [9, 10, 11], [2, 0, 0]]
SAMPLED = Sampled(
    PROMPTS,
    torch.tensor(ANSWERS),
    torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, False, False]]),
    torch.tensor([True, True, False, True]),
)
RANKINGS = [
    EncodedRanking(
        [[n, n + 1, 100, n + 2, 2], [n, n + 1, n + 2, 2], [n, n + 1, 2]],
        (1, 2, 2),
        [3, 2, 1],
        axes={"short": [1, 2, 3]},
    )
    for n in range(10, 38, 4)
]


def fresh(folder: Path, config: Any) -> Roles:
    """A reward model with its members, as stage reward makes it."""
    roles = Roles(folder, config)
    torch.manual_seed(config.seed)
    roles.add(REWARD, method=config.method, head=True, axes=config.axes)
    add_members(roles, REWARD, config)
    return roles


def train(roles: Roles, config: Any, tracker: Any = None, checkpoints: Checkpoints | None = None) -> None:
    cache = TrunkCache()
    for number, name in enumerate(members_of(roles, REWARD), start=1):
        own = config.model_copy(update={"seed": member_seed(config.seed, number)})
        train_reward(
            roles, name, RANKINGS[:5], RANKINGS[5:], own, pad_id=0, tracker=tracker or NullTracker(), prefix=name,
            cache=cache, checkpoints=(checkpoints or Checkpoints()).below(name),
        )  # fmt: skip


@pytest.fixture
def ensemble(llama: Path, section: Callable[..., Any]) -> Callable[..., Roles]:
    """Three members that were not trained, which disagree by how they were drawn."""

    def build(**changes: Any) -> Roles:
        roles = fresh(llama, section("reward", **{"members": 3, **changes}))
        for number, name in enumerate(members_of(roles, REWARD), start=1):
            roles.normalisers[name] = Normaliser(0.1 * number, 0.5 + number, 1.0 + number)
        return roles

    return build


def parameters(roles: Roles, name: str) -> list[torch.Tensor]:
    return [value.detach().clone() for value in roles.trainable(name)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_members_differ_and_the_first_is_the_one_that_would_be_alone(
    llama: Path, section: Callable[..., Any], method: str
) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    config = section("reward", members=3, axes=["short"], method=method, learning_rate=rate, batch_size=2)
    alone, together = fresh(llama, config.model_copy(update={"members": 1})), fresh(llama, config)
    assert members_of(alone, REWARD) == [REWARD]
    assert members_of(together, REWARD) == member_names(REWARD, 3) == ["reward", "reward-2", "reward-3"]
    drawn = [parameters(together, name) for name in members_of(together, REWARD)]
    assert not same(drawn[0], drawn[1])
    assert not same(drawn[1], drawn[2])
    train(alone, config)
    train(together, config)
    learnt = [parameters(together, name) for name in members_of(together, REWARD)]
    assert same(parameters(alone, REWARD), learnt[0])
    for before, after in zip(drawn, learnt, strict=True):
        assert not same(before, after)


def test_each_member_has_an_order_of_its_own(llama: Path, section: Callable[..., Any]) -> None:
    config = section("reward", members=2, batch_size=1)
    tracker = MemoryTracker()
    roles = fresh(llama, config)
    with torch.no_grad():  # the same start, so that only the order differs
        for one, other in zip(roles.trainable(REWARD), roles.trainable("reward-2"), strict=True):
            other.copy_(one)
    train(roles, config, tracker)
    first, second = (
        [values[f"{name}/loss"] for _, values in tracker.history if f"{name}/loss" in values]
        for name in members_of(roles, REWARD)
    )
    assert len(first) == len(second) == 5
    assert first != second


def test_seeds_of_neighbouring_runs_share_no_member() -> None:
    seeds = {member_seed(seed, number) for seed in range(100) for number in range(1, 21)}
    assert len(seeds) == 100 * 20
    assert [member_seed(seed, 1) for seed in range(5)] == list(range(5))


def test_score_and_spread_by_hand() -> None:
    # Mean of 1, 2, 6 is 3; deviations −2, −1, 3: √((4 + 1 + 9) / 3). The second agree.
    found = combine(torch.tensor([[1.0, 2.0, 6.0], [0.5, 0.5, 0.5]], dtype=torch.float64))
    assert found.score_B.tolist() == pytest.approx([3.0, 0.5], rel=1e-12)
    assert found.spread_B.tolist() == pytest.approx([(14 / 3) ** 0.5, 0.0], rel=1e-12)
    one = combine(torch.tensor([[1.5], [-2.0]]))
    assert one.score_B.tolist() == [1.5, -2.0]
    assert one.spread_B.tolist() == [0.0, 0.0]


@torch.no_grad()
def test_each_member_is_normalised_by_its_own_statistics(ensemble: Callable[..., Roles]) -> None:
    roles = ensemble(axes=["short", "kind"])
    roles.axes["reward-2"]["kind"] = Normaliser(-1.0, 4.0)
    trunk = roles.trunk(pack(PROMPTS, ANSWERS, 0))
    found_BMH = member_scores(roles, trunk, REWARD)
    assert found_BMH.shape == (4, 3, 3)
    for place, name in enumerate(members_of(roles, REWARD)):
        mean, std, *_ = roles.normalisers[name]
        expected_B = (roles.scores(trunk, name) - mean) / std
        torch.testing.assert_close(found_BMH[:, place, 0], expected_B, rtol=1e-6, atol=1e-6)  # float32
    expected_B = (roles.scores(trunk, "reward-2", axis="kind") + 1) / 4
    torch.testing.assert_close(found_BMH[:, 1, 2], expected_B, rtol=1e-6, atol=1e-6)  # float32


@torch.no_grad()
def test_the_shared_layers_are_computed_once_for_all_members(
    ensemble: Callable[..., Roles], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = ensemble()
    assert roles.depth > 0
    calls, lower = [], roles._lower

    def watched(*arguments: Any) -> Any:
        calls.append(1)
        return lower(*arguments)

    monkeypatch.setattr(roles, "_lower", watched)
    ensemble_scores(roles, REWARD, SAMPLED)
    assert len(calls) == 1  # four rows fit one piece


@torch.no_grad()
def test_what_an_ensemble_says_of_samples(ensemble: Callable[..., Roles]) -> None:
    roles = ensemble(axes=["short"])
    rows = [prompt + response for prompt, response in zip(PROMPTS, SAMPLED.responses(), strict=True)]
    for axis, place in ((None, 0), ("short", 1)):
        found = ensemble_scores(roles, REWARD, SAMPLED, axis=axis)
        for index, row in enumerate(rows):
            alone_M = member_scores(roles, roles.trunk(pack([row], None, 0)), REWARD)[0, :, place]
            torch.testing.assert_close(found.members_BM[index], alone_M, rtol=1e-4, atol=1e-5)  # float32
        torch.testing.assert_close(found.score_B, found.members_BM.mean(1))
        torch.testing.assert_close(found.spread_B, found.members_BM.std(1, correction=0))
        assert found.spread_B.min() > 0


def test_an_ensemble_judges_by_the_mean_of_normalised_scores(ensemble: Callable[..., Roles]) -> None:
    roles = ensemble(axes=["short"])
    members = members_of(roles, REWARD)
    each = [judge_heads(roles, name, RANKINGS, 0) for name in members]
    together = judge_together(roles, members, each)
    for axis, place in ((None, 0), ("short", 1)):
        assert together[axis].which == each[0][axis].which
        for margin, (row, i, j) in zip(together[axis].margins, together[axis].which, strict=True):
            with torch.no_grad():
                pair = [RANKINGS[row].ids[i], RANKINGS[row].ids[j]]
                better, worse = member_scores(roles, roles.trunk(pack(pair, None, 0)), REWARD)[..., place].mean(1)
            assert margin == pytest.approx((better - worse).item(), abs=1e-5)  # float32


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_saved_ensemble_is_loaded_whole_and_by_a_reader_of_one(
    ensemble: Callable[..., Roles], llama: Path, tmp_path: Path, method: str
) -> None:
    roles = ensemble(axes=["short", "kind"], method=method)
    roles.axes[REWARD]["kind"] = Normaliser(0.5, 0.25, 3.0)
    save_ensemble(roles, REWARD, tmp_path / "model", temperature=1.5)
    assert json.loads((tmp_path / "model/ensemble.json").read_text()) == {"members": 3, "temperature": 1.5}
    again, one = Roles(llama), Roles(llama)
    load_ensemble(again, "judge", tmp_path / "model")
    one.add("judge", head=True, start=tmp_path / "model")
    assert members_of(again, "judge") == ["judge", "judge-2", "judge-3"]
    assert [again.normalisers[name].std for name in members_of(again, "judge")] == [1.5, 2.5, 3.5]
    assert list(again.axes["judge"].items()) == list(roles.axes[REWARD].items())  # in the order of the outputs
    learning = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert not [name for name in learning if "lm_head" not in name]  # which only a policy has a use for
    with torch.no_grad():
        packed = pack(PROMPTS, ANSWERS, 0)
        expected_BMH = member_scores(roles, roles.trunk(packed), REWARD)
        assert torch.equal(member_scores(again, again.trunk(packed), "judge"), expected_BMH)
        assert torch.equal(member_scores(one, one.trunk(packed), "judge"), expected_BMH[:, :1])
    save_ensemble(again, "judge", tmp_path / "again", temperature=1.5)
    files = {
        top: {path.relative_to(tmp_path / top): path.read_bytes() for path in (tmp_path / top).rglob("*.*")}
        for top in ("model", "again")
    }
    assert files["again"] == files["model"]


def test_one_member_is_saved_as_ever(llama: Path, section: Callable[..., Any], tmp_path: Path) -> None:
    roles = fresh(llama, section("reward"))
    save_ensemble(roles, REWARD, tmp_path / "ensemble", temperature=1.0)
    roles.save(REWARD, tmp_path / "role")
    names = {path.name for path in (tmp_path / "ensemble").iterdir()}
    assert names == {path.name for path in (tmp_path / "role").iterdir()}
    assert set(json.loads((tmp_path / "ensemble/score.json").read_text())) == {"mean", "std", "temperature"}


def test_a_missing_member_is_named(ensemble: Callable[..., Roles], llama: Path, tmp_path: Path) -> None:
    save_ensemble(ensemble(), REWARD, tmp_path / "reward", temperature=1.0)
    (tmp_path / "reward/member-3").rename(tmp_path / "gone")
    with pytest.raises(MissingArtifact, match=r"reward/member-3 holds no model\. Run `dvc repro reward`"):
        load_ensemble(Roles(llama), REWARD, tmp_path / "reward")


# ---- training goes on after a stop -----------------------------------------------------------------------------------


class Stopping(MemoryTracker):
    """Stops the loop when it comes to report for the n-th time."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def metrics(self, values: Any, *, step: int) -> None:
        if len(self.history) >= self.after:
            raise KeyboardInterrupt
        super().metrics(values, step=step)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_members_that_were_stopped_end_to_the_bit_as_those_that_were_not(
    llama: Path, section: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    from rlhf_core import checkpoints

    monkeypatch.setattr(checkpoints, "LARGEST_SHARE", 1.0)  # one a step
    options = {"members": 3, "axes": ["short"], "epochs": 2, "batch_size": 2, "gradient_checkpointing": checkpointing}
    config = section("reward", **options)
    straight = fresh(llama, config)
    train(straight, config)
    stops, done = 0, False
    while not done:
        roles = fresh(llama, config)
        try:
            train(roles, config, Stopping(after=3), Checkpoints(tmp_path))
            done = True
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 6  # in each of the members
    for name in members_of(straight, REWARD):
        assert same(parameters(roles, name), parameters(straight, name)), name


def test_gradient_checkpointing_changes_no_members_weights(llama: Path, section: Callable[..., Any]) -> None:
    found = []
    for checkpointing in (False, True):
        config = section("reward", members=2, axes=["short"], gradient_checkpointing=checkpointing)
        roles = fresh(llama, config)
        train(roles, config)
        found.append([parameters(roles, name) for name in members_of(roles, REWARD)])
    assert all(same(*each) for each in zip(*found, strict=True))


# ---- PPO -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(
    ensemble: Callable[..., Roles], llama: Path, section: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Callable[..., Roles]:
    def build(**changes: Any) -> Roles:
        reward = ensemble(**changes)
        options = {"count": 4, "max_tokens": 4, "tokenizer": tokenizer, "seed": 0}
        normalise_on_samples(reward, members_of(reward, REWARD), PROMPTS, **options)
        save_ensemble(reward, REWARD, tmp_path / "reward", temperature=1.0)
        roles = Roles(llama, section("ppo"))
        torch.manual_seed(4)
        add_roles(roles, str(tmp_path / "reward"), method="lora")
        return roles

    return build


def test_ppo_climbs_the_mean_less_the_spread(ready: Callable[..., Roles], section: Callable[..., Any]) -> None:
    roles = ready()
    expected = ensemble_scores(roles, REWARD, SAMPLED)
    for coef in (0.0, 0.7):
        found = measure_rollouts(roles, SAMPLED, section("ppo", spread_coef=coef), kl_coef=0.0)
        torch.testing.assert_close(
            found.scores_B, expected.score_B - coef * expected.spread_B, rtol=1e-4, atol=1e-5
        )  # float32 sums in batches of another size
        assert found.metrics["ppo/score_spread"] == pytest.approx(expected.spread_B.mean().item(), rel=1e-4)
    assert expected.spread_B.mean() > 0.1


@torch.no_grad()
def test_the_value_model_starts_from_the_first_member(ready: Callable[..., Roles]) -> None:
    roles = ready(axes=["short"])
    trunk = roles.trunk(pack(PROMPTS, None, 0))
    torch.testing.assert_close(
        roles.scores(trunk, VALUE), member_scores(roles, trunk, REWARD)[:, 0, 0], rtol=1e-5, atol=1e-5
    )  # float32
    assert VALUE not in roles.axis_heads
    assert roles.axes[VALUE] == {}
    trained = [name for name, parameter in roles.named_parameters() if parameter.requires_grad]
    assert not [name for name in trained if REWARD in name]


def test_ppo_learns_against_an_ensemble_and_logs_its_spread(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles, tracker = ready(axes=["short"]), MemoryTracker()
    before = [parameters(roles, name) for name in members_of(roles, REWARD)]
    moving = parameters(roles, POLICY)
    final, _ = train_ppo(
        roles, PROMPTS, section("ppo", spread_coef=0.5, updates=2), tokenizer=tokenizer, tracker=tracker
    )
    assert all(values["ppo/score_spread"] > 0 for _, values in tracker.history)
    assert final["score_spread"] > 0
    assert not same(parameters(roles, POLICY), moving)
    assert all(same(parameters(roles, name), old) for name, old in zip(members_of(roles, REWARD), before, strict=True))


def test_one_member_logs_no_spread_and_refuses_to_weigh_one(
    ready: Callable[..., Roles], section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    roles, tracker = ready(members=1), MemoryTracker()
    train_ppo(roles, PROMPTS, section("ppo"), tokenizer=tokenizer, tracker=tracker)
    assert "ppo/score_spread" not in tracker.history[0][1]
    config = section("ppo", spread_coef=0.5)
    with pytest.raises(ConfigError, match=r"spread_coef 0\.5 needs a reward model of two members"):
        train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker)
