"""Writing, scores by axis, gold questions, and what is left for today."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from people import ANSWERS, RANKINGS, SECRET, Person
from sqlalchemy import select

from rlhf_core.data import parse_demonstration, parse_ranking, read_rows
from rlhf_core.errors import DataError
from rlhf_core.feedback import exchange
from rlhf_core.feedback.app import create_app
from rlhf_core.feedback.gold import accuracy
from rlhf_core.feedback.judging import progress
from rlhf_core.feedback.results import find
from rlhf_core.feedback.store import Item, Judgement, Store

Browser = Callable[..., Person]
TO_WRITE = [{"prompt": "Name a fruit.", "category": "explain"}, {"prompt": "What is a key?", "response": "A **lok**."}]


def add(store: Store, rows: list[Any], *, kind: Any = None, gold: bool = False, **options: Any) -> None:
    lines = list(enumerate(rows, start=1))
    with store.session() as session:
        found = exchange.find_items("rows", lines, kind=kind, policies=("ppo", "sft"), how="sampled", gold=gold)
        exchange.add_items(session, found, **options)


def write(person: Person, text: str | None, client_id: str, **changes: Any) -> Any:
    body = {"client_id": client_id, "item": person.item("write"), "verdict": "written", "written": text, "seconds": 9}
    return person.submit("/judgements", {**body, **changes})


def exported(store: Store, what: str, folder: Path) -> list[Any]:
    with store.session() as session:
        (folder / "out.jsonl").write_text(exchange.as_lines(exchange.EXPORTS[what](session)), encoding="utf-8")
    return [row for _, row in read_rows(str(folder / "out.jsonl"))]


# ---- write


def test_an_answer_is_a_demonstration_and_a_correction_a_pair_too(
    browser: Browser, store: Store, tmp_path: Path
) -> None:
    add(store, TO_WRITE, kind="write")
    kim = browser("kim")
    for number in range(2):
        corrects = "A **lok**." in kim.get("/write").text  # as the text to mend
        text = "A thing that opens a lock." if corrects else " A plum. "
        assert write(kim, text, f"client-{number}").json() == {"stored": True, "new": True}
    assert "Nothing is left for you" in kim.get("/write").text
    rows = exported(store, "demonstrations", tmp_path)
    told = {parse_demonstration(row).response: parse_demonstration(row).prompt for row in rows}
    assert told == {
        "A plum.": (("user", "Name a fruit."),),
        "A thing that opens a lock.": (("user", "What is a key?"),),
    }
    [pair] = map(parse_ranking, exported(store, "pairs", tmp_path))
    assert pair.responses == ("A thing that opens a lock.", "A **lok**.")
    assert (pair.ranks, pair.source, pair.annotator) == ((1, 2), "human", "kim")
    assert exported(store, "rankings", tmp_path) == []


def test_a_response_that_was_left_as_it_is_makes_no_pair(browser: Browser, store: Store, tmp_path: Path) -> None:
    add(store, TO_WRITE[1:], kind="write")
    write(browser("kim"), "A **lok**.\n", "client-1")
    assert exported(store, "pairs", tmp_path) == []
    assert len(exported(store, "demonstrations", tmp_path)) == 1


def test_undo_gives_the_text_back(browser: Browser, store: Store) -> None:
    add(store, TO_WRITE[:1], kind="write")
    kim = browser("kim")
    write(kim, "A first thought.", "client-1")
    kim.submit(f"/judgements/{kim.last('write')}/undo")
    assert ">A first thought.</textarea>" in kim.get("/write").text


@pytest.mark.parametrize("changes", [{"written": None}, {"written": "  "}, {"verdict": "none"}, {"ranks": [1]}])
def test_what_is_no_text_is_refused(browser: Browser, store: Store, changes: dict[str, Any]) -> None:
    add(store, TO_WRITE[:1], kind="write")
    kim = browser("kim")
    assert write(kim, "x", "client-1", **changes).status_code == 422
    assert write(kim, None, "client-2", verdict="skipped").status_code == 200


def test_a_text_has_no_place_in_a_ranking(browser: Browser, store: Store, items: None) -> None:
    kim = browser("kim")
    assert kim.judge(client_id="client-1", written="x").status_code == 422
    assert kim.judge(client_id="client-1", verdict="written", written="x", ranks=None).status_code == 422


def test_the_answers_of_one_policy_can_be_corrected(store: Store) -> None:
    add(store, ANSWERS, kind="write")
    with store.session() as session:
        assert {tuple(item.sources) for item in session.scalars(select(Item))} == {("ppo",)}


def test_rows_without_responses_are_written_for_only_when_asked() -> None:
    with pytest.raises(DataError, match="responses and ranks"):
        exchange.find_items("rows", [(1, TO_WRITE[0])], kind=None, policies=("a", "b"), how="")


# ---- scores by axis


def test_scores_are_stored_in_the_items_order_and_exported(browser: Browser, store: Store, tmp_path: Path) -> None:
    add(store, RANKINGS, axes=["helpful", "kind"])
    kim = browser("kim")
    page = kim.get("/rank").text
    assert page.count("<fieldset data-axis=") == 6
    shown = kim.responses()
    scores = {"helpful": [5, 3, 1], "kind": [4, 4, 2]}
    assert kim.judge(client_id="client-1", scores=scores).status_code == 200
    [ranking] = map(parse_ranking, exported(store, "rankings", tmp_path))
    for axis, values in scores.items():
        assert dict(zip(ranking.responses, ranking.scores[axis], strict=True)) == dict(zip(shown, values, strict=True))
    kim.submit(f"/judgements/{kim.last()}/undo")
    assert kim.get("/rank").text.count(" checked>") == 6


@pytest.mark.parametrize(
    "scores",
    [None, {}, {"helpful": [1, 2, 3]}, {"helpful": [1, 2, 3], "other": [1, 2, 3]},
     {"helpful": [1, 2, 6], "kind": [1, 2, 3]}, {"helpful": [1, 2], "kind": [1, 2, 3]}],
)  # fmt: skip
def test_scores_that_are_not_whole_are_refused(browser: Browser, store: Store, scores: Any) -> None:
    add(store, RANKINGS, axes=["helpful", "kind"])
    assert browser("kim").judge(client_id="client-1", scores=scores).status_code == 422


def test_only_what_is_ranked_is_scored_and_bad_axes_are_named(store: Store) -> None:
    add(store, ANSWERS, axes=["helpful"])
    with store.session() as session:
        assert {tuple(item.axes) for item in session.scalars(select(Item))} == {()}
    with pytest.raises(DataError, match="Found axes"):
        add(store, RANKINGS, axes=["helpful", "helpful"])
    assert exchange.names(" helpful, kind ,") == ["helpful", "kind"]


# ---- gold questions


@pytest.mark.parametrize(
    ("ranks", "known", "expected"),
    [([1, 2, 3], [1, 2, 3], 1), ([3, 2, 1], [1, 2, 3], 0), ([1, 3, 2], [1, 2, 3], 2 / 3), ([1, 1, 2], [1, 2, 3], 2 / 3),
     ([2, 1], [1, 1], 0), ([1, 1], [1, 1], 1), (None, [1, 2], 0), (None, [], 1), ([1, 2], [], 0),
     ([1, 2, 3], [1, 1, 2], 1)],
)  # fmt: skip
def test_accuracy_is_the_share_of_ordered_pairs(ranks: Any, known: list[int], expected: float) -> None:
    assert accuracy(ranks, known) == pytest.approx(expected)


def test_everybody_gets_gold_questions_and_is_measured_by_them(browser: Browser, store: Store) -> None:
    rows = [{**row, "ranks": [1, 3, 2]} for row in RANKINGS[:2]]
    add(store, rows, gold=True)
    people = {name: browser(name) for name in ("kim", "sam", "lee")}
    for name, person in people.items():
        for number in range(2):
            best = person.responses().index("A cherry.")
            ranks = [2, 2, 2]
            ranks[best] = 3 if name == "sam" else 1
            assert person.judge(client_id=f"client-{name}-{number}", ranks=ranks).status_code == 200
    with store.session() as session:
        of = {habit.who: (habit.gold.mean, habit.golds) for habit in find(session).habits["rank"]}
        # best of three is known: two of three ordered pairs are right where it comes first, none where it comes last
        assert of["kim"] == (pytest.approx(2 / 3), 2)
        assert of["sam"] == (0, 2)
        assert of["all"][1] == 6
        assert progress(session, None, "rank")[1:3] == (2, 2)
    assert "gold" not in people["kim"].get("/rank").text


def test_an_answer_becomes_known_when_its_file_is_imported_again(browser: Browser, store: Store) -> None:
    add(store, RANKINGS[:2])
    kim = browser("kim", admin=True)
    for number in range(2):
        ranks = [1 if text == "A cherry." else 2 for text in kim.responses()]
        kim.judge(client_id=f"client-{number}", ranks=ranks)
    kim.submit(f"/admin/gold/{kim.last()}")  # which the file's answer takes the place of
    assert "of 2</span>" not in kim.get("/results").text

    def import_again(*known: tuple[str, int]) -> str:
        responses, ranks = zip(*known, strict=True)
        rows = [{**row, "responses": responses, "ranks": ranks} for row in RANKINGS[:2]]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        headers = {"X-CSRF-Token": kim.token()}
        return kim.post("/admin/import", params={"known": True}, content=content, headers=headers).json()["message"]

    # In another order than they lie here: the ranks go with the responses.
    said = import_again(("Red.", 3), ("A banana.", 2), ("A cherry.", 1))
    assert said == "Added nothing. 2 were there already. 2 of them have a known answer now."
    assert import_again(("Red.", 3), ("A banana.", 2), ("A cherry.", 1)) == "Added nothing. 2 were there already."
    with store.session() as session:
        assert [(item.gold, item.gold_from) for item in session.scalars(select(Item))] == [([1, 3, 2], None)] * 2
        [everyone, _] = find(session).habits["rank"]
    assert (everyone.gold.mean, everyone.golds) == (pytest.approx(2 / 3), 2)  # cherry first, the others tied
    assert "of 2</span>" in kim.get("/results").text
    before = kim.get("/results").text
    import_again(("Red.", 1), ("A banana.", 2), ("A cherry.", 3))
    assert kim.get("/results").text != before


def test_an_admin_makes_an_own_judgement_the_known_answer(browser: Browser, store: Store, items: None) -> None:
    admin, sam = browser("kim", admin=True), browser("sam")
    admin.judge("compare", client_id="client-1")
    mine = admin.last("compare")
    assert f'data-gold="{mine}" aria-pressed="false"' in admin.get("/admin").text
    assert sam.submit(f"/admin/gold/{mine}").status_code == 403
    sam.judge("compare", client_id="client-2")
    assert admin.submit(f"/admin/gold/{sam.last('compare')}").status_code == 404  # another's
    assert admin.submit(f"/admin/gold/{mine}").json() == {"gold": True}
    with store.session() as session:
        judgement = session.get(Judgement, int(mine))
        assert judgement.item.gold == judgement.ranks
        golds = {habit.who: habit.golds for habit in find(session).habits["compare"]}
        assert golds["kim"] == 0  # not measured by itself
    assert admin.submit(f"/admin/gold/{mine}").json() == {"gold": False}
    admin.submit(f"/admin/gold/{mine}")
    admin.submit(f"/judgements/{mine}/undo")
    with store.session() as session:
        assert session.get(Judgement, int(mine)).item.gold is None  # what was taken back is no answer


# ---- what is left


def test_what_is_left_today_is_the_days_number_or_all_there_is(browser: Browser, store: Store, items: None) -> None:
    kim = browser("kim")
    assert "left for you today 6" in kim.get("/rank").text
    kim.judge(client_id="client-1")
    assert "left for you today 5" in kim.get("/rank").text
    with store.session() as session:
        who = session.scalars(select(Judgement)).one().annotator_id
        assert progress(session, who, "rank", a_day=3)[3:] == (1, 2)
        assert progress(session, who, "rank", a_day=50).left == 5
        session.scalars(select(Judgement)).one().created_at = (
            session.scalars(select(Item.created_at)).first().replace(year=2020)
        )
        session.flush()
        assert progress(session, who, "rank", a_day=3)[3:] == (0, 3)  # of another day


def test_the_pages_tell_what_is_left_of_the_days_number(store: Store, items: None) -> None:
    kim = Person(create_app(store, secret=SECRET, a_day=3), base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
    assert kim.get("/").text.count("left for you today 3") == 2  # to rank, and to compare
    kim.judge(client_id="client-1")
    assert "left for you today 2" in kim.get("/rank").text
    assert "left for you today 3" in kim.get("/compare").text
