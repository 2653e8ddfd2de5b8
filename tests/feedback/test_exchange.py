"""Files in, files out: what is imported, what is refused, and that our own reader takes what is exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from people import ANSWERS, RANKINGS, Person
from sqlalchemy import func, select

from rlhf_core.data import parse_ranking, read_rows
from rlhf_core.errors import DataError
from rlhf_core.feedback import exchange
from rlhf_core.feedback.store import Item, Store

Browser = Callable[..., Person]


def rows(*content: Any) -> list[tuple[int, Any]]:
    return list(enumerate(content, start=1))


def found(*content: Any, **options: Any) -> list[exchange.Found]:
    return exchange.find_items("f.jsonl", rows(*content), **{**DEFAULTS, **options})


DEFAULTS: dict[str, Any] = {"kind": None, "policies": ("ppo", "sft"), "how": "sampled"}


def test_rankings_are_to_be_ranked_and_their_ranks_are_not_needed() -> None:
    [item] = found({"prompt": "Why?", "responses": ["a", "b", "c"], "origins": [{"model": "base"}, "sft", {}]})
    assert item == ("rank", [("user", "Why?")], ["a", "b", "c"], ["base", "sft", ""], "", None)
    [pair] = found({"prompt": "Why?", "chosen": "a", "rejected": "b"}, kind="compare")
    assert pair.sources == ["chosen", "rejected"]


def test_answers_are_compared_by_prompt_and_sample() -> None:
    more = [{**row, "text": row["text"] + " More."} for row in ANSWERS]  # a second sample of each
    items = found(*ANSWERS, *more)
    assert len(items) == 12
    assert items[0] == (
        "compare",
        [("user", "Question 0?")],
        ["ppo says.", "sft says."],
        ["ppo", "sft"],
        "explain",
        None,
    )
    assert items[1].responses == ["ppo says. More.", "sft says. More."]
    assert found(*ANSWERS, policies=("sft", "base"))[0].sources == ["sft", "base"]


def test_answers_of_nobody_name_those_there_are() -> None:
    with pytest.raises(DataError, match="no answers by both ppo and sft, greedy; found base sampled, ppo sampled"):
        found(*ANSWERS, how="greedy")


def test_two_files_are_compared_by_prompt() -> None:
    mine = rows({"prompt": "Why?", "response": "mine"}, {"prompt": "Only here?", "response": "x"})
    theirs = rows({"prompt": "Why?", "text": "theirs"})
    [item] = exchange.pair_files(("mine", mine), ("theirs", theirs))
    assert (item.responses, item.sources) == (["mine", "theirs"], ["mine", "theirs"])
    with pytest.raises(DataError, match="share no prompt"):
        exchange.pair_files(("mine", mine), ("theirs", rows({"prompt": "Other?", "response": "x"})))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?", "responses": ["a"]}, r"f\.jsonl, line 1, responses: found \['a'\]"),
        ({"prompt": "", "responses": ["a", "b"]}, "line 1, prompt: found ''"),
        ({"prompt": "Why?", "responses": list("abcdefghij")}, "found 10, expected 9 at most"),
        ("no json", "line 1, row: found 'no json', expected one JSON object a line"),
        (17, "line 1, row: found 17"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_imported(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(row, RANKINGS[0])


def test_more_than_two_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="found 3, expected 2 to compare"):
        found(RANKINGS[0], kind="compare")


def test_importing_twice_adds_nothing_and_equal_answers_are_left_out(store: Store) -> None:
    same = [{**row, "prompt": "Same?", "text": "equal"} for row in (ANSWERS[6], ANSWERS[12])]
    with store.session() as session:
        first = exchange.add_items(session, found(*ANSWERS, *same))
        second = exchange.add_items(session, found(*ANSWERS))
        assert str(first) == "Added 6 to compare. 1 left out: both answers are the same."
        assert str(second) == "Added nothing. 6 were there already."
        assert session.scalar(select(func.count(Item.id))) == 6


def test_importing_again_for_more_people_raises_their_number_and_never_lowers_it(store: Store) -> None:
    told = []
    with store.session() as session:
        for overlap in (2, 3, 1):
            told.append(str(exchange.add_items(session, found(*ANSWERS), overlap=overlap)))
        assert set(session.scalars(select(Item.overlap))) == {3}
        twice = exchange.add_items(session, found(RANKINGS[0], RANKINGS[0]), overlap=2)
    assert told == [
        "Added 6 to compare.",
        "Added nothing. 6 were there already. 6 of them go to more people now.",
        "Added nothing. 6 were there already.",
    ]
    assert str(twice) == "Added 1 to rank. 1 were there already."


def test_the_admin_page_imports_and_exports(browser: Browser, tmp_path: Path) -> None:
    admin = browser("kim", admin=True)
    text = "".join(json.dumps(row) + "\n" for row in RANKINGS)
    answer = admin.post(
        "/admin/import?name=mine.jsonl&overlap=2", content=text.encode(), headers={"X-CSRF-Token": admin.token()}
    )
    assert answer.json() == {"message": "Added 6 to rank."}
    assert "<td>12</td>" in admin.get("/admin").text
    bad = admin.post("/admin/import?name=mine.jsonl", content=b"{}\n", headers={"X-CSRF-Token": admin.token()})
    assert bad.status_code == 422
    assert "mine.jsonl, line 1" in bad.json()["detail"]
    admin.judge(client_id="client-1")
    exported = admin.get("/admin/rankings.jsonl")
    assert exported.headers["content-disposition"] == 'attachment; filename="rankings.jsonl"'
    assert len(exported.text.splitlines()) == 1


def test_our_reader_takes_what_is_exported(browser: Browser, store: Store, items: None, tmp_path: Path) -> None:
    kim = browser("kim")
    shown = kim.responses()
    kim.judge(client_id="client-1", ranks=[2, 1, 1], comment="a tie")
    kim.judge(client_id="client-2", verdict="skipped", ranks=None)
    kim.judge(client_id="client-3", verdict="none", ranks=None)
    kim.judge(client_id="client-4")
    kim.submit(f"/judgements/{kim.last()}/undo")
    kim.judge("compare", client_id="client-5", ranks=[2, 1])
    with store.session() as session:
        (tmp_path / "human.jsonl").write_text(exchange.as_lines(exchange.export_rankings(session)), encoding="utf-8")
    ranking, pair = [parse_ranking(row) for _, row in read_rows(str(tmp_path / "human.jsonl"))]
    assert dict(zip(ranking.responses, ranking.ranks, strict=True)) == dict(zip(shown, [2, 1, 1], strict=True))
    assert (ranking.source, ranking.annotator, ranking.category) == ("human", "kim", "explain")
    assert sorted(pair.ranks) == [1, 2]


def test_an_empty_answer_can_be_judged_but_is_not_exported(browser: Browser, store: Store) -> None:
    empty = [{**ANSWERS[6], "text": " "}, {**ANSWERS[12], "text": "Something."}]
    for row in empty:
        row["prompt"] = "Why?"
    with store.session() as session:
        exchange.add_items(session, found(*empty))
    kim = browser("kim")
    assert "(says nothing)" in kim.get("/compare").text
    kim.judge("compare", client_id="client-1")
    with store.session() as session:
        assert list(exchange.export_rankings(session)) == []
