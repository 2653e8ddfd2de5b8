"""Checkpoints: whole or not there, the newest that can be read, and each loop ends the same however it was stopped."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rlhf_core import checkpoints as module
from rlhf_core.checkpoints import NO_CHECKPOINTS, Checkpoints, LoopState, Unsaved
from rlhf_core.dpo import Preference, pairs_of, train_dpo
from rlhf_core.models import Roles, TrunkCache
from rlhf_core.ppo import POLICY, REWARD, VALUE, add_roles, train_ppo
from rlhf_core.reward import EncodedRanking, train_reward
from rlhf_core.sft import Example, train_sft
from rlhf_core.tracking import MemoryTracker


@pytest.fixture(autouse=True)
def after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_SHARE", 1.0)


def loop(seed: int = 0) -> LoopState:
    """Two parameters, one of which AdamW has moved, a kept copy, and a generator that was drawn from."""
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
    optimiser = torch.optim.AdamW(parameters[:1], lr=0.1)
    (parameters[0] ** 2).sum().backward()
    optimiser.step()
    generator = torch.Generator().manual_seed(seed)
    torch.rand(seed + 1, generator=generator)
    return LoopState({"policy": parameters, "kept": [torch.randn(2)]}, {"policy": optimiser}, generator)


def content(state: LoopState) -> list[Any]:
    groups = [value.detach().clone() for group in state.tensors.values() for value in group]
    moments = [dict(value) for optimiser in state.optimisers.values() for value in optimiser.state.values()]
    assert state.generator is not None
    return [groups, moments, state.generator.get_state()]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    values = {"step": 3, "best": 1 / 3, "shown": [{"text": "ü", "score": 0.1 + 0.2}], "left": [4, 2], "none": None}
    saved, restored = loop(1), loop(2)
    assert not same(content(saved), content(restored))
    assert Checkpoints(tmp_path).offer(3, saved, values)
    assert Checkpoints(tmp_path).restore(restored) == values
    assert same(content(saved), content(restored))
    (restored.tensors["policy"][0] ** 2).sum().backward()
    restored.optimisers["policy"].step()
    assert restored.optimisers["policy"].state[restored.tensors["policy"][0]]["step"] == 2


def test_nothing_is_restored_where_nothing_was_saved(tmp_path: Path) -> None:
    state = loop()
    before = content(state)
    assert Checkpoints(tmp_path / "none").restore(state) is None
    assert not NO_CHECKPOINTS.offer(1, state, {})
    assert NO_CHECKPOINTS.restore(state) is None
    assert NO_CHECKPOINTS.below("reward").restore(state) is None
    assert same(content(state), before)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    saved = Checkpoints(tmp_path)
    older, newer = loop(1), loop(2)
    saved.offer(1, older, {"step": 1})
    saved.offer(2, newer, {"step": 2})
    path = tmp_path / "step-00000002" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    restored = loop(3)
    assert saved.restore(restored) == {"step": 1}
    assert same(content(restored), content(older))
    assert "step-00000002 cannot be read" in capsys.readouterr().out


def test_a_write_that_was_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = Checkpoints(tmp_path)
    saved.offer(1, loop(1), {"step": 1})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("save_file", "_flush"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                saved.offer(2, loop(2), {"step": 2})
        assert (tmp_path / ".step-00000002.partial").is_dir()
        assert saved.restore(loop(3)) == {"step": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    for step, score in enumerate([0.5, 0.9, None, 0.7, 0.1, 0.2], start=1):
        saved.offer(step, loop(step), {"step": step}, score=score)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (2, 5, 6)]
    assert json.loads((tmp_path / "step-00000002" / "state.json").read_text())["score"] == 0.9


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_an_older_one_that_cannot_be_read_goes_first_when_the_next_is_written(tmp_path: Path, damage: str) -> None:
    saved = Checkpoints(tmp_path)
    for step, score in enumerate([0.9, 0.5, 1.0], start=1):
        saved.offer(step, loop(step), {"step": step}, score=score)
    path = tmp_path / "step-00000003" / "state.json"  # the best and the newest
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    assert saved.offer(4, loop(4), {"step": 4}, score=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_loops_of_a_stage_have_folders_of_their_own(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    saved.below("reward").offer(7, loop(1), {"step": 7})
    assert saved.below("gold").restore(loop(2)) is None
    assert saved.below("reward").restore(loop(2)) == {"step": 7}


def test_writing_takes_its_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_SHARE", 0.05)
    now = 100.0

    def flush(path: Path) -> None:  # three calls a checkpoint: two files and the folder
        nonlocal now
        now += 1 / 3

    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(module, "_flush", flush)
    saved = Checkpoints(tmp_path)
    written = []
    for step in range(1, 46):
        if saved.offer(step, loop(), {"step": step}):
            written.append(step)
        now += 1.0
    assert written == [1, 20, 39]  # a second of writing for every nineteen of work


def test_who_has_to_stop_is_told_when_all_that_is_done_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_SHARE", 1e-9)  # one checkpoint, and then none for days
    unsaved = Unsaved()
    saved = Checkpoints(tmp_path, unsaved=unsaved).below("loop")
    told: list[int] = []
    assert saved.offer(1, loop(1), {"step": 1})
    assert not unsaved.steps
    assert not saved.offer(2, loop(2), {"step": 2})
    assert unsaved.steps
    unsaved.then = lambda: told.append(len(list((tmp_path / "loop").glob("step-*"))))
    assert saved.offer(3, loop(3), {"step": 3})
    assert told == [2]
    assert not unsaved.steps
    assert saved.restore(loop(4)) == {"step": 3}
    assert not Checkpoints(unsaved=unsaved).offer(4, loop(4), {})  # where nothing is saved, nothing can be waited for


# ---- the loops -------------------------------------------------------------------------------------------------------

RANKINGS = [
    EncodedRanking(
        [[n, n + 1, 100, n + 2, 2], [n, n + 1, n + 2, 2], [n, n + 1, 2]], (1, 2, 2), [3, 2, 1], axes={"kind": [1, 3, 2]}
    )
    for n in range(10, 38, 4)
]
EXAMPLES = [Example([n, n + 1], [n + 2, n + 3, *[n + 4] * (n % 5), 2]) for n in range(10, 30, 3)]
PROMPTS = [[7, 20, 35], [12, 5, 77, 31, 8, 64, 19], [40, 41], [9, 10, 11, 12, 13], [100, 101, 102, 103]]


class Stopping(MemoryTracker):
    """Stops the loop as a signal does, when it comes to report for the n-th time."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.after = after

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        if self.after is not None and len(self.history) >= self.after:
            raise KeyboardInterrupt
        super().metrics({name: value for name, value in values.items() if not name.endswith("_per_second")}, step=step)


