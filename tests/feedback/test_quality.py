"""Judges of known quality, measured: what the numbers say of each, and who is turned away."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pairs import Scripted

from rlhf_core.errors import DataError, JudgeRefused
from rlhf_core.feedback.annotators import rule
from rlhf_core.feedback.judges import admit, open_judge
from rlhf_core.feedback.pairs import Look, Opinion, PairwiseJudge
from rlhf_core.feedback.quality import check_judge, known_pairs
from rlhf_core.records import Ranking


def ranking(number: int, *responses: str, ranks: tuple[int, ...] = ()) -> Ranking:
    return Ranking((("user", f"prompt {number}"),), responses, ranks or tuple(range(1, len(responses) + 1)))


# The best is longest in three of four; its words are lower-case, so that a judge can be told how to find it.
RANKINGS = [
    ranking(number, "good and long answer" if number % 4 else "good", "bad answer", "very bad") for number in range(40)
]
STRENGTH = {"good and long answer": 3, "good": 3, "bad answer": 2, "very bad": 1}


class Reader:
    """Knows the better one, but is drawn to what stands first by `pull`, and to longer ones by `length`."""

    name = "reader"

    def __init__(self, *, pull: float = 0.0, length: float = 0.0, knows: float = 1.0) -> None:
        self.pull, self.length, self.knows = pull, length, knows
        self.turns: list[int] = []

    def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
        self.turns += [look.turn for look in looks]
        return [Opinion(1 / (1 + math.exp(-self._logit(look)))) for look in looks]

    def _logit(self, look: Look) -> float:
        longer = np.sign(len(look.first) - len(look.second))
        return self.knows * (STRENGTH[look.first] - STRENGTH[look.second]) + self.pull + self.length * float(longer)

    def costs(self) -> dict[str, float]:
        return {}


def test_known_pairs_take_one_of_each_prompt_first_and_either_may_stand_first() -> None:
    pairs = known_pairs(RANKINGS, pairs=40, seed=0)
    assert len({pair.item.prompt for pair in pairs}) == 40
    assert 10 < sum(pair.first_is_better for pair in pairs) < 30
    for pair in pairs:
        one, other = (STRENGTH[response] for response in pair.item.responses)
        assert pair.first_is_better == (one > other)
    assert pairs == known_pairs(RANKINGS, pairs=40, seed=0)
    assert pairs != known_pairs(RANKINGS, pairs=40, seed=1)
    assert len(known_pairs(RANKINGS, pairs=1000, seed=0)) == 40 * 3


def test_ties_are_no_known_pairs() -> None:
    tied = ranking(0, "a", "b", "c", ranks=(1, 1, 3))
    assert {frozenset(pair.item.responses) for pair in known_pairs([tied], pairs=9, seed=0)} == {
        frozenset("ac"), frozenset("bc"),
    }  # fmt: skip
    with pytest.raises(DataError, match="Found 1 rankings with nothing but ties"):
        check_judge(rule("short"), [ranking(0, "a", "b", ranks=(1, 1))], pairs=9)


def test_a_judge_that_knows_is_right_in_both_orders() -> None:
    found = check_judge(PairwiseJudge(Reader()), RANKINGS, pairs=120)
    assert (found.pairs, found.prompts) == (120, 40)
    assert found.agreement == (1, 1, 1)
    assert (found.decided, found.disagreements, found.unanswered, found.self_agreement) == (1, 0, 0, 1)
    assert found.first_chosen is not None
    assert found.first_chosen.mean == 0.5
    # By hand: the best is longest in 30 of 40 prompts, "bad answer" is longer than "very bad". So in 30 prompts all
    # three pairs go to the longer one, in 10 only one of three does.
    assert found.longer_better == pytest.approx((30 * 3 + 10) / 120)
    assert found.longer_chosen.mean == pytest.approx(100 / 120)
    assert found.longest.mean == pytest.approx(100 / 120)
    assert found.lead.mean == pytest.approx(20 / 120)
    assert found.coin.low < 0.5 < found.coin.high


def test_a_judge_that_takes_the_first_is_a_coin_that_never_decides() -> None:
    found = check_judge(PairwiseJudge(Reader(pull=5.0)), RANKINGS, pairs=120)
    assert found.agreement == (0.5, 0.5, 0.5)
    assert (found.decided, found.disagreements) == (0, 1)
    assert found.first_chosen == (1, 1, 1)
    assert found.averaged == (1, 1, 1)  # what it knows is still there below its pull
    assert math.isnan(found.agreement_decided.mean)
    assert math.isnan(found.longer_chosen.mean)


def test_some_pull_shows_as_disagreement_on_the_closer_pairs() -> None:
    # Differences are 1, 1 and 2; a pull of 1.5 beats the first two.
    found = check_judge(PairwiseJudge(Reader(pull=1.5)), RANKINGS, pairs=120)
    assert found.disagreements == pytest.approx(2 / 3)
    assert found.agreement.mean == pytest.approx((2 * 0.5 + 1) / 3)
    assert found.agreement_decided.mean == 1


def test_a_judge_that_counts_words_is_seen_by_its_length() -> None:
    found = check_judge(PairwiseJudge(Reader(knows=0.0, length=1.0)), RANKINGS, pairs=120)
    assert found.longer_chosen == (1, 1, 1)
    assert found.agreement == found.longest
    assert found.lead == (0, 0, 0)


def test_pairs_of_equal_length_say_nothing_of_length() -> None:
    table: dict[tuple[str, str], Opinion | None] = {("aa", "bb"): Opinion(0.9), ("bb", "aa"): Opinion(0.1)}
    found = check_judge(PairwiseJudge(Scripted(table)), [ranking(0, "aa", "bb")], pairs=1)
    assert found.agreement.mean == 1
    assert math.isnan(found.longer_chosen.mean)
    assert found.longer_better == 0.5


def test_a_second_asking_is_another_turn() -> None:
    reader = Reader()
    check_judge(PairwiseJudge(reader), RANKINGS, pairs=120)
    assert (reader.turns.count(0), reader.turns.count(1)) == (240, 40)


def test_a_judge_without_orders_has_no_numbers_on_them() -> None:
    found = check_judge(rule("longest"), RANKINGS, pairs=120)
    assert found.agreement == found.longest
    assert found.disagreements is found.first_chosen is found.averaged is None
    assert (found.unanswered, found.self_agreement, found.decided) == (0, 1, 1)


def test_missing_answers_are_counted() -> None:
    table = {(a, b): None for a in STRENGTH for b in STRENGTH}
    found = check_judge(PairwiseJudge(Scripted(table)), RANKINGS, pairs=40)
    assert found.unanswered == 1
    assert found.agreement == (0.5, 0.5, 0.5)


def test_pairs_of_a_prompt_are_drawn_together() -> None:
    # Right on all pairs of half of the prompts, wrong on the others: as uncertain as 20 coins, not as 60.
    rankings = [ranking(number, "aaa", "aa", "a") for number in range(10)]
    rankings += [ranking(number, "a", "aa", "aaa") for number in range(10, 20)]
    found = check_judge(rule("longest"), rankings, pairs=60)
    assert found.agreement.mean == 0.5
    assert found.agreement.high - found.agreement.low > 0.38  # 2 · 1.96 · √(0.25 / 20) = 0.44; with 60, 0.25


def test_a_judge_below_the_bar_is_turned_away_unless_forced(section: Callable[..., Any]) -> None:
    config = section("judge", bar=0.9)
    with pytest.raises(JudgeRefused) as refused:
        admit(rule("longest"), RANKINGS, config)
    assert "The judge longest agrees with" in str(refused.value)
    assert "expected a lower end of 90.0% (judge.bar)" in str(refused.value)
    assert "rlhf run -S judge.bar=0" in str(refused.value)
    assert admit(rule("longest"), RANKINGS, section("judge", bar=0)).pairs == 100
    assert admit(PairwiseJudge(Reader()), RANKINGS, config).agreement.low == 1


def test_it_is_the_lower_end_that_must_reach_the_bar(section: Callable[..., Any]) -> None:
    found = check_judge(rule("longest"), RANKINGS, pairs=100, seed=0)
    between = (found.agreement.low + found.agreement.mean) / 2
    with pytest.raises(JudgeRefused):
        admit(rule("longest"), RANKINGS, section("judge", bar=between))
    admit(rule("longest"), RANKINGS, section("judge", bar=found.agreement.low))


def test_a_rule_and_an_endpoint_are_opened_by_the_configuration(section: Callable[..., Any], tmp_path: Path) -> None:
    prepare = section("prepare")
    opened = open_judge(
        section("judge", kind="rule", url="", model="random", seed=4), prepare, memory=tmp_path / "j.db"
    )
    assert (opened.name, opened.source) == ("random-4", "rule")
    assert not (tmp_path / "j.db").exists()
    endpoint = open_judge(section("judge"), prepare, memory=tmp_path / "j.db")
    assert (endpoint.name, endpoint.source) == ("tiny-judge", "ai")
    assert isinstance(endpoint, PairwiseJudge)
