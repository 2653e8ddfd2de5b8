"""The scripts that hold ours against TRL's. What needs TRL itself is skipped where it is not installed."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.functional import first_true_index
from rlhf_core.records import Ranking

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "parity.md"


@pytest.fixture
def maths(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    return importlib.import_module("parity_maths")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PROJECT / "scripts")
    return importlib.import_module("parity_training")


def pair(prompt: str, better: str = "yes") -> Ranking:
    return Ranking((("user", prompt),), (better, "no"), (1, 2))


# ---- the maths


def test_the_fixed_batch_stops_at_every_place_and_sometimes_never(maths: Any) -> None:
    ids_BT = maths.fixed_responses(2, 0, 50)
    assert sorted(first_true_index(ids_BT == 2).tolist()) == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10, 10, 10]
    assert not (ids_BT == 0).any()


def test_a_gap_is_the_largest_of_the_elements_and_signs_do_not_cancel(maths: Any) -> None:
    row = maths.compare("x", torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.5, 1.5, -3.0]))
    assert (row.count, row.largest, row.gap, row.rest) == (3, 3.0, 0.5, 0.5)
    assert not row.holds


def test_a_named_difference_has_to_be_there_and_to_explain_the_gap(maths: Any) -> None:
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert maths.compare("x", one, two, undone=two, named=["later"]).holds
    assert maths.compare("x", one, two, named=["later"]).holds
    assert not maths.compare("x", one, two, undone=one, named=["later"]).holds
    assert not maths.compare("x", two, two, undone=two, named=["later"]).holds


def test_a_number_that_is_none_holds_nowhere(maths: Any) -> None:
    nan, one = torch.tensor([torch.nan]), torch.tensor([1.0])
    assert not maths.compare("x", nan, one).holds
    with pytest.raises(AssertionError):
        maths.compare("x", one, nan)


def rows_of_the_page() -> list[list[str]]:
    lines = re.findall(r"^\| .*\|$", PAGE.read_text(encoding="utf-8").partition("## What differs")[0], flags=re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_every_difference_is_explained_on_the_page_and_stands_in_its_table(maths: Any) -> None:
    explained = {
        name.lower() for name in re.findall(r"^- \*\*(.+?)\.\*\*", PAGE.read_text(encoding="utf-8"), flags=re.M)
    }
    named = {name for row in rows_of_the_page() for name in row[-1].split(", ")} - {"none"}
    assert named == set(maths.DIFFERENCES.values())
    assert {name.lower() for name in named} <= explained


@pytest.mark.filterwarnings("default")  # TRL's and transformers' warnings of each other's names
@pytest.mark.slow
def test_every_row_holds_and_the_page_shows_these_rows(maths: Any) -> None:
    pytest.importorskip("trl")
    rows = maths.compare_all()
    assert [row.what for row in rows if not row.holds] == []
    assert [(page[0], page[1], page[-1]) for page in rows_of_the_page()] == [
        (row.what, str(row.count), row.named or "none") for row in rows
    ]


# ---- training side by side


def test_pairs_come_in_the_order_of_their_prompts_hashes_and_bad_rows_are_counted(
    training: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(6)]
    for name, order in (("one", rows), ("two", [rows[3], {"prompt": "bad"}, *rows[:3], *rows[4:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order), encoding="utf-8")
    pairs, bad = training.usable_pairs(str(tmp_path / "one.jsonl"))
    assert (len(pairs), bad) == (6, 0)
    assert training.usable_pairs(str(tmp_path / "two.jsonl")) == (pairs, 1)


def test_no_prompt_is_on_both_sides(training: Any) -> None:
    pairs = [pair("a"), pair("b"), pair("b", "perhaps"), pair("c"), pair("d")]
    train, held = training.split_pairs(pairs, 2, None)
    assert [record.prompt[0][1] for record in train] == ["a", "b"]
    assert [record.prompt[0][1] for record in held] == ["c", "d"]
    assert training.split_pairs(pairs, 2, 1) == (train, held[1:])


@pytest.mark.parametrize(("count", "held_out"), [(5, None), (6, None), (2, 3)])
def test_too_few_pairs_are_refused(training: Any, count: int, held_out: int | None) -> None:
    with pytest.raises(SystemExit, match=r"Found 5 usable pairs, expected .* --held-out"):
        training.split_pairs([pair("a"), pair("b"), pair("b", "perhaps"), pair("c"), pair("d")], count, held_out)


def test_a_run_that_has_its_file_is_not_done_again(training: Any, tmp_path: Path) -> None:
    calls = []

    def run() -> dict[str, Any]:
        calls.append(1)
        return {"loss": 0.5}

    path = tmp_path / "results" / "sft-ours-seed0.json"
    first = training.kept(path, {"pairs": 3}, run)
    assert first["loss"] == 0.5
    assert training.kept(path, {"pairs": 3}, run) == first
    assert len(calls) == 1
    with pytest.raises(SystemExit, match="other pairs"):
        training.kept(path, {"pairs": 4}, run)


def test_a_run_that_was_stopped_leaves_no_file(training: Any, tmp_path: Path) -> None:
    def run() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.kept(tmp_path / "one.json", {}, run)
    assert list(tmp_path.iterdir()) == []


def test_the_summary_by_hand(training: Any) -> None:
    results = {
        ("sft", "ours", 0): {"loss": 2.0},
        ("sft", "trl", 0): {"loss": 1.5},
        ("sft", "ours", 1): {"loss": 2.0},
        ("sft", "trl", 1): {"loss": 2.5},
        ("sft", "ours", 2): {"loss": 9.0},  # the other side is not done yet
        ("reward", "ours", 0): {"accuracy": 0.75, "loss": 0.5},
        ("reward", "trl", 0): {"accuracy": 0.5, "loss": 0.625},
    }
    assert training.summary(results).splitlines()[2:] == [
        "| reward | 0 | accuracy | 0.7500 | 0.5000 | +0.2500 |",
        "| reward | 0 | loss | 0.5000 | 0.6250 | -0.1250 |",
        "| sft | 0 | loss | 2.0000 | 1.5000 | +0.5000 |",
        "| sft | 1 | loss | 2.0000 | 2.5000 | -0.5000 |",
        "| sft | all 2 | loss | 2.0000 | 2.0000 | +0.0000 (deviation 0.7071) |",
    ]


def test_trl_gets_the_rows_as_our_loop_takes_them(training: Any) -> None:
    rows = training.in_order([f"row {n}" for n in range(7)], SimpleNamespace(seed=3, batch_size=2))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3)).tolist()
    assert rows == [f"row {n}" for n in order]


def test_the_command_line_changes_the_sections(training: Any) -> None:
    plain = training.sections(training.parse(["pairs.jsonl", "--params", str(PROJECT / "params.yaml")]))
    assert (plain["sft"].epochs, plain["reward"].epochs) == (1, 1)
    told = ["pairs.jsonl", "--params", str(PROJECT / "params.yaml"), "--schedule", "constant", "--center-coef", "0"]
    changed = training.sections(training.parse(told))
    assert (changed["sft"].schedule, changed["sft"].warmup_fraction, changed["reward"].center_coef) == (
        "constant",
        0,
        0,
    )
    assert changed["sft"].learning_rate == plain["sft"].learning_rate


@pytest.mark.filterwarnings("default")  # as above
@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e-12", "1e-3"])
def test_both_sides_end_alike(training: Any, llama: Path, tmp_path: Path, rate: str) -> None:
    """Without learning they measure alike; with a constant rate and no centring, eight steps differ by rounding."""
    pytest.importorskip("trl")
    rows = [
        {"prompt": f"Why {'so ' * (n % 7)}{n}?", "chosen": f"Because of {n}.", "rejected": "No."} for n in range(72)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    told = [str(tmp_path / "pairs.jsonl"), "--model", str(llama), "--pairs", "60", "--held-out", "11", "--seeds", "1"]
    told += ["--params", str(PROJECT / "params.yaml"), "--out", str(out), "--learning-rate", rate]
    training.main([*told, "--schedule", "constant", "--center-coef", "0"])
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["result"] for path in out.iterdir()}
    assert found["reward-ours-seed0"]["margins"] == pytest.approx(found["reward-trl-seed0"]["margins"], abs=2e-4)
    assert found["reward-ours-seed0"]["accuracy"] == found["reward-trl-seed0"]["accuracy"]
    assert found["sft-ours-seed0"]["loss"] == pytest.approx(found["sft-trl-seed0"]["loss"], abs=1e-5)
