"""Rankings from several sources as one training set: whose prompts count, and how often each is seen."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.errors import DataError, MissingArtifact
from rlhf_core.mixing import count_sources, load_feedback, weigh
from rlhf_core.records import Ranking


def ranking(name: str, source: str = "") -> Ranking:
    return Ranking((("user", name),), ("yes", "no"), (1, 2), source=source)


def names(rankings: list[Ranking]) -> list[str]:
    return [one.prompt[0][1] for one in rankings]


HUMAN = [ranking(f"h{number}", "human") for number in range(7)]
STARTER = [ranking(f"s{number}") for number in range(4)]


def test_without_weights_every_ranking_is_there_once_in_its_order() -> None:
    assert weigh([*STARTER, *HUMAN], {}, seed=3) == [*STARTER, *HUMAN]


def test_a_whole_weight_repeats_and_nought_leaves_out() -> None:
    found = names(weigh([*STARTER, *HUMAN], {"human": 2, "starter": 0}, seed=0))
    assert found == [name for one in HUMAN for name in [one.prompt[0][1]] * 2]


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 4), (1.25, 9), (0.1, 1), (2.999, 21), (0.01, 0)])
def test_a_fraction_is_a_share_drawn_without_replacement(weight: float, expected: int) -> None:
    # 0.5 of 7 is 3.5, rounded up; 1.25 is each once and 1.75, rounded to 2, once more
    found = names(weigh(HUMAN, {"human": weight}, seed=1))
    assert len(found) == expected
    assert all(found.count(name) in (int(weight), int(weight) + 1) for name in names(HUMAN))


def test_one_sources_weight_changes_no_other_sources_draw() -> None:
    both = weigh([*STARTER, *HUMAN], {"human": 0.5, "starter": 0.5}, seed=5)
    alone = weigh(HUMAN, {"human": 0.5}, seed=5)
    assert [one for one in both if one.source] == alone


def test_the_seed_decides_the_draw() -> None:
    draws = {tuple(names(weigh(HUMAN, {"human": 0.5}, seed=seed))) for seed in range(10)}
    assert len(draws) > 1
    assert weigh(HUMAN, {"human": 0.5}, seed=1) == weigh(HUMAN, {"human": 0.5}, seed=1)


def test_sources_are_counted_by_name() -> None:
    assert count_sources([*STARTER, *HUMAN]) == {"human": 7, "starter": 4}


# ---- judgements by split


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "prepared"
    folder.mkdir()
    write(folder / "prompts_train.jsonl", [{"prompt": "one", "category": "advice"}])
    write(folder / "prompts_validation.jsonl", [{"prompt": "two"}])
    return folder


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judged(prompt: str, ranks: tuple[int, int] = (1, 2), **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "responses": ["a", "b"], "ranks": list(ranks), "source": "human", **more}


def test_judgements_go_by_the_split_of_their_prompt(tmp_path: Path, prepared: Path) -> None:
    write(tmp_path / "feedback/002.jsonl", [judged("two"), judged("of the test split")])
    write(tmp_path / "feedback/001.jsonl", [judged("one", annotator="kim", guideline="abc")])
    found = load_feedback(tmp_path / "feedback", prepared)
    assert {split: names(rows) for split, rows in found.items()} == {"train": ["one"], "validation": ["two"]}
    assert found["train"][0].category == "advice"
    assert (found["train"][0].source, found["train"][0].annotator) == ("human", "kim")


def test_a_judgement_that_prefers_nothing_teaches_nothing(tmp_path: Path, prepared: Path) -> None:
    write(tmp_path / "feedback/001.jsonl", [judged("one", (1, 1))])
    assert load_feedback(tmp_path / "feedback", prepared)["train"] == []


def test_a_bad_row_is_named(tmp_path: Path, prepared: Path) -> None:
    write(tmp_path / "feedback/001.jsonl", [judged("one"), {"prompt": "one", "responses": ["a"]}])
    with pytest.raises(DataError, match=r"001\.jsonl, line 2, responses: found \['a'\], expected a list of two"):
        load_feedback(tmp_path / "feedback", prepared)


def test_a_missing_folder_is_named(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(
        MissingArtifact, match=r"Found no folder .*feedback of judgements, which reward\.feedback names"
    ):
        load_feedback(tmp_path / "feedback", prepared)
