"""Exports of Label Studio and Argilla, in the forms that their documentation shows, as rankings."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.data import parse_ranking
from rlhf_core.errors import DataError
from rlhf_core.feedback.foreign import read_foreign

EXPORTS = Path(__file__).parent / "exports"
LIGHTER, COLD, NO = "Ice is lighter than water for its size.", "Because they are cold.", "They do not float."


def export(name: str) -> Any:
    return json.loads((EXPORTS / f"{name}.json").read_text())


def test_label_studios_rankers_and_pairs() -> None:
    ranked, bucketed, pair = read_foreign(export("label_studio"), name="x", buckets=("good", "bad"))
    assert ranked == {
        "prompt": "Why do ice cubes float?",
        "responses": [LIGHTER, COLD, NO],
        "ranks": [1, 2, 3],
        "source": "human",
        "annotator": "label-studio-10",
    }
    # the two in the worse bucket share a rank; the cancelled one ranked nothing
    assert (bucketed["responses"], bucketed["ranks"]) == ([LIGHTER, NO, COLD], [1, 2, 2])
    assert bucketed["annotator"] == "kim@example.org"
    assert (pair["responses"], pair["ranks"]) == (["A banana.", "Red."], [1, 2])


def test_buckets_have_to_be_put_in_order() -> None:
    with pytest.raises(DataError, match="x, number 1: found the buckets bad, good; say in which order they stand"):
        read_foreign(export("label_studio"), name="x")


@pytest.mark.parametrize(("selected", "ranks"), [("right", [2, 1]), (None, [1, 1])])
def test_the_other_side_or_none_may_be_chosen(selected: str | None, ranks: list[int]) -> None:
    task = export("label_studio")[1]
    task["annotations"][0]["result"][0]["value"] = {"selected": selected} if selected else {}
    assert read_foreign([task], name="x")[0]["ranks"] == ranks


def test_argillas_order_of_names_and_no_suggestion() -> None:
    [row] = read_foreign(export("argilla"), name="x")
    assert row["responses"] == ["Ice is lighter.", "No.", "Cold."]
    assert row["ranks"] == [1, 2, 3]
    assert row["annotator"].endswith("0001")


def test_argillas_first_version_has_ties_and_drafts() -> None:
    [row] = read_foreign(export("argilla_first_version"), name="x")
    assert row["prompt"] == "Name a yellow fruit."
    assert (row["responses"], row["ranks"]) == (["A banana.", "A lemon.", "Red."], [1, 1, 3])


@pytest.mark.parametrize("name", ["label_studio", "argilla", "argilla_first_version"])
def test_every_row_is_one_that_the_pipeline_reads(name: str) -> None:
    for row in read_foreign(export(name), name=name, buckets=("good", "bad")):
        assert parse_ranking(row).source == "human"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "x is no list of tasks or records"),
        ([{"text": "a"}], "x, number 1: found text; expected data and annotations"),
    ],
)
def test_another_file_is_refused(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_foreign(content, name="x")


def test_a_prompt_under_another_name_is_named() -> None:
    task = export("argilla")[0]
    task["fields"]["ask"] = task["fields"].pop("prompt")
    with pytest.raises(
        DataError, match=r"number 1: found the fields ask, response1, .*; expected a prompt in prompt or"
    ):
        read_foreign([task], name="x")
    assert read_foreign([task], name="x", prompt="ask")[0]["prompt"] == "Why do ice cubes float?"


def test_an_id_that_is_not_listed_is_named() -> None:
    task = export("label_studio")[0]
    task["annotations"] = task["annotations"][:1]
    task["annotations"][0]["result"][0]["value"]["ranker"] = ["a", "z"]
    with pytest.raises(DataError, match="the ranking names 'z', which is none of the listed a, b, c"):
        read_foreign([task], name="x")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("label_studio", (0, "annotations", 0, "result", 0, "value"), {}, r"not in the form of an export \(KeyError"),
        ("label_studio", (0, "annotations", 0, "result"), None, r"not in the form of an export \(TypeError"),
        ("label_studio", (1, "data"), ["a"], "x, number 2: found the fields a; expected a prompt"),
        ("argilla", (0, "responses", "preference", 0), "kim", r"not in the form of an export \(AttributeError"),
        ("argilla", (0, "fields", "response1"), " ", "x, number 1: found no text in response"),
        ("argilla", (0, "fields", "prompt"), "", "x, number 1: found no text in the prompt"),
    ],
)
def test_what_is_malformed_is_named(name: str, place: tuple[Any, ...], value: Any, message: str) -> None:
    tasks = export(name)
    inner = tasks
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(DataError, match=message):
        read_foreign(tasks, name="x", buckets=("good", "bad"))
