"""What PPO watches beside its reward, and what it does about an alarm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_core import ppo
from rlhf_core.alarm import LOWERED, PROXY, Alarm, Change, repetition
from rlhf_core.checkpoints import Checkpoints
from rlhf_core.ensemble import load_ensemble
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.ppo import POLICY, VALUE, measure_rollouts, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.reward import score_samples
from rlhf_core.rollouts import sample
from rlhf_core.tracking import MemoryTracker
from rlhf_core.watch import GOLD, Kept, final_watched, measure_watched

PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13], [100, 101, 102, 103]]
RISING = Change(PROXY, "the reward rises", 0.0, 0.0, 1.0)


def of_length(sampled: Sampled) -> Tensor:
    return sampled.mask_BT.sum(1) / 10


def ready(folder: Path, config: Any) -> Roles:
    torch.manual_seed(config.seed)
    roles = Roles(folder, config)
    roles.add(POLICY, method=config.method)
    roles.add(VALUE, method=config.method, head=True)
    return roles


def learn(folder: Path, config: Any, tokenizer: Any, **options: Any) -> tuple[Roles, dict[str, Any], MemoryTracker]:
    roles, tracker = ready(folder, config), MemoryTracker()
    options = {"score": of_length, **options}
    final, _ = train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker, **options)
    return roles, final, tracker


def trained(roles: Roles) -> list[Tensor]:
    return [value.detach().clone() for role in (POLICY, VALUE) for value in roles.trainable(role)]


@pytest.fixture
def alarmed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An alarm at the updates that are named, whatever was measured."""

    def at(*updates: int, since: int = 1) -> None:
        def now(history: Any, window: int, *, last: int) -> Alarm | None:
            assert last == max((update for update in updates if update < len(history)), default=0)
            return Alarm(len(history), since, (RISING,)) if len(history) in updates else None

        monkeypatch.setattr(ppo, "alarm_now", now)

    return at


# ---- what is measured


