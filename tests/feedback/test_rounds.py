"""A round's items on the pages: counted, read and closed without touching other items."""

from collections.abc import Callable

import pytest
from people import Person
from sqlalchemy import select

from rlhf_core.agreement import judged_so_far
from rlhf_core.feedback import exchange, rounds
from rlhf_core.feedback.results import find
from rlhf_core.feedback.store import Item, Judgement, Store

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "responses": ["One.", "Two.", "Three."],
        "origins": ["round-1"] * 3,
        "category": "advice",
    }
    for number in range(3)
]


@pytest.fixture
def keys(store: Store, items: None) -> list[str]:
    """Three items of a round beside those of others."""
    found = rounds.items_from(ROWS, "rank")
    with store.session() as session:
        exchange.add_items(session, found, overlap=2)
    return [item.key() for item in found]


def counted(store: Store, keys: list[str]) -> rounds.Count:
    with store.session() as session:
        return rounds.count(session, keys, overlap=2)


def test_only_the_rounds_own_judgements_count(store: Store, keys: list[str], browser: Callable[..., Person]) -> None:
    assert counted(store, keys) == rounds.Count(0, 6, left=6)
    kim = browser("kim")
    for number in range(9):  # six items of others, three of the round
        assert kim.judge(client_id=f"kim-{number:08}").status_code == 200
    assert kim.item() == ""
    assert counted(store, keys) == rounds.Count(3, 6, left=0)  # two people an item are wanted, and there is one
    kim.submit(f"/judgements/{kim.last()}/undo")
    assert counted(store, keys).done + counted_of_others(store, keys) == 8


def test_what_was_judged_of_a_round_that_is_over_is_still_told(
    store: Store, keys: list[str], browser: Callable[..., Person]
) -> None:
    kim = browser("kim")
    for number in range(9):
        kim.judge(client_id=f"kim-{number:08}")
    assert "yours 9 · all 9 of 18 · left for you today 0" in kim.get("/").text
    with store.session() as session:
        rounds.close(session, dict.fromkeys(keys, 0))
    assert "yours 9 · all 9 of 15 · left for you today 0" in kim.get("/").text


def counted_of_others(store: Store, keys: list[str]) -> int:
    with store.session() as session:
        return len(list(exchange.export_rankings(session))) - len(rounds.rankings(session, keys))


def test_what_nobody_can_judge_any_more_is_not_left(
    store: Store, keys: list[str], browser: Callable[..., Person]
) -> None:
    assert counted(store, keys).left == 6  # nobody is known yet
    browser()  # the person of this machine, without an account
    assert counted(store, keys).left == 3
    kim = browser("kim")
    browser("sam")
    assert counted(store, keys).left == 6  # with accounts that person is none of those who may judge
    for number in range(9):
        kim.judge(client_id=f"kim-{number:08}", verdict="skipped", ranks=None)
    assert counted(store, keys) == rounds.Count(0, 6, left=3)
    kim.submit(f"/judgements/{kim.last()}/undo")
    withdrawn_of_others = kim.responses()[0] not in ("One.", "Two.", "Three.")
    assert counted(store, keys).left == (3 if withdrawn_of_others else 4)


def test_what_people_said_comes_as_rankings_with_annotator_and_guideline(
    store: Store, keys: list[str], browser: Callable[..., Person]
) -> None:
    kim = browser("kim")
    for number in range(9):
        kim.judge(client_id=f"kim-{number:08}")
    with store.session() as session:
        found = rounds.rankings(session, keys)
    assert sorted(row["prompt"] for row in found) == [f"Question {number}?" for number in range(3)]
    for row in found:
        assert (row["source"], row["annotator"], row["origins"]) == ("human", "kim", ["round-1"] * 3)
        assert len(row["guideline"]) == 12
        assert sorted(row["ranks"]) == [1, 2, 3]


