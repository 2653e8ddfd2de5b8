"""Rankings from several sources as one training set: whose prompts count, and how often each is seen."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.errors import ConfigError, DataError, MissingArtifact
from rlhf_core.mixing import (
    SPLITS,
    count_sources,
    load_demonstrations,
    load_feedback,
    load_rankings,
    require_axes,
    source_of,
    weigh,
)
from rlhf_core.records import Ranking


def ranking(name: str, source: str = "") -> Ranking:
    return Ranking((("user", name),), ("yes", "no"), (1, 2), source=source)


def names(rankings: list[Ranking]) -> list[str]:
    return [one.prompt[0][1] for one in rankings]


HUMAN = [ranking(f"h{number}", "human") for number in range(7)]
STARTER = [ranking(f"s{number}") for number in range(4)]


def test_without_weights_every_ranking_is_there_once_in_its_order() -> None:
    assert weigh([*STARTER, *HUMAN], {}, by=source_of, seed=3) == [*STARTER, *HUMAN]


def test_a_whole_weight_repeats_and_nought_leaves_out() -> None:
    found = names(weigh([*STARTER, *HUMAN], {"human": 2, "starter": 0}, by=source_of, seed=0))
    assert found == [name for one in HUMAN for name in [one.prompt[0][1]] * 2]


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 4), (1.25, 9), (0.1, 1), (2.999, 21), (0.01, 0)])
def test_a_fraction_is_a_share_drawn_without_replacement(weight: float, expected: int) -> None:
    # 0.5 of 7 is 3.5, rounded up; 1.25 is each once and 1.75, rounded to 2, once more
    found = names(weigh(HUMAN, {"human": weight}, by=source_of, seed=1))
    assert len(found) == expected
    assert all(found.count(name) in (int(weight), int(weight) + 1) for name in names(HUMAN))


def test_one_sources_weight_changes_no_other_sources_draw() -> None:
    both = weigh([*STARTER, *HUMAN], {"human": 0.5, "starter": 0.5}, by=source_of, seed=5)
    alone = weigh(HUMAN, {"human": 0.5}, by=source_of, seed=5)
    assert [one for one in both if one.source] == alone


def test_the_seed_decides_the_draw() -> None:
    draws = {tuple(names(weigh(HUMAN, {"human": 0.5}, by=source_of, seed=seed))) for seed in range(10)}
    assert len(draws) > 1
    assert weigh(HUMAN, {"human": 0.5}, by=source_of, seed=1) == weigh(HUMAN, {"human": 0.5}, by=source_of, seed=1)


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


def ranked(prompt: str, ranks: tuple[int, int] = (1, 2), **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "responses": ["a", "b"], "ranks": list(ranks), **more}


def judged(prompt: str, ranks: tuple[int, int] = (1, 2), **more: Any) -> dict[str, Any]:
    return ranked(prompt, ranks, source="human", **more)


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


# ---- all of it


def test_judgements_join_the_data_of_their_split(section: Callable[..., Any], tmp_path: Path, prepared: Path) -> None:
    for split in ("train", "validation", "test"):
        write(prepared / f"rankings_{split}.jsonl", [judged(f"starter {split}")])
    write(tmp_path / "feedback/001.jsonl", [judged("one"), judged("two"), judged("none of them")])
    config = section("reward", feedback=str(tmp_path / "feedback"))
    found = load_rankings(config, prepared, ("train", "validation", "test"))
    assert {split: names(rows) for split, rows in found.items()} == {
        "train": ["starter train", "one"],
        "validation": ["starter validation", "two"],
        "test": ["starter test"],
    }
    assert list(load_rankings(config, prepared, SPLITS)) == ["train", "validation"]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"human": 2}, {"a": 1, "one": 2, "two": 2}),
        ({"advice": 3}, {"a": 3, "one": 3, "two": 1}),
        ({"advice": 0, "human": 2}, {"two": 2}),  # the category goes first
    ],
)
def test_rankings_weigh_by_source_or_category(
    section: Callable[..., Any], tmp_path: Path, weights: dict[str, float], expected: dict[str, int]
) -> None:
    source = {"source": "human"}
    rows = [ranked("a", category="advice"), ranked("one", category="advice", **source), ranked("two", **source)]
    write(tmp_path / "rankings_train.jsonl", rows)
    found = load_rankings(section("reward", weights=weights), tmp_path, ["train"])["train"]
    assert Counter(names(found)) == expected


@pytest.mark.parametrize("axis", ["kindness", "flat"])
def test_an_axis_that_nothing_teaches_is_refused_by_name(axis: str) -> None:
    def record(**scores: list[float]) -> Ranking:
        return Ranking((("user", "hi"),), ("a", "b"), (1, 2), scores=dict(scores) or None)

    rows = [record(helpfulness=[1, 2], flat=[3, 3]), record(helpfulness=[2, 1], truth=[0, 4]), record()]
    require_axes({"train": rows, "gold": rows}, ["helpfulness", "truth"])
    with pytest.raises(
        ConfigError,
        match=rf"names '{axis}', but no ranking of split train .* helpfulness \(2 rankings\), truth \(1 rankings\)",
    ):
        require_axes({"train": rows}, ["helpfulness", axis])
    with pytest.raises(ConfigError, match=r"'truth', but no ranking of split gold .* found there: none"):
        require_axes({"train": rows, "gold": rows[2:]}, ["truth"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"ai": 0}}, r"weights \{ai: 0\} leave no ranking .* apart; found there: ai \(2 "),
        ({"weights": {"ai": 0.1, "human": 0}}, r"weights \{ai: 0\.1, human: 0\} leave no ranking"),
        (
            {"weights": {"ai": 0, "human": 1}, "axes": ["kind"]},
            r"ai: 0, human: 1\} leave .* apart on axis 'kind'; found",
        ),
    ],
)
def test_weights_that_leave_nothing_to_learn_are_refused(
    section: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def row(source: str, ranks: list[int], **more: Any) -> dict[str, Any]:
        return {"prompt": "hi", "responses": ["a", "b"], "ranks": ranks, "source": source, **more}

    rows = [row("ai", [1, 2], scores={"kind": [1, 2]})] * 2 + [row("rule", [1, 1])]
    rows += [row("human", [2, 1])] if "axes" in changes else []
    for split in ("train", "validation", "gold", "test"):
        (tmp_path / f"rankings_{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(ConfigError, match=message):
        load_rankings(section("reward", **changes), tmp_path)
    found = load_rankings(section("reward", **{**changes, "weights": {"ai": 2}}), tmp_path)
    assert len(found["train"]) == len(rows) + 2 == len(found["test"]) + 2


def told(prompt: str, category: str) -> dict[str, Any]:
    return {"prompt": prompt, "response": "yes", "category": category}


@pytest.fixture
def demonstrations(tmp_path: Path, prepared: Path) -> Path:
    """Two of train by hand and one of validation, beside a revision of each split."""
    write(prepared / "demonstrations_train.jsonl", [told("a", "advice"), told("b", "harmful")])
    write(prepared / "demonstrations_validation.jsonl", [told("c", "harmful")])
    write(prepared / "prompts_gold.jsonl", [{"prompt": "three", "category": "look_alike"}])
    write(tmp_path / "revisions/001.jsonl", [told("two", ""), told("three", ""), told("none of them", "")])
    return tmp_path / "revisions"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, ["a", "b", "three"]),
        ({"look_alike": 3}, ["a", "b", "three", "three", "three"]),
        ({"harmful": 0, "look_alike": 2}, ["a", "three", "three"]),  # of train alone
    ],
)
def test_demonstrations_are_seen_as_often_as_their_category_weighs(
    section: Callable[..., Any], prepared: Path, demonstrations: Path, weights: dict[str, float], expected: list[str]
) -> None:
    found = load_demonstrations(section("sft", feedback=str(demonstrations), weights=weights), prepared)
    assert [row.prompt[0][1] for row in found["train"]] == expected
    assert [row.prompt[0][1] for row in found["validation"]] == ["c", "two"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"look_alikes": 2}, r"weights \{look_alikes: 2\} name look_alikes, which no .* advice \(1 .*\), harmful"),
        ({"advice": 0, "harmful": 0.1, "look_alike": 0}, r"0, harmful: 0\.1, look_alike: 0\} leave nothing; .* found"),
    ],
)
def test_weights_of_categories_that_teach_nothing_are_refused(
    section: Callable[..., Any], prepared: Path, demonstrations: Path, weights: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_demonstrations(section("sft", feedback=str(demonstrations), weights=weights), prepared)


def test_a_weight_below_nought_is_refused(section: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"weights\.harmful -1 is not between 0 and 10"):
        section("sft", weights={"harmful": -1})
