"""One batch at once, in pieces, or shared out over two processes: the same losses, weights, stops and ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import PROJECT, child_environment, make_toy

from tasks.pipeline import StageFailed, run_stage

pytestmark = pytest.mark.thorough
ONE = [sys.executable]
STAGES = ("sft", "reward", "dpo", "ppo")
RATES = {"lora": 1e-2, "full": 1e-3}
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def launch(command: list[str], folder: Path, plan: dict[str, Any]) -> subprocess.CompletedProcess[bytes]:
    """Let a launcher run tests/share.py."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(PROJECT / "tests/share.py"), str(folder)], env=env, capture_output=True)


def train(command: list[str], folder: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What tests/share.py finds, and the trained weights."""
    done = launch(command, folder, plan)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads((folder / "found.json").read_text()), load_file(folder / "weights.safetensors")


def numbers(value: Any) -> Any:
    """Without timings, and of a text nothing but the text."""
    if isinstance(value, dict):
        return {name: numbers(item) for name, item in value.items() if "per_second" not in name}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal but for float32's rounding."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert set(ours) == set(theirs), where
        for name in ours:
            assert_alike(ours[name], theirs[name], f"{where}/{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for row, (left, right) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(left, right, f"{where}/{row}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5), where
    else:
        assert ours == theirs, where


def plan_of(llama: Path, section: Callable[..., Any], method: str, size: int, **of_ppo: Any) -> dict[str, Any]:
    """All loops, with rows in pieces of a size; the reward model has an axis and two members, without length."""
    rate = RATES[method]
    common = {"method": method, "micro_batch_size": size, "learning_rate": rate, "max_grad_norm": 0.5}
    supervised = {**common, "batch_size": 16, "epochs": 2}
    ppo = {
        **common, "micro_batch_size": size // 4, "updates": 2, "rollouts": 16, "minibatch_size": 4, "epochs": 2,
        "kl_coef": 0.1, "value_learning_rate": rate, "missing_eos_penalty": 1.0, "spread_coef": 0.3,
    }  # fmt: skip
    sections = {
        "sft": section("sft", **supervised),
        "reward": section("reward", **supervised, center_coef=0.01, axes=["kind"], members=2, length="regress"),
        "dpo": section("dpo", **supervised),
        "ppo": section("ppo", **{**ppo, **of_ppo}),
    }
    return {"base": str(llama), **{name: found.model_dump(mode="json") for name, found in sections.items()}}


class Flipped(Exception):
    """Other tokens were drawn: two probabilities and a random number so close that rounding decided between them."""


LIMITED = {"objective": "constrained", "cost_axis": "kind", "cost_limit": -0.5}
SHARED = {"value_network": "shared", "value_warmup_updates": 1, "updates": 3}


@pytest.mark.parametrize(("method", "of_ppo"), [("lora", {}), ("full", {}), ("lora", LIMITED), ("lora", SHARED)])
def test_accumulation_and_processes_change_nothing(
    llama: Path, section: Callable[..., Any], tmp_path: Path, method: str, of_ppo: dict[str, Any]
) -> None:
    for seed in (0, 1, 2):
        try:
            compare(llama, section, tmp_path / str(seed), method, {"seed": seed, **of_ppo})
        except Flipped:
            continue
        return
    pytest.fail("With each of three seeds other texts were drawn.")


def compare(llama: Path, section: Callable[..., Any], folder: Path, method: str, of_ppo: dict[str, Any]) -> None:
    """Hold pieces and processes against the whole; raise Flipped if other texts were drawn."""
    rate = RATES[method]
    folder.mkdir()

    def plan(size: int) -> dict[str, Any]:
        return plan_of(llama, section, method, size, **of_ppo)

    whole, weights = train(ONE, folder / "whole", plan(16))
    assert (whole.pop("processes"), len(whole.pop("each"))) == (1, 1)
    assert whole["ppo"]["history"][1][1]["ppo/approx_kl"] > 1e-6  # something was learnt
    for name, command, size, count in (("pieces", ONE, 4, 1), ("processes", TWO, 8, 2)):
        found, learnt = train(command, folder / name, plan(size))
        assert found.pop("processes") == count
        assert len({each["weights"] for each in found.pop("each")}) == 1  # every process has the same
        if found["drawn"] != whole["drawn"]:
            raise Flipped
        assert_alike(numbers(found), numbers(whole), name)
        assert set(learnt) == set(weights)
        for key, tensor in weights.items():
            # Adam divides by the gradient's own size, so an entry near 0 moves by its rounding.
            torch.testing.assert_close(
                learnt[key], tensor, rtol=1e-3, atol=0.02 * rate, msg=lambda m, k=key: f"{k}: {m}"
            )


def test_two_processes_stop_an_update_together(llama: Path, section: Callable[..., Any], tmp_path: Path) -> None:
    # Two steps over the whole batch. Approx-KL is 0 before the first, so its mean over the two is half of the second's.
    whole = {"updates": 1, "minibatch_size": 16, "epochs": 2}
    found, _ = train(ONE, tmp_path / "whole", plan_of(llama, section, "lora", 16, **whole))
    ((_, update),) = found["ppo"]["history"]
    assert update["ppo/minibatches"] == 2
    # All of the second's passes the limit. What one of two processes sees of it, about half, does not.
    limit = 0.8 * 2 * update["ppo/approx_kl"]
    for name, command in (("one", ONE), ("two", TWO)):
        plan = plan_of(llama, section, "lora", 16, **whole, early_stop_kl=limit)
        found, _ = train(command, tmp_path / name, plan)
        assert [each["minibatches"] for each in found["each"]] == [[1]] * found["processes"], name
        assert len({each["weights"] for each in found["each"]}) == 1
    assert found["processes"] == 2


def test_two_processes_that_were_killed_end_with_the_same_bytes(
    llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    plan = plan_of(llama, section, "lora", 8)
    straight, _ = train(TWO, tmp_path / "straight", plan)
    killed = {**plan, "checkpoints": str(tmp_path / "checkpoints")}
    for reports in (3, 7, 9):  # in SFT, in one of the reward model's members, and further on
        done = launch(TWO, tmp_path / "killed", {**killed, "dies_after": reports})
        assert done.returncode != 0
        assert b"Signal 9 (SIGKILL)" in done.stderr
    found, _ = train(TWO, tmp_path / "killed", killed)
    assert sum(len(found[stage]["history"]) for stage in STAGES) < sum(len(straight[s]["history"]) for s in STAGES) - 9
    for stage in STAGES:
        assert numbers(found[stage]["final"]) == numbers(straight[stage]["final"])
    assert found["each"][0]["weights"] == found["each"][1]["weights"] == straight["each"][0]["weights"]
    one, other = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("straight", "killed"))
    assert one == other


FAILING = """
import os
from rlhf_core import processes
from rlhf_core.errors import DataError
from tasks.stage import stage_run
with stage_run("sft") as run:
    assert processes.count() == 2
    processes.wait()
    if os.environ["RANK"] == "1":
        raise DataError("Found 0 rows in train.jsonl, expected some. Run `rlhf stage prepare`.")
    processes.wait()
"""


def test_one_process_that_fails_ends_all_with_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_toy(tmp_path / "toy", script=FAILING)
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())
    stages["stages"]["sft"] = {"cmd": "torchrun --standalone --nproc_per_node 2 stage.py", "outs": ["artifacts/sft"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(stages))
    monkeypatch.chdir(folder)
    for name, value in child_environment(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    began = time.monotonic()
    with pytest.raises(StageFailed) as caught:
        run_stage("sft")
    assert caught.value.message == "Found 0 rows in train.jsonl, expected some. Run `rlhf stage prepare`."
    assert time.monotonic() - began < 120  # the other waits for it; nobody waits for the other
    left = [
        each.info["cmdline"] or []
        for each in psutil.process_iter(["cmdline", "cwd"])
        if each.info["cwd"] == str(folder)
    ]
    assert [words for words in left if "stage.py" in " ".join(words)] == []
