"""Ranking and comparing: what is shown to whom, what is stored, and what undo does."""

import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from people import SECRET, Person
from sqlalchemy import select

from rlhf_core.feedback.app import create_app
from rlhf_core.feedback.judging import progress
from rlhf_core.feedback.store import Item, Judgement, Store, open_store

Browser = Callable[..., Person]
pytestmark = pytest.mark.usefixtures("items")


def stored(store: Store) -> list[Judgement]:
    with store.session() as session:
        session.expire_on_commit = False
        return list(session.scalars(select(Judgement).order_by(Judgement.id)))


def test_a_judgement_is_stored_in_the_items_order(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    shown = kim.responses()
    assert sorted(shown) == ["A banana.", "A cherry.", "Red."]
    assert kim.judge(client_id="client-1", comment=" fine ").json() == {"stored": True, "new": True}
    [judgement] = stored(store)
    with store.session() as session:
        item = session.get(Item, judgement.item_id)
        assert [text for _, text in sorted(zip(judgement.ranks, item.responses, strict=True))] == shown
        assert [item.responses[index] for index in judgement.presented] == shown
    assert (judgement.comment, judgement.seconds, judgement.verdict) == ("fine", 2.5, "ranked")
    assert len(judgement.guideline) == 12


def test_the_next_item_comes_after_it_and_progress_counts(browser: Browser) -> None:
    kim = browser("kim")
    first = kim.item()
    assert kim.item() == first  # loading the page again shows the same
    kim.judge(client_id="client-1")
    assert kim.item() not in ("", first)
    assert "yours 1 · all 1 of 12" in kim.get("/rank").text


def test_every_item_comes_once_and_then_none(browser: Browser) -> None:
    kim = browser("kim")
    seen = []
    for number in range(6):
        seen.append(kim.item("compare"))
        assert kim.judge("compare", client_id=f"client-{number}").status_code == 200
    assert len(set(seen)) == 6
    assert kim.item("compare") == ""
    assert "Nothing is left for you" in kim.get("/compare").text


def test_a_repeat_of_the_same_submit_is_stored_once(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    item = kim.item()
    assert kim.judge(client_id="client-1").json()["new"] is True
    assert kim.judge(client_id="client-1", item=item).json() == {"stored": True, "new": False}
    assert len(stored(store)) == 1
    assert kim.judge(client_id="client-2", item=item).status_code == 409  # another judgement of the same item


def test_the_same_submit_many_times_at_once_is_stored_once(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    body = {"client_id": "client-1", "item": kim.item(), "verdict": "ranked", "ranks": [1, 2, 3], "seconds": 1}
    headers = {"X-CSRF-Token": kim.token()}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: kim.post("/judgements", json=body, headers=headers), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert sum(answer.json()["new"] for answer in answers) == 1
    assert len(stored(store)) == 1


def test_the_same_page_many_times_at_once_is_shown_each_time(browser: Browser) -> None:
    kim = browser("kim")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: kim.item(), range(16)))) == 1


def test_order_is_random_over_people_and_items_and_stays_for_each(browser: Browser, store: Store) -> None:
    kim, sam = browser("kim"), browser("sam")
    orders = {}
    for name, person in (("kim", kim), ("sam", sam)):
        for number in range(6):
            assert person.responses() == person.responses()
            person.judge(client_id=f"{name}-client-{number}")
    for judgement in stored(store):
        orders[judgement.annotator_id, judgement.item_id] = tuple(judgement.presented)
    assert len(orders) == 12
    assert len(set(orders.values())) >= 3
    assert any(orders[1, item] != orders[2, item] for item in range(1, 7))


def test_sides_come_about_as_often_left_as_right(browser: Browser, store: Store) -> None:
    from rlhf_core.feedback.judging import presented_order

    lefts = Counter(presented_order(1, Item(key=str(n), responses=["a", "b"]))[0] for n in range(1000))
    assert 430 < lefts[0] < 570


