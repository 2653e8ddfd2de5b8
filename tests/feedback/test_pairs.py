"""Ranking by pairs in both orders: what a tie is, how points become ranks, and what is counted."""

from collections.abc import Sequence

import pytest

from rlhf_core.feedback.annotators import Item, Judgement
from rlhf_core.feedback.pairs import Look, Opinion, PairwiseJudge, Verdict

PROMPT = (("user", "How do I boil an egg?"),)


class Scripted:
    """Prefers by a table from (first, second) to an opinion; every look is written down."""

    name = "scripted"

    def __init__(self, table: dict[tuple[str, str], Opinion | None]) -> None:
        self.table = table
        self.looks: list[Look] = []

    def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
        self.looks += looks
        return [self.table[look.first, look.second] for look in looks]

    def costs(self) -> dict[str, float]:
        return {"requests": len(self.looks)}


def consistent(**strength: float) -> dict[tuple[str, str], Opinion | None]:
    """A judge that prefers the stronger in every order, with certainty 0.8."""
    return {
        (a, b): Opinion(0.5 + 0.4 * ((x > y) - (x < y)))
        for a, x in strength.items()
        for b, y in strength.items()
        if a != b
    }


@pytest.mark.parametrize(
    ("forward", "backward", "outcome", "disagrees", "probability"),
    [
        (Opinion(0.9), Opinion(0.3), 1.0, False, 0.8),  # both for i: (0.9 + 1 − 0.3) / 2
        (Opinion(0.2), Opinion(0.8), 0.0, False, 0.2),
        (Opinion(0.9), Opinion(0.6), 0.5, True, 0.65),  # whoever stands first
        (Opinion(0.5), Opinion(0.5), 0.5, False, 0.5),  # an agreed tie
        (Opinion(0.5), Opinion(0.2), 0.5, True, 0.65),  # a tie against a choice
        (None, Opinion(0.2), 0.5, False, 0.5),  # one order alone says nothing
        (Opinion(0.9), None, 0.5, False, 0.5),
        (None, None, 0.5, False, 0.5),
    ],
)
def test_a_verdict_needs_both_orders_to_agree(
    forward: Opinion | None, backward: Opinion | None, outcome: float, disagrees: bool, probability: float
) -> None:
    verdict = Verdict(0, 1, forward, backward)
    assert verdict.outcome == outcome
    assert verdict.disagrees == disagrees
    assert verdict.probability == pytest.approx(probability)


def test_a_consistent_judge_ranks_as_it_prefers() -> None:
    table = consistent(a=2, b=4, c=1, d=2)
    [judgement] = PairwiseJudge(Scripted(table)).judge([Item(PROMPT, ("a", "b", "c", "d"))])
    # a and d tie: points 1.5, 3, 0, 1.5. Of six pairs five are decided, with |2p − 1| = 0.8.
    assert judgement == Judgement((2, 1, 4, 2), None, "", pytest.approx(5 * 0.8 / 6))


def test_every_pair_is_looked_at_in_both_orders() -> None:
    comparer = Scripted(consistent(a=1, b=2, c=3, d=4))
    judge = PairwiseJudge(comparer)
    judge.judge([Item(PROMPT, ("a", "b", "c", "d"))])
    assert len(comparer.looks) == len(set(comparer.looks)) == 4 * 3
    assert judge.counts() == {"pairs": 6, "disagreements": 0, "unanswered": 0, "requests": 12}


def test_a_judge_that_takes_what_stands_first_says_nothing_and_is_counted() -> None:
    judge = PairwiseJudge(Scripted(dict.fromkeys(consistent(a=1, b=2, c=3), Opinion(0.99))))
    [judgement] = judge.judge([Item(PROMPT, ("a", "b", "c"))])
    assert judgement.ranks == (1, 1, 1)
    assert judgement.confidence == 0
    assert judge.counts()["disagreements"] == 3


def test_a_pair_whose_orders_disagree_adds_no_confidence() -> None:
    table: dict[tuple[str, str], Opinion | None] = {("a", "b"): Opinion(0.9), ("b", "a"): Opinion(0.6)}  # p = 0.65
    assert PairwiseJudge(Scripted(table)).judge([Item(PROMPT, ("a", "b"))]) == [Judgement((1, 1), confidence=0.0)]


def test_a_circle_of_preferences_is_a_tie() -> None:
    table = {("a", "b"): Opinion(1.0), ("b", "c"): Opinion(1.0), ("c", "a"): Opinion(1.0)}
    table |= {(b, a): Opinion(0.0) for a, b in table}
    [judgement] = PairwiseJudge(Scripted(dict(table))).judge([Item(PROMPT, ("a", "b", "c"))])
    assert judgement.ranks == (1, 1, 1)
    assert judgement.confidence == 1.0


def test_a_missing_answer_is_a_tie_and_is_counted() -> None:
    table = consistent(a=1, b=2) | {("a", "b"): None}
    judge = PairwiseJudge(Scripted(table))
    assert judge.judge([Item(PROMPT, ("a", "b"))])[0].ranks == (1, 1)
    assert judge.counts()["unanswered"] == 1


def test_equal_responses_tie_without_a_look_and_an_item_that_comes_twice_is_looked_at_once() -> None:
    comparer = Scripted(consistent(a=1, b=2))
    judge = PairwiseJudge(comparer)
    found = judge.judge([Item(PROMPT, ("a", "a", "b")), Item(PROMPT, ("b", "a"))])
    assert [judgement.ranks for judgement in found] == [(2, 2, 1), (1, 2)]
    assert len(comparer.looks) == 2
    assert judge.judge([]) == []


def test_scores_are_the_mean_over_looks_and_reasons_say_of_whom() -> None:
    table: dict[tuple[str, str], Opinion | None] = {
        ("a", "b"): Opinion(0.9, {"help": (5, 2)}, "a is polite"),
        ("b", "a"): Opinion(0.1, {"help": (1, 4)}),
    }
    [judgement] = PairwiseJudge(Scripted(table)).judge([Item(PROMPT, ("a", "b"))])
    assert judgement.scores == {"help": [4.5, 1.5]}
    assert judgement.reason == "1 beside 2: a is polite"


def test_an_axis_without_a_score_for_each_response_is_left_out() -> None:
    table = consistent(a=1, b=2, c=3)
    table |= {("a", "b"): Opinion(0.1, {"help": (1, 2)})}
    assert PairwiseJudge(Scripted(table)).judge([Item(PROMPT, ("a", "b", "c"))])[0].scores is None