@pytest.fixture
def run_loop(
    llama: Path, section: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Any]:
    def sft(checkpoints: Checkpoints, tracker: Stopping) -> Any:
        config = section("sft", epochs=3, batch_size=2, micro_batch_size=1, schedule="cosine")
        torch.manual_seed(7)
        roles = Roles(llama, config)
        roles.add("policy")
        final = train_sft(roles, EXAMPLES[:5], EXAMPLES[5:], config, pad_id=0, tracker=tracker, checkpoints=checkpoints)
        return final, roles.trainable("policy")

    def reward(checkpoints: Checkpoints, tracker: Stopping, **changes: Any) -> Any:
        config = section("reward", epochs=3, batch_size=2, micro_batch_size=1, schedule="linear", **changes)
        torch.manual_seed(7)
        roles = Roles(llama, config)
        roles.add("reward", head=True, axes=config.axes)
        final = train_reward(
            roles, "reward", RANKINGS[:5], RANKINGS[5:], config,
            pad_id=0, tracker=tracker, cache=TrunkCache(), checkpoints=checkpoints,
        )  # fmt: skip
        return (final, roles.normalisers, roles.axes), roles.trainable("reward")

    def regressed(checkpoints: Checkpoints, tracker: Stopping) -> Any:
        return reward(checkpoints, tracker, length="regress", axes=["kind"])

    def dpo(checkpoints: Checkpoints, tracker: Stopping) -> Any:
        config = section("dpo", epochs=3, batch_size=2, micro_batch_size=1, schedule="linear")
        torch.manual_seed(7)
        roles = Roles(llama, config)
        roles.add("policy")
        rows = [
            Preference([Example(ids[:2], ids[2:]) for ids in ranking.ids], pairs_of(ranking.ranks))
            for ranking in RANKINGS
        ]
        final = train_dpo(roles, rows[:5], rows[5:], config, pad_id=0, tracker=tracker, checkpoints=checkpoints)
        return final, roles.trainable("policy")

    def ppo(checkpoints: Checkpoints, tracker: Stopping, **limited: Any) -> Any:
        if not (tmp_path / "reward").is_dir():
            judge = Roles(llama, section("reward"))
            torch.manual_seed(3)
            judge.add(REWARD, head=True, axes=["kind"])
            judge.save(REWARD, tmp_path / "reward")
        config = section(
            "ppo", updates=5, epochs=2, minibatch_size=4, micro_batch_size=2, samples_per_prompt=2, warmup_updates=1,
            value_warmup_updates=1, kl_controller="adaptive", kl_coef=0.1, schedule="linear", early_stop_kl=10.0,
            scale_scores=True, **limited,
        )  # fmt: skip
        torch.manual_seed(4)
        roles = Roles(llama, config)
        add_roles(
            roles, str(tmp_path / "reward"), method="lora", cost_axis=config.cost_axis,
            value_network=config.value_network,
        )  # fmt: skip
        final, shown = train_ppo(roles, PROMPTS, config, tokenizer=tokenizer, tracker=tracker, checkpoints=checkpoints)
        return (final, shown), roles.trainable(POLICY) + roles.trainable(VALUE)

    def constrained(checkpoints: Checkpoints, tracker: Stopping) -> Any:
        return ppo(checkpoints, tracker, objective="constrained", cost_axis="kind", cost_limit=-0.5, cost_memory=2)

    def head(checkpoints: Checkpoints, tracker: Stopping) -> Any:
        return ppo(checkpoints, tracker, value_network="shared")

    loops = {"sft": sft, "reward": reward, "regressed": regressed, "ppo": ppo, "dpo": dpo}
    loops |= {"constrained": constrained, "head": head}
    return lambda name, *arguments: loops[name](*arguments)


