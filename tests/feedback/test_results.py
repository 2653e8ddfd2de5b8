"""Win rates, intervals, and how people judged."""

from collections.abc import Callable

import pytest
from people import Person
from scipy.stats import binomtest
from sqlalchemy import select

from rlhf_core.agreement import wilson
from rlhf_core.feedback.results import comparisons, habits
from rlhf_core.feedback.store import Item, Store

Browser = Callable[..., Person]


@pytest.mark.parametrize(("wins", "count"), [(0, 3), (3, 3), (7, 12), (106, 212)])
def test_the_interval_is_wilsons(wins: int, count: int) -> None:
    reference = binomtest(wins, count).proportion_ci(0.95, method="wilson")
    assert wilson(wins, count)[1:] == pytest.approx((reference.low, reference.high), abs=1e-7)  # z's digits


def choose(person: Person, store: Store, winner: str, client_id: str) -> None:
    """Judge the item on the page so that a policy wins."""
    shown = person.responses("compare")
    ranks = [1, 2] if shown[0].startswith(winner) else [2, 1]
    assert person.judge("compare", client_id=client_id, ranks=ranks).status_code == 200


def test_win_rates_by_all_and_by_annotator(browser: Browser, store: Store, items: None) -> None:
    kim, sam = browser("kim", admin=True), browser("sam")
    for number in range(3):
        choose(kim, store, "ppo", f"client-k{number}")
    choose(kim, store, "sft", "client-k3")
    kim.judge("compare", client_id="client-k4", ranks=[1, 1])
    kim.judge("compare", client_id="client-k5", verdict="none", ranks=None)
    sam.judge("compare", client_id="client-s0", verdict="skipped", ranks=None)
    for number in range(1, 3):
        choose(sam, store, "sft", f"client-s{number}")
    with store.session() as session:
        [pair] = comparisons(session)
        everyone, by_kim, by_sam = pair.rates
        assert (pair.first, pair.second) == ("ppo", "sft")
        assert (by_kim.wins, by_kim.ties, by_kim.both_bad, by_kim.losses) == (3, 1, 1, 1)
        assert by_kim.rate == pytest.approx(4 / 6)
        assert (by_sam.wins, by_sam.losses, by_sam.rate) == (0, 2, 0.0)
        assert (everyone.prompts, by_sam.prompts) == (6, 2)
        assert everyone.low < everyone.rate < everyone.high
        habit = {row.who: row for row in habits(session, "compare")}
        assert (habit["kim"].judged, habit["kim"].none, habit["sam"].skipped) == (6, 1, 1)
        assert habit["all"].seconds == 2.5
    page = kim.get("/results").text
    assert "ppo against sft" in page
    assert "67\u202f%" in page


def test_the_left_sides_share_is_of_what_was_decided(browser: Browser, store: Store, items: None) -> None:
    kim = browser("kim")
    for number, ranks in enumerate([[1, 2], [1, 2], [1, 2], [2, 1], [1, 1]]):
        kim.judge("compare", client_id=f"client-{number}", ranks=ranks)
    with store.session() as session:
        assert habits(session, "compare")[0].left == 0.75


def test_several_judgements_of_one_prompt_are_one_case(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item).where(Item.kind == "compare")):
            item.prompt = [["user", "The same?"]]
    kim = browser("kim")
    for number in range(6):
        choose(kim, store, "ppo", f"client-{number}")
    with store.session() as session:
        [pair] = comparisons(session)
    assert (pair.rates[0].prompts, pair.rates[0].wins, pair.rates[0].rate) == (1, 6, 1.0)
    assert pair.rates[0].low < 0.25
