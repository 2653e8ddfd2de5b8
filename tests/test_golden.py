"""The numbers of a tiny run stay what they are; `make golden` rewrites them, and the difference is reviewed."""

import json
from pathlib import Path
from typing import Any

import pytest
from loading import load_script

GOLDEN = Path(__file__).resolve().parent / "golden"
STAGES = ("sft", "reward", "ppo", "dpo")
# float32 on another processor: its matrix kernels add in another order, and every optimiser step carries that on.
LOOSE = {"rel": 1e-4, "abs": 1e-6}
KL = {"rel": 1e-4, "abs": 4e-6}  # before anything is learned 0: a difference of log-probs of 25 nats, of float32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return load_script("golden").measure_all(tmp_path_factory.mktemp("golden"))


def expected(stage: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{stage}.json").read_text(encoding="utf-8"))


def test_there_is_one_file_a_stage() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{stage}.json" for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_final_numbers_are_the_golden_ones(found: dict[str, dict[str, Any]], stage: str) -> None:
    assert found[stage]["final"] == pytest.approx(expected(stage)["final"], **LOOSE)


@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_the_golden_one(found: dict[str, dict[str, Any]], stage: str) -> None:
    ours, theirs = found[stage]["history"], expected(stage)["history"]
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, **(KL if name == "ppo/kl" else LOOSE)), name


def test_the_same_responses_are_sampled(found: dict[str, dict[str, Any]]) -> None:
    assert found["ppo"]["responses"] == expected("ppo")["responses"]
