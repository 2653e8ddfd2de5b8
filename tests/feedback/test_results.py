"""Win rates, intervals, and how people judged."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from people import Person
from scipy.stats import binomtest
from sqlalchemy import select
from sqlalchemy.orm import Session

from rlhf_core.agreement import judged_so_far, wilson
from rlhf_core.feedback import exchange
from rlhf_core.feedback.results import Results, find
from rlhf_core.feedback.store import Guideline, Item, Judgement, Store
from rlhf_core.statistics import length_controlled_win_rate

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
        [pair] = find(session).comparisons
        everyone, by_kim, by_sam = pair.rates
        assert (pair.first, pair.second) == ("ppo", "sft")
        assert (by_kim.wins, by_kim.ties, by_kim.both_bad, by_kim.losses) == (3, 1, 1, 1)
        assert by_kim.rate == pytest.approx(4 / 6)
        assert (by_sam.wins, by_sam.losses, by_sam.rate) == (0, 2, 0.0)
        assert (everyone.prompts, by_sam.prompts) == (6, 2)
        assert everyone.low < everyone.rate < everyone.high
        habit = {row.who: row for row in find(session).habits["compare"]}
        assert (habit["kim"].judged, habit["kim"].none, habit["sam"].skipped) == (6, 1, 1)
        assert habit["all"].seconds == 2.5
    page = kim.get("/results").text
    assert "ppo against sft" in page
    assert "67\u202f%" in page


def test_answers_of_one_name_are_no_comparison_of_sources(browser: Browser, store: Store) -> None:
    row = {"prompt": "Q?", "responses": ["One.", "Two."]}
    rows = [(1, row), (2, {**row, "prompt": "R?", "origins": ["sft", "sft"]})]
    with store.session() as session:
        exchange.add_items(session, exchange.find_items("two", rows, kind="compare", policies=("ppo", "sft"), how=""))
    kim = browser("kim", admin=True)
    for number in range(2):
        assert kim.judge("compare", client_id=f"client-{number}").status_code == 200
    with store.session() as session:
        assert find(session).comparisons == []
        assert find(session).habits["compare"][0].judged == 2
    assert kim.get("/results").status_code == 200


def test_the_rate_at_equal_length_takes_away_what_length_explains(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for number, item in enumerate(session.scalars(select(Item).where(Item.kind == "compare"))):
            longer = "ppo" if number < 4 else "sft"
            item.responses = [text + " and more" * (source == longer) for source, text in
                              zip(item.sources, item.responses, strict=True)]  # fmt: skip
    kim = browser("kim", admin=True)
    for number in range(6):  # four times ppo, and most of the time the longer one
        choose(kim, store, "ppo" if number in (0, 1, 2, 4) else "sft", f"client-{number}")
    with store.session() as session:
        [pair] = find(session).comparisons
        judged = session.scalars(select(Judgement)).all()
        wins, longer = [], []
        for one in judged:
            ppo, sft = (one.item.sources.index(name) for name in ("ppo", "sft"))
            wins.append(float(one.ranks[ppo] < one.ranks[sft]))
            longer.append(float(len(one.item.responses[ppo]) - len(one.item.responses[sft])))
    expected = length_controlled_win_rate(wins, longer, list(range(6)), samples=0).mean
    everyone = pair.rates[0]
    assert everyone.equal == pytest.approx(expected, rel=1e-9)
    assert everyone.equal != pytest.approx(everyone.rate, abs=0.01)
    assert "between answers of equal length it would be" in kim.get("/results").text


def test_the_left_sides_share_is_of_what_was_decided(browser: Browser, store: Store, items: None) -> None:
    kim = browser("kim")
    for number, ranks in enumerate([[1, 2], [1, 2], [1, 2], [2, 1], [1, 1]]):
        kim.judge("compare", client_id=f"client-{number}", ranks=ranks)
    with store.session() as session:
        assert find(session).habits["compare"][0].left == wilson(3, 4)


def test_several_judgements_of_one_prompt_are_one_case(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item).where(Item.kind == "compare")):
            item.prompt = [["user", "The same?"]]
    kim = browser("kim")
    for number in range(6):
        choose(kim, store, "ppo", f"client-{number}")
    with store.session() as session:
        [pair] = find(session).comparisons
    assert (pair.rates[0].prompts, pair.rates[0].wins, pair.rates[0].rate) == (1, 6, 1.0)
    assert pair.rates[0].low < 0.25


def test_win_rates_by_kind_of_prompt(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for number, item in enumerate(session.scalars(select(Item).where(Item.kind == "compare"))):
            item.category = ["explain", "refuse"][number % 2]
    kim = browser("kim", admin=True)
    for number in range(6):
        category = "refuse" if "refuse</p>" in kim.get("/compare").text else "explain"
        choose(kim, store, "ppo" if category == "explain" else "sft", f"client-{number}")
    with store.session() as session:
        [pair] = find(session).comparisons
    assert [(rate.who, rate.rate, rate.prompts) for rate in pair.by_kind] == [("explain", 1, 3), ("refuse", 0, 3)]
    assert "Kind of prompt" in kim.get("/results").text


def test_the_test_of_when_to_stop_counts_a_prompt_once_it_has_all_its_judgements(
    browser: Browser, store: Store, items: None
) -> None:
    people = [browser("kim", admin=True), browser("sam")]  # two a prompt are wanted
    for number in range(6):
        choose(people[0], store, "ppo", f"client-k{number}")
    with store.session() as session:
        assert find(session).comparisons[0].so_far == (0, 0.0, 1.0, False)
    assert "has not begun" in people[0].get("/results").text
    for number in range(6):
        choose(people[1], store, "ppo", f"client-s{number}")
    with store.session() as session:
        [pair] = find(session).comparisons
        verdict = judged_so_far([1.0] * 6)
    assert pair.so_far == (6, verdict.win_rate.low, verdict.win_rate.high, verdict.enough)
    assert "Go on judging" in people[0].get("/results").text


def judge_all(person: Person, kind: str, best: str, name: str) -> None:
    """Put the response that begins so first, and the others equal behind it."""
    for number in range(6):
        shown = person.responses(kind)
        ranks = [1 if text.startswith(best) else 2 for text in shown]
        assert person.judge(kind, client_id=f"client-{name}-{number}", ranks=ranks).status_code == 200


def test_agreement_of_each_two_people(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item)):
            item.overlap = 3
    for name, best in (("kim", "ppo"), ("sam", "ppo"), ("lee", "sft")):
        judge_all(browser(name), "compare", best, name)
    with store.session() as session:
        found = find(session).agreement["compare"]
    assert [(pair.first, pair.second, pair.judged, pair.share) for pair in found.pairs] == [
        ("kim", "lee", 6, 0), ("sam", "lee", 6, 0), ("kim", "sam", 6, 1),
    ]  # fmt: skip
    # Each of six items got 1, 1, -1. Two of six ordered pairs agree: D_o = 2/3. 12 and 6 of 18: D_e = 2·12·6/(18·17).
    assert found.alpha.mean == pytest.approx(1 - (2 / 3) / (144 / 306))


def test_agreement_of_rankings_goes_by_ranks_and_by_pairs(browser: Browser, store: Store, items: None) -> None:
    for name in ("kim", "sam"):
        judge_all(browser(name), "rank", "Red", name)
    with store.session() as session:
        found = find(session).agreement["rank"]
        assert find(session).agreement["compare"] == (None, [], [])
    assert found.alpha.mean == 1
    assert [(pair.judged, pair.share) for pair in found.pairs] == [(18, 1)]


@pytest.mark.parametrize(("number", "interval"), [(49, False), (50, True)])
def test_alpha_has_an_interval_once_fifty_items_were_judged_by_two(
    browser: Browser, store: Store, number: int, interval: bool
) -> None:
    people = [browser("kim", admin=True), browser("sam")]
    rows = [(n, {"prompt": f"Q{n}?", "responses": ["a", "b"]}) for n in range(number + 1)]
    with store.session() as session:
        exchange.add_items(
            session, exchange.find_items("rows", rows, kind="rank", policies=("", ""), how=""), overlap=2
        )
        [guideline] = session.scalars(select(Guideline.version))
        for item in session.scalars(select(Item)):
            for who in (1, 2) if item.id <= number else (1,):  # the last one by one of them
                better = item.id % (who + 1) > 0
                session.add(
                    Judgement(
                        client_id=f"client-{item.id}-{who}", annotator_id=who, item_id=item.id, verdict="ranked",
                        ranks=[1, 2] if better else [2, 1], presented=[0, 1], seconds=1, guideline=guideline,
                    )
                )  # fmt: skip
        session.flush()
        alpha = find(session).agreement["rank"].alpha
    assert -1 < alpha.mean < 1
    assert (alpha.low < alpha.mean < alpha.high) == interval
    page = people[0].get("/results").text
    assert "Krippendorff’s α is" in page
    assert ("95 % interval" in page.partition("Krippendorff’s α is")[2].partition("</p>")[0]) == interval


def test_every_pair_of_people_is_on_the_page_those_beyond_the_first_thirty_folded(
    browser: Browser, store: Store, items: None
) -> None:
    with store.session() as session:
        for item in session.scalars(select(Item)):
            item.overlap = 9
    people = [browser(f"p{number}", admin=not number) for number in range(9)]
    for number, person in enumerate(people):  # p8 is alone in what they say
        judge_all(person, "compare", "sft" if number == 8 else "ppo", str(number))
    with store.session() as session:
        found = find(session).agreement["compare"]
    assert [(pair.second, pair.share) for pair in found.pairs[:8]] == [("p8", 0)] * 8
    assert (len(found.pairs), len(found.folded)) == (30, 6)  # of 9 · 8 / 2
    shown, folded = people[0].get("/results").text.split("<summary>6 more, who agree more</summary>")
    named = [re.findall(r'<th scope="row" dir="auto">(p\d, p\d)</th>', part) for part in (shown, folded)]
    assert [len(part) for part in named] == [30, 6]
    assert len({*named[0], *named[1]}) == 36


def test_who_goes_by_side_or_by_length_is_seen(browser: Browser, store: Store, items: None) -> None:
    sam = browser("sam")
    for number in range(6):
        sam.judge(client_id=f"client-s{number}", ranks=[1, 2, 3])
    with store.session() as session:
        of = {habit.who: habit for habit in find(session).habits["rank"]}
    assert of["sam"].left == wilson(6, 6)  # always the first on the page


def test_how_often_the_longest_of_a_ranking_comes_before_the_shortest(
    browser: Browser, store: Store, items: None
) -> None:
    kim = browser("kim")
    for number, (cherry, red) in enumerate([(1, 2), (1, 3), (3, 2), (1, 3), (2, 2), (2, 3)]):
        places = {"A cherry.": cherry, "Red.": red, "A banana.": 1}  # the two fruits are as long: the first one counts
        assert kim.judge(client_id=f"client-{number}", ranks=[places[text] for text in kim.responses()]).is_success
    with store.session() as session:
        [everyone, _] = find(session).habits["rank"]
    assert everyone.longer == wilson(4, 5)


def test_how_often_the_longer_of_two_wins_and_how_long_it_takes(browser: Browser, store: Store, items: None) -> None:
    with store.session() as session:
        for number, item in enumerate(session.scalars(select(Item).where(Item.kind == "compare"))):
            item.responses = ["Same.", "Equal"] if number == 5 else ["Short.", "A longer one."][:: (-1) ** number]
    kim = browser("kim")
    takes_longer = iter([True, True, False, None, True])
    for number, seconds in enumerate([1, 8, 2, 30, 4, 3]):
        first, second = map(len, kim.responses("compare"))
        longer = next(takes_longer) if first != second else True
        ranks = [1, 1] if longer is None else [1, 2] if (first > second) == longer else [2, 1]
        assert kim.judge("compare", client_id=f"client-{number}", ranks=ranks, seconds=seconds).is_success
    sam = browser("sam")
    sam.judge("compare", client_id="client-s", verdict="skipped", ranks=None, seconds=500)
    with store.session() as session:
        of = {habit.who: habit for habit in find(session).habits["compare"]}
    assert of["kim"].longer == wilson(3, 4)  # neither the tie nor two of one length
    assert of["kim"].seconds == 3.5  # between 3 and 4
    assert (of["all"].seconds, of["sam"].seconds) == (3.5, None)  # what was skipped took no judging


def test_the_live_part_changes_when_somebody_judges_or_takes_back(browser: Browser, items: None) -> None:
    kim = browser("kim", admin=True)
    before = kim.get("/results/live").text
    assert "Nobody has judged" in before
    kim.judge("compare", client_id="client-1")
    after = kim.get("/results/live").text
    assert "ppo against sft" in after
    assert kim.get("/results/live").text == after
    kim.submit(f"/judgements/{kim.last('compare')}/undo")
    assert kim.get("/results/live").text == before
    assert browser("sam").get("/results/live").status_code == 403


def test_a_look_while_another_counts_shows_what_was_known(
    browser: Browser, items: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kim = browser("kim", admin=True)
    before = kim.get("/results/live").text
    kim.judge(client_id="client-1")
    counting, go_on = Event(), Event()

    def slowly(session: Session) -> Results:
        counting.set()
        go_on.wait(30)
        return find(session)

    monkeypatch.setattr("rlhf_core.feedback.results.find", slowly)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(kim.get, "/results/live")
        try:
            assert counting.wait(30)
            assert kim.get("/results/live").text == before
        finally:
            go_on.set()
        assert other.result().text != before
