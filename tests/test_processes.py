"""One batch at once, in pieces, or shared out over two processes: the same losses and weights, and one end."""

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
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def train(command: list[str], folder: Path, plan: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What tests/share.py finds when a launcher runs it, and the trained weights."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(PROJECT / "tests/share.py"), str(folder)], env=env, capture_output=True)
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


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_and_processes_change_nothing(
    llama: Path, section: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    rate = 1e-2 if method == "lora" else 1e-3

    def plan(size: int) -> dict[str, Any]:
        common = {"method": method, "micro_batch_size": size, "learning_rate": rate, "max_grad_norm": 0.5}
        supervised = {**common, "batch_size": 16, "epochs": 2}
        sections = {
            "sft": section("sft", **supervised),
            "reward": section("reward", **supervised, center_coef=0.01),
            "dpo": section("dpo", **supervised),
            "ppo": section(
                "ppo", **{**common, "micro_batch_size": size // 4}, updates=2, rollouts=16, minibatch_size=4, epochs=2,
                kl_coef=0.1, value_learning_rate=rate, missing_eos_penalty=1.0,
            ),
        }  # fmt: skip
        return {"base": str(llama), **{name: found.model_dump(mode="json") for name, found in sections.items()}}

    whole, weights = train(ONE, tmp_path / "whole", plan(16))
    assert whole.pop("processes") == 1
    assert whole["ppo"]["history"][1][1]["ppo/approx_kl"] > 1e-6  # something was learnt
    for name, command, size, count in (("pieces", ONE, 4, 1), ("processes", TWO, 8, 2)):
        found, learnt = train(command, tmp_path / name, plan(size))
        assert found.pop("processes") == count
        assert_alike(numbers(found), numbers(whole), name)
        assert set(learnt) == set(weights)
        for key, tensor in weights.items():
            # Adam divides by the gradient's own size, so an entry near 0 moves by its rounding.
            torch.testing.assert_close(
                learnt[key], tensor, rtol=1e-3, atol=0.02 * rate, msg=lambda m, k=key: f"{k}: {m}"
            )


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