def test_who_wrote_what_is_on_no_annotators_page(browser: Browser, store: Store) -> None:
    with store.session() as session:
        item = session.scalar(select(Item).where(Item.kind == "compare"))
        item.sources = ["secret-source", "other-source"]
    kim = browser("kim")
    for _ in range(6):
        assert "-source" not in kim.get("/compare").text
        kim.judge("compare", client_id=f"client-{kim.item('compare')}")
    assert kim.get("/results").status_code == 403
    assert kim.get("/admin").status_code == 403


def test_an_item_goes_to_as_many_people_as_it_wants(browser: Browser, store: Store) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item)):
            item.overlap = 1
    kim, sam = browser("kim"), browser("sam")
    ours = [kim.item()]
    theirs = []
    for number in range(6):
        if item := sam.item():
            theirs.append(item)
            sam.judge(client_id=f"client-s{number}")
    assert len(theirs) == 5  # the sixth is kept for kim
    assert not set(ours) & set(theirs)
    assert kim.judge(client_id="client-k").status_code == 200
    with store.session() as session:
        assert progress(session, None, "rank")[1:3] == (6, 6)


def test_undo_brings_the_item_back_and_keeps_what_was_said(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    item = kim.item()
    kim.judge(client_id="client-1", ranks=[2, 1, 2], comment="first thought")
    last = kim.last()
    assert kim.submit(f"/judgements/{last}/undo").status_code == 200
    assert kim.item() == item
    page = kim.get("/rank").text
    assert 'data-ranks="2 1 2"' in page
    assert "first thought" in page
    assert kim.submit(f"/judgements/{last}/undo").status_code == 200  # a repeat changes nothing
    kim.judge(client_id="client-2", ranks=[1, 1, 2])
    first, second = stored(store)
    assert first.item_id == second.item_id
    assert first.withdrawn_at is not None
    assert second.withdrawn_at is None


def test_skipped_and_none_acceptable_have_no_ranks(browser: Browser, store: Store) -> None:
    kim = browser("kim")
    assert kim.judge(client_id="client-1", verdict="skipped", ranks=None).status_code == 200
    assert kim.judge(client_id="client-2", verdict="none", ranks=None).status_code == 200
    assert kim.judge(client_id="client-3", verdict="none").status_code == 422
    assert [(one.verdict, one.ranks) for one in stored(store)] == [("skipped", None), ("none", None)]
    assert "yours 1 · all 1 of 12" in kim.get("/rank").text  # what was skipped is still wanted


@pytest.mark.parametrize("ranks", [None, [], [1, 2], [1, 2, 4], [0, 1, 2], ["a", 1, 2], [1, 2, 3, 4]])
def test_ranks_that_are_not_whole_are_refused(browser: Browser, store: Store, ranks: object) -> None:
    assert browser("kim").judge(client_id="client-1", ranks=ranks).status_code == 422
    assert stored(store) == []


def test_what_belongs_to_another_is_refused(browser: Browser, store: Store) -> None:
    kim, sam = browser("kim"), browser("sam")
    kim.judge(client_id="client-1")
    assert sam.submit(f"/judgements/{kim.last()}/undo").status_code == 404
    assert stored(store)[0].withdrawn_at is None
    with store.session() as session:
        never_shown = session.scalars(select(Item.ticket).where(Item.kind == "compare")).first()
    assert sam.judge(client_id="client-2", item=never_shown).status_code == 404
    assert sam.judge(client_id="client-1").status_code == 409  # kim's own id
    assert len(stored(store)) == 1


def test_a_restart_keeps_all(browser: Browser, store: Store, database: Path) -> None:
    kim = browser("kim")
    kim.judge(client_id="client-1")
    cookies, second = kim.cookies, kim.item()
    # Nothing is closed: as after a kill, another process opens what lies on the disk.
    again = open_store(database)
    client = Person(create_app(again, secret=SECRET), base_url="http://127.0.0.1", cookies=cookies)
    assert client.item() == second
    assert re.search("yours 1 · all 1 of 12", client.get("/rank").text)
    assert len(stored(again)) == 1
    again.close()