@pytest.mark.parametrize("stage", ["sft", "reward", "regressed", "ppo", "dpo", "constrained", "head"])
def test_a_loop_that_was_stopped_again_and_again_ends_to_the_bit_as_one_that_was_not(
    run_loop: Callable[..., Any], tmp_path: Path, stage: str
) -> None:
    straight = Stopping()
    expected, weights = run_loop(stage, NO_CHECKPOINTS, straight)
    folder, chance = tmp_path / "checkpoints", random.Random(stage)
    curve: dict[tuple[int, str], float] = {}
    table: list[Any] = []
    found = None
    stops = 0
    while found is None:
        tracker = Stopping(after=chance.randint(1, 3))
        if stops > 40:
            tracker.after = None
        try:
            found = run_loop(stage, Checkpoints(folder), tracker)
        except KeyboardInterrupt:
            stops += 1
        for step, values in tracker.history:
            for name, value in values.items():
                assert curve.setdefault((step, name), value) == value  # what is computed again comes out the same
        table = tracker.tables
    assert stops >= 2
    assert found[0] == expected
    assert same(found[1], weights)
    assert curve == {(step, name): value for step, values in straight.history for name, value in values.items()}
    if stage == "ppo":  # the table is whole again in the run that ends
        assert [row for *_, rows in table for row in rows] == [row for *_, rows in straight.tables for row in rows]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
def test_a_loop_that_was_done_is_not_run_again(run_loop: Callable[..., Any], tmp_path: Path, stage: str) -> None:
    expected, weights = run_loop(stage, Checkpoints(tmp_path / "checkpoints"), Stopping())
    again = Stopping()
    found, restored = run_loop(stage, Checkpoints(tmp_path / "checkpoints"), again)
    assert again.history == []
    assert found == expected
    assert same(restored, weights)


def test_a_process_that_does_not_write_goes_on_from_what_another_wrote(tmp_path: Path) -> None:
    parameter = torch.ones(2)
    Checkpoints(tmp_path).offer(3, LoopState({"p": [parameter]}, {}), {"step": 3})
    (tmp_path / ".step-00000004.partial").mkdir()
    parameter.zero_()
    reader = Checkpoints(tmp_path, writes=False).below(".")
    assert not reader.offer(4, LoopState({"p": [parameter]}, {}), {"step": 4})
    assert reader.restore(LoopState({"p": [parameter]}, {})) == {"step": 3}
    assert parameter.tolist() == [1.0, 1.0]
    assert {path.name for path in tmp_path.iterdir()} == {".step-00000004.partial", "step-00000003"}
