"""Rules that rank: what each prefers, and that a ranking does not hang on the order in which responses stand."""

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.feedback.annotators import RULES, Annotator, Item, Judgement, ranks_of, rule, words_of

PROMPT = (("user", "How do I boil an egg?"),)


def ranked(name: str, *responses: str, seed: int = 0) -> tuple[int, ...]:
    [judgement] = rule(name, seed=seed).judge([Item(PROMPT, responses)])
    return judgement.ranks


def test_equal_values_share_a_rank_and_the_next_one_counts_them() -> None:
    assert ranks_of([0.5, 3, 0.5, -1]) == (2, 1, 2, 4)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("Seven minutes in hot water.", "Put it into water that boils and wait for seven minutes."),  # fewer words
        ("Put it into water that boils and wait for seven minutes.", "Seven minutes in"),  # breaks off
        ('He said "seven minutes."', "Seven minutes,"),  # a quotation's end ends the sentence
    ],
)
def test_short_prefers_a_proper_end_and_then_fewer_words(better: str, worse: str) -> None:
    assert ranked("short", worse, better) == (2, 1)


def test_short_ties_what_is_as_long_and_ends_as_well() -> None:
    assert ranked("short", "One two three.", "Four five six!") == (1, 1)


def test_reader_prefers_the_greater_share_of_words_that_address_the_reader() -> None:
    # 2 of 4 words, 1 of 4, 0 of 2: "youth" is no "you".
    assert ranked("reader", "Youth boils.", "You boil your egg.", "You boil the egg.") == (3, 1, 2)


def test_words_end_at_an_apostrophe() -> None:
    assert words_of("You'll see; it’s 7 o'clock's YOUR egg") == ["you", "see", "it", "7", "o", "your", "egg"]


def test_longest_counts_characters() -> None:
    assert ranked("longest", "aa", "aaa", "bb") == (2, 1, 2)


def test_random_is_one_order_a_seed_wherever_a_response_stands() -> None:
    responses = tuple(f"answer {number}" for number in range(6))
    ranks = ranked("random", *responses)
    assert sorted(ranks) == [1, 2, 3, 4, 5, 6]
    assert ranked("random", *responses[::-1]) == ranks[::-1]
    assert ranked("random", *responses, seed=1) != ranks


def test_random_knows_nothing_of_the_order() -> None:
    items = [Item((("user", f"prompt {number}"),), ("one", "other")) for number in range(400)]
    first = sum(judgement.ranks[0] == 1 for judgement in rule("random").judge(items))
    assert 160 < first < 240  # 200 ± 4 standard deviations of a coin


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_an_annotator_that_names_itself(name: str) -> None:
    annotator: Annotator = rule(name, seed=3)
    assert annotator.source == "rule"
    assert annotator.name == ("random-3" if name == "random" else name)
    [judgement] = annotator.judge([Item(PROMPT, ("same", "same"))])
    assert judgement == Judgement((1, 1), reason=f"rule {annotator.name}", confidence=1.0)
    assert rule(name).judge([]) == []


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Found no rule 'shortest', expected one of short, .*rule:short"):
        rule("shortest")