def test_a_closed_round_is_shown_to_nobody_and_keeps_its_judgements(
    store: Store, keys: list[str], browser: Callable[..., Person]
) -> None:
    kim = browser("kim")
    for number in range(9):
        kim.judge(client_id=f"kim-{number:08}")
    with store.session() as session:
        rounds.close(session, dict.fromkeys(keys, 0))
    with store.session() as session:
        mine = session.scalars(select(Judgement.id).join(Item).where(Item.key.in_(keys))).all()
    assert int(kim.last()) not in mine  # what a round has taken along is not taken back
    refused = [kim.submit(f"/judgements/{one}/undo") for one in mine]  # from a page that was open meanwhile
    assert [answer.status_code for answer in refused] == [409] * 3
    assert "of a round that is over" in refused[0].json()["detail"]
    sam = browser("sam")
    for number in range(6):  # those of others only
        assert sam.judge(client_id=f"sam-{number:08}").status_code == 200
    assert sam.item() == ""
    assert counted(store, keys).done == 3
    with store.session() as session:
        rounds.open_again(session, keys, overlap=2)
    assert sam.item() != ""


def test_comparisons_tell_ties_and_both_bad_as_equal(store: Store, browser: Callable[..., Person]) -> None:
    rows = [{**row, "responses": ["New.", "Old."], "origins": ["round-1", "current"]} for row in ROWS]
    found = rounds.items_from(rows, "compare")
    with store.session() as session:
        exchange.add_items(session, found, overlap=1)
    kim = browser("kim")
    kim.judge("compare", client_id="kim-00000001")
    kim.judge("compare", client_id="kim-00000002", verdict="none", ranks=None)
    kim.judge("compare", client_id="kim-00000003", verdict="skipped", ranks=None)
    with store.session() as session:
        said = list(rounds.comparisons(session, [item.key() for item in found]))
    assert sorted(sorted(row["ranks"]) for row in said) == [[1, 1], [1, 2]]
    assert {row["annotator"] for row in said} == {"kim"}
    assert all(row["responses"] == ["New.", "Old."] for row in said)


def test_results_tell_what_was_said_in_a_round_that_is_closed(store: Store, browser: Callable[..., Person]) -> None:
    rows = [{**row, "responses": ["New.", "Old."], "origins": ["new", "old"]} for row in ROWS]
    found = rounds.items_from(rows, "compare")
    with store.session() as session:
        exchange.add_items(session, found, overlap=2)
    kim, sam = browser("kim", admin=True), browser("sam")
    for person, name, number in ((kim, "kim", 3), (sam, "sam", 1)):  # of two prompts one judgement is missing
        for place in range(number):
            first = person.responses("compare")[0]
            ranks = [1, 2] if first == "New." else [2, 1]
            assert person.judge("compare", client_id=f"{name}-{place:08}", ranks=ranks).status_code == 200
    with store.session() as session:
        assert find(session).comparisons[0].so_far.prompts == 1
        rounds.close(session, {item.key(): 0 for item in found})
    with store.session() as session:
        [pair] = find(session).comparisons
    assert (pair.first, pair.rates[0].rate, pair.rates[0].wins, pair.rates[0].prompts) == ("new", 1.0, 4, 3)
    assert pair.so_far == (3, *judged_so_far([1.0] * 3).win_rate[1:], False)
    for path in ("/results", "/results/live"):
        page = kim.get(path)
        assert page.status_code == 200
        assert "new against old" in page.text
    assert "Nothing is left for you" in kim.get("/compare").text


def test_a_larger_overlap_asks_more_people_about_known_items(store: Store, keys: list[str]) -> None:
    for overlap, expected in ((3, 3), (1, 3)):
        with store.session() as session:
            exchange.add_items(session, rounds.items_from(ROWS, "rank"), overlap=overlap)
            rounds.open_again(session, keys, overlap=overlap)
        with store.session() as session:
            assert set(session.scalars(select(Item.overlap).where(Item.key.in_(keys)))) == {expected}


def test_an_answer_with_a_character_that_no_database_takes_is_counted(
    store: Store, browser: Callable[..., Person]
) -> None:
    found = rounds.items_from([{**ROWS[0], "responses": ["On\0e.", "Two.", "Three."]}], "rank")
    with store.session() as session:
        exchange.add_items(session, found, overlap=2)
    assert browser("kim").judge(client_id="kim-00000001").status_code == 200
    assert counted(store, [item.key() for item in found]) == rounds.Count(1, 2, left=0)