def test_gold_and_repetition_are_those_of_the_responses(
    llama: Path, section: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    judge = Roles(llama, section("reward"))
    torch.manual_seed(3)
    judge.add(GOLD, head=True)
    judge.normalisers[GOLD] = judge.normalisers[GOLD]._replace(mean=0.3, std=0.7)
    judge.save(GOLD, tmp_path)
    roles = ready(llama, section("ppo"))
    load_ensemble(roles, GOLD, tmp_path)
    sampled = sample(
        roles.language_model(REFERENCE), PROMPTS * 2, max_tokens=6, temperature=1.0, stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    trunk = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.0, score=of_length).rollouts.trunk
    found = measure_watched(roles, sampled, trunk, micro_batch_size=4)
    expected = (score_samples(roles, GOLD, sampled) - 0.3) / 0.7
    assert found["ppo/gold_score"] == pytest.approx(expected.mean().item(), rel=1e-5, abs=1e-6)  # float32
    own = [repetition(response) for response in sampled.responses()]
    assert found["ppo/repetition"] == pytest.approx(sum(own) / len(own), rel=1e-12)
    assert "ppo/gold_score" not in measure_watched(ready(llama, section("ppo")), sampled, trunk, micro_batch_size=4)


def test_watching_changes_nothing_that_is_learnt(llama: Path, section: Callable[..., Any], tokenizer: Any) -> None:
    plain, told, curves = learn(llama, section("ppo", updates=3), tokenizer)
    watched, more, other = learn(llama, section("ppo", updates=3, watch_every=2), tokenizer, gold=of_length)
    for ours, theirs in zip(trained(plain), trained(watched), strict=True):
        assert torch.equal(ours, theirs)
    assert {name: more[name] for name in told} == told
    assert set(more) - set(told) == {"repetition", "gold_score", "alarms"}
    assert "ppo/gold_score" not in other.history[1][1]  # only the first and the third are watched
    assert other.history[2][1]["ppo/gold_score"] == pytest.approx(other.history[2][1]["ppo/score"], rel=1e-6)
    assert other.history[0][1]["ppo/alarm"] == 0
    assert not [name for _, row in curves.history for name in row if name in ("ppo/repetition", "ppo/alarm")]


def test_final_metrics_of_what_was_watched_by_hand() -> None:
    watched = [
        {"ppo/repetition": 0.1 * at, "ppo/gold_score": float(at), "ppo/alarm": float(at > 17)} for at in range(20)
    ]
    history = [row for one in watched for row in (one, {"ppo/score": 9.0})]
    expected = {"repetition": 1.85, "gold_score": 18.5, "alarms": 2, "alarm_update": 37}
    assert final_watched(history) == pytest.approx(expected, rel=1e-12)
    assert final_watched([{"ppo/score": 1.0}]) == {}


# ---- what is done about an alarm


def test_an_alarm_is_told_and_counted(
    llama: Path, section: Callable[..., Any], tokenizer: Any, alarmed: Callable[..., None]
) -> None:
    alarmed(2)
    _, final, tracker = learn(llama, section("ppo", updates=3, watch_every=1), tokenizer)
    assert (final["alarms"], final["alarm_update"], final["updates"]) == (1, 2, 3)
    assert [row["ppo/alarm"] for _, row in tracker.history] == [0, 1, 0]
    ((name, text),) = tracker.remarks
    assert name == "ppo/alarm"
    assert text.startswith("update 2: ")


def test_each_alarm_lowers_the_rates(
    llama: Path, section: Callable[..., Any], tokenizer: Any, alarmed: Callable[..., None]
) -> None:
    alarmed(2, 4)
    config = section("ppo", updates=10, watch_every=1, on_alarm="lower_rate")
    _, _, tracker = learn(llama, config.model_copy(update={"updates": 5}), tokenizer)
    rates = [row["ppo/learning_rate"] / config.learning_rate for _, row in tracker.history]
    assert rates == pytest.approx([1, LOWERED, LOWERED, LOWERED**2, LOWERED**2], rel=1e-12)


def test_it_goes_back_to_the_best_by_gold(
    llama: Path, section: Callable[..., Any], tokenizer: Any, alarmed: Callable[..., None]
) -> None:
    gold = iter([0.0, 0.1, 0.9, -5.0, -5.0, -5.0])
    alarmed(5)
    config = section("ppo", updates=10, watch_every=1, on_alarm="stop")
    roles, final, tracker = learn(llama, config, tokenizer, gold=lambda sampled: torch.full((8,), next(gold)).double())
    assert len(tracker.history) == 5  # the last of them learnt nothing
    assert "ppo/policy_loss" not in tracker.history[-1][1]
    assert (final["kept_update"], final["alarm_update"], final["alarms"], final["updates"]) == (3, 5, 1, 2)
    assert final["reward"] == tracker.history[2][1]["ppo/reward"]
    two, _, _ = learn(llama, section("ppo", updates=2), tokenizer)
    for ours, theirs in zip(trained(roles), trained(two), strict=True):
        assert torch.equal(ours, theirs)


def test_without_gold_it_goes_back_to_before_the_window() -> None:
    value = torch.zeros(1)
    kept = Kept([value], gold=False, window=3)
    history: list[dict[str, float]] = []
    for update in range(1, 9):  # copies are made at 1, 4 and 7
        value.fill_(update)
        history.append({"ppo/repetition": 0.0})
        kept.offer(history)
    value.fill_(99)
    assert kept.go_back(Alarm(8, 6, (RISING,))) == 4
    assert value.item() == 4
    assert kept.go_back(Alarm(9, 7, (RISING,))) == 7
    assert value.item() == 7


@pytest.mark.parametrize("how", ["lower_rate", "stop"])
@pytest.mark.parametrize("gold", [None, of_length])
def test_a_run_that_was_stopped_ends_with_the_same_bytes_and_alarms(
    llama: Path, section: Callable[..., Any], tokenizer: Any, alarmed: Callable[..., None], tmp_path: Path, how: str,
    gold: Any,
) -> None:  # fmt: skip
    class Stopping(MemoryTracker):
        def progress(self, done: int, total: int, **_: Any) -> None:
            if done == 4:  # after it learnt, before its checkpoint
                raise KeyboardInterrupt

    alarmed(3 if how == "lower_rate" else 5, since=4)
    config = section("ppo", updates=10, watch_every=1, on_alarm=how).model_copy(update={"updates": 6})
    whole, told, tracker = learn(llama, config, tokenizer, gold=gold)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(
            ready(llama, config), PROMPTS, config, tokenizer=tokenizer, tracker=Stopping(), score=of_length, gold=gold,
            checkpoints=checkpoints,
        )  # fmt: skip
    assert list(tmp_path.glob("step-*"))
    again, found, second = learn(llama, config, tokenizer, gold=gold, checkpoints=Checkpoints(tmp_path))
    assert found == told
    assert tracker.remarks == second.remarks  # also of an alarm from before it was stopped
    assert len(tracker.remarks) == 1
    for ours, theirs in zip(trained(again), trained(whole), strict=True):
        assert torch.equal(ours, theirs)


# ---- the length penalty


@torch.no_grad()
def test_each_token_past_the_free_ones_costs_exactly_its_penalty(
    llama: Path, section: Callable[..., Any], tokenizer: Any
) -> None:
    roles = ready(llama, section("ppo"))
    sampled = sample(
        roles.language_model(POLICY), PROMPTS * 2, max_tokens=6, temperature=1.0, stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    free = measure_rollouts(roles, sampled, section("ppo"), kl_coef=0.0, score=of_length)
    config = section("ppo", length_penalty=0.3, length_free=4)
    paid = measure_rollouts(roles, sampled, config, kl_coef=0.0, score=of_length)
    lengths = sampled.mask_BT.sum(1).tolist()
    assert min(lengths) < 4 < max(lengths)
    expected = torch.tensor([0.3 * max(length - 4, 0) for length in lengths])
    # With γ = λ = 1 the first token's return is the whole reward.
    difference = free.rollouts.returns_BT[:, 0] - paid.rollouts.returns_BT[:, 0]
    torch.testing.assert_close(difference, expected, rtol=1e-5, atol=1e-5)  # float32
    assert torch.equal(free.scores_B, paid.scores_B)  # the score that is reported is the model's own
    assert free.metrics["ppo/reward"] - paid.metrics["ppo/reward"] == pytest.approx(expected.mean().item(), abs=1e-5)
