"""When a new policy takes over: each limit alone keeps it out, and all of them kept let it in."""

import random
import re
from typing import Any

import pytest
from toy import PROJECT

from rlhf_core.agreement import judged_so_far, wilson
from rlhf_core.config import Gate
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.feedback import exchange
from rlhf_core.gate import (
    Pair,
    Rates,
    Verdict,
    alike,
    gold_rates,
    judge_round,
    pair_answers,
    predicted,
    rates,
    require_safety_kinds,
)
from rlhf_core.people import in_report, people_beside_gold
from rlhf_core.records import Message
from rlhf_core.statistics import Interval, length_controlled_win_rate, outcome
from tasks.gate import _judge, report

VALUES: dict[str, Any] = {
    "seed": 0,
    "judge": "gold",
    "bootstrap_samples": 200,
    "min_win_rate": 0.5,
    "min_predicted": 0.0,
    "max_kl": 10.0,
    "max_perplexity_ratio": 1.2,
    "safety_kinds": ["unsafe"],
    "min_safety_win_rate": 0.4,
    "keep_rejected": False,
}
CONFIG = Gate.model_validate(VALUES)
EVALUATE = {"ppo": {"kl": 6.0, "perplexity": 33.0}, "sft": {"perplexity": 30.0}}


def asked(text: str) -> tuple[Message, ...]:
    return (("user", text),)


def pairs(wins: int, losses: int, *, category: str = "advice", ties: int = 0) -> list[Pair]:
    golds = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Pair(asked(f"{category} {i}"), category, f"new {i}", f"old {i}", gold) for i, gold in enumerate(golds)]


def held(found: list[Pair], evaluate: Any = EVALUATE, config: Gate = CONFIG) -> Verdict:
    return judge_round(found, gold_rates(found, config), evaluate, config)


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if not check.passed]


GOOD = pairs(40, 10) + pairs(6, 4, category="unsafe")


def test_a_policy_that_keeps_all_limits_is_promoted() -> None:
    verdict = held(GOOD)
    assert verdict.promoted
    assert failed(verdict) == []
    assert verdict.metrics["promoted"] == 1.0
    assert verdict.metrics["win_rate"] == verdict.metrics["gold_win_rate"] == pytest.approx(46 / 60)
    assert verdict.metrics["perplexity_ratio"] == pytest.approx(1.1)
    assert verdict.metrics["safety_win_rate"] == pytest.approx(0.6)
    assert (verdict.metrics["prompts"], verdict.metrics["comparisons"]) == (60, 60)


def test_a_win_rate_above_half_whose_interval_reaches_below_it_is_not_enough() -> None:
    verdict = held(pairs(28, 22))
    assert verdict.metrics["win_rate"] > 0.5 > verdict.metrics["win_rate_low"]
    assert failed(verdict) == ["win_rate"]
    assert not verdict.promoted
    assert verdict.metrics["promoted"] == 0.0


def test_a_few_wins_without_a_loss_are_not_enough() -> None:
    assert failed(held(pairs(3, 0))) == ["win_rate"]  # Wilson's interval of 3 of 3 begins at 44 %
    assert failed(held(pairs(4, 0))) == []
    assert gold_rates(pairs(4, 0), CONFIG).plain == wilson(4, 4)


def test_the_same_policy_again_is_not_promoted() -> None:
    # all ties: the interval holds one half, and the lower end has to be above it
    assert failed(held(pairs(0, 0, ties=50))) == ["win_rate"]


@pytest.mark.parametrize(
    ("policy", "sft", "name"),
    [({"kl": 10.1, "perplexity": 30}, 30, "kl"), ({"kl": 1, "perplexity": 37}, 30, "perplexity")],
)
def test_too_far_from_sft_is_not_promoted(policy: dict[str, float], sft: float, name: str) -> None:
    verdict = held(GOOD, {"ppo": policy, "sft": {"perplexity": sft}})
    assert failed(verdict) == [name]
    assert not verdict.promoted


def test_a_kl_estimated_below_zero_is_told_without_a_sign() -> None:
    verdict = held(GOOD, {"ppo": {"kl": -0.04, "perplexity": 30.0}, "sft": {"perplexity": 30.0}})
    assert "KL to SFT 0.0 nats" in next(check.words for check in verdict.checks if check.name == "kl")
    assert verdict.metrics["kl"] == -0.04


def test_a_limit_may_be_reached() -> None:
    assert held(GOOD, {"ppo": {"kl": 10.0, "perplexity": 36.0}, "sft": {"perplexity": 30.0}}).promoted


def test_a_loss_on_the_safety_prompts_is_not_made_up_for_elsewhere() -> None:
    verdict = held(pairs(90, 2) + pairs(2, 10, category="unsafe"))
    assert verdict.metrics["win_rate_low"] > 0.5
    assert failed(verdict) == ["safety"]


def test_a_certain_loss_on_the_safety_prompts_counts_even_above_the_least_rate() -> None:
    # 90 of 200: 0.45 is above 0.4, and its interval ends below one half only with enough prompts
    assert failed(held(pairs(900, 20) + pairs(450, 550, category="unsafe"))) == ["safety"]
    assert failed(held(pairs(900, 20) + pairs(9, 11, category="unsafe"))) == []


def test_without_safety_prompts_there_is_no_such_check() -> None:
    verdict = held(pairs(40, 10))
    assert [check.name for check in verdict.checks] == ["win_rate", "kl", "perplexity"]
    assert "safety_win_rate" not in verdict.metrics


def test_a_safety_kind_that_no_prompt_has_is_told() -> None:
    require_safety_kinds({"advice", "unsafe", ""}, CONFIG)
    typo = CONFIG.model_copy(update={"safety_kinds": ("unsafe", "unsaef")})
    with pytest.raises(ConfigError, match=r"names unsaef, but no test prompt.*Found advice, unsafe\."):
        require_safety_kinds({"unsafe", "advice", ""}, typo)
    require_safety_kinds({"advice"}, CONFIG.model_copy(update={"safety_kinds": ()}))
    require_safety_kinds({""}, typo)  # these data have no kinds: nothing is misspelt, and the report says so
    kindless = held(pairs(40, 10, category=""))
    assert "nothing was checked on unsafe." in report(kindless, None, 1, CONFIG)
    assert "nothing was checked" not in report(held(GOOD), None, 1, CONFIG)


def test_how_often_judgements_are_predicted_is_a_mean_over_them() -> None:
    # all three pairs right; of the two that are decided one right and one a tie; one pair, wrong
    found = predicted([(1, 2, 3), (1, 1, 3), (2, 1)], [(1, 2, 3), (1, 2, 2), (1, 2)])
    assert found.mean == pytest.approx((1 + 0.75 + 0) / 3)
    coin = random.Random(0)
    guesses = [coin.sample((1, 2, 3, 4), 4) for _ in range(400)]
    by_chance = predicted([(1, 2, 3, 4)] * 400, guesses)
    assert by_chance.low < 0.5 < by_chance.high
    assert by_chance.high - by_chance.low < 0.08


def test_judgements_that_a_coin_might_have_given_keep_a_round_out_where_asked() -> None:
    strict = CONFIG.model_copy(update={"min_predicted": 0.5})

    def verdict(config: Gate, learned: Interval | None) -> Verdict:
        return judge_round(GOOD, gold_rates(GOOD, config), EVALUATE, config, learned=learned)

    coins, taught = Interval(0.44, 0.3, 0.6), Interval(0.79, 0.64, 0.88)
    assert failed(verdict(strict, coins)) == ["predicted"]
    assert verdict(strict, taught).promoted
    assert verdict(CONFIG, coins).promoted  # shown only
    said = verdict(CONFIG, coins)
    assert said.checks[-1].words.endswith("held out, in 44% (30% to 60%); shown only")
    assert [said.metrics[name] for name in ("predicted", "predicted_low", "predicted_high")] == list(coins)
    assert failed(verdict(strict, None)) == ["predicted"]  # what cannot be told is not taken for granted
    assert "no judgement of the round was held out" in verdict(strict, None).checks[-1].words
    assert "predicted" not in verdict(CONFIG, None).metrics
    assert verdict(CONFIG, None).promoted


def test_another_judge_decides_and_the_gold_model_stands_beside_it() -> None:
    judged = Rates(Interval(0.45, 0.4, 0.5), Interval(0.55, 0.5, 0.6))
    verdict = judge_round(GOOD, judged, EVALUATE, CONFIG.model_copy(update={"judge": "rule:short"}))
    assert failed(verdict) == ["win_rate"]
    assert (verdict.metrics["win_rate"], verdict.metrics["length_controlled_win_rate"]) == (0.45, 0.55)
    assert verdict.metrics["gold_win_rate"] == pytest.approx(46 / 60)
    assert verdict.checks[0].words.startswith("rule:short prefers the new policy in 45% (40% to 50%)")


def lengthened(found: list[Pair], by: float) -> list[Pair]:
    """The new policy's answers longer where they win, by as much shorter where they lose."""
    return [pair._replace(longer=by * (2 * pair.gold - 1)) for pair in found]


def test_rates_at_equal_length_stand_beside_every_rate_and_decide_nothing() -> None:
    # Longer by 9 tokens in 36 of 40 wins and in 4 of 10 losses: to win is to be longer, mostly.
    found = [one._replace(longer=9.0 if i % 10 else -9.0) for i, one in enumerate(pairs(40, 0))]
    found += [
        one._replace(longer=9.0 if i < 4 else -9.0, prompt=asked(f"lost {i}")) for i, one in enumerate(pairs(0, 10))
    ]
    found += lengthened(pairs(6, 4, category="unsafe"), 5.0)
    verdict = held(found)
    plain, equal = verdict.metrics["win_rate"], verdict.metrics["length_controlled_win_rate"]
    expected = length_controlled_win_rate(
        [one.gold for one in found], [one.longer for one in found], [one.prompt for one in found], samples=200, seed=0
    )
    assert equal == expected.mean < plain - 0.05
    ends = tuple(verdict.metrics[f"length_controlled_win_rate_{end}"] for end in ("low", "high"))
    assert ends == expected[1:]
    assert verdict.metrics["gold_length_controlled_win_rate"] == equal
    assert verdict.metrics["safety_length_controlled_win_rate"] < verdict.metrics["safety_win_rate"]
    assert verdict.metrics["longest_wins"] == pytest.approx((36 + 4 + 6) / 60)
    words = {check.name: check.words for check in verdict.checks}
    shown = f"{expected.mean:.0%} ({expected.low:.0%} to {expected.high:.0%})"
    assert f"between answers of equal length it is {shown}" in words["win_rate"]
    assert "between answers of equal length it is" in words["safety"]
    assert failed(verdict) == []


def test_answers_of_one_length_have_one_rate() -> None:
    found = rates([1, 1, 0, 0.5], [3, 3, 3, 3], list("abcd"), CONFIG)
    assert found.equal.mean == pytest.approx(found.plain.mean, abs=2e-3)  # the ridge


# ---- pairs


def answer(policy: str, prompt: Any, text: str, gold: float, how: str = "sampled") -> dict[str, Any]:
    row = {"policy": policy, "how": how, "prompt": prompt, "text": text, "gold_reward": gold, "category": "x"}
    return {**row, "tokens": ord(text[0]), "stopped": True}


def test_every_sampled_answer_stands_beside_every_one_to_its_prompt() -> None:
    new = [answer("ppo", "p", "a", 1.0), answer("ppo", "p", "b", 0.0), answer("sft", "p", "c", 9.0)]
    new += [answer("ppo", "p", "greedy", 5.0, "greedy"), answer("ppo", "only here", "d", 1.0)]
    current = [answer("ppo", "p", "e", 0.5), answer("ppo", "p", "f", 1.0)]
    found = pair_answers(new, current, "ppo")
    assert [(pair.new, pair.current, pair.gold, pair.longer) for pair in found] == [
        ("a", "e", 1.0, -4.0),
        ("a", "f", 0.5, -5.0),
        ("b", "e", 0.0, -3.0),
        ("b", "f", 0.0, -4.0),
    ]


def test_the_same_answer_is_a_tie_at_the_gate_too() -> None:
    one = answer("ppo", "p", "a", 1.0)
    rounded = answer("ppo", "p", "a", 1.0 + 1e-7)
    assert [pair.gold for pair in pair_answers([one], [rounded], "ppo")] == [0.5]
    assert [pair.gold for pair in pair_answers([one], [{**rounded, "stopped": False}], "ppo")] == [0.0]


def test_answers_to_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="share no prompt"):
        pair_answers([answer("ppo", "p", "a", 1)], [answer("ppo", "q", "b", 1)], "ppo")


def test_conversations_that_end_alike_are_told_apart() -> None:
    cats, dogs = (
        [
            {"role": "user", "content": about},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Go on."},
        ]
        for about in ("Cats.", "Dogs.")
    )
    new = [answer("ppo", cats, "a", 1.0), answer("ppo", dogs, "b", 0.0)]
    current = [answer("ppo", cats, "c", 0.0), answer("ppo", dogs, "d", 1.0)]
    found = pair_answers(new, current, "ppo")
    assert [(pair.prompt[0][1], pair.new, pair.current) for pair in found] == [("Cats.", "a", "c"), ("Dogs.", "b", "d")]
    row = {"annotator": "kim", "responses": ["a", "c"], "ranks": [1, 2]}
    people = people_beside_gold([{**row, "prompt": cats}, {**row, "prompt": dogs}], found, CONFIG)
    assert people is not None
    assert people.judgements == 1


def test_outcomes() -> None:
    assert [outcome(2, 1), outcome(1, 1), outcome(0, 1)] == [1.0, 0.5, 0.0]


# ---- people beside the gold model


def said(who: str, pair: Pair, ranks: tuple[int, int]) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in pair.prompt]
    return {"annotator": who, "prompt": turns, "responses": [pair.new, pair.current], "ranks": list(ranks)}


def test_people_stand_beside_the_gold_model_on_the_pairs_they_saw() -> None:
    seen = pairs(2, 2)  # gold: won, won, lost, lost
    rows = [said("kim", seen[0], (1, 2)), said("sam", seen[0], (1, 2)), said("kim", seen[1], (2, 1))]
    rows += [said("kim", seen[2], (2, 1)), said("kim", seen[3], (1, 1))]
    found = people_beside_gold(rows, seen, CONFIG)
    assert found is not None
    assert (found.judgements, found.annotators) == (5, 2)
    # of four prompts: won twice, lost, lost, tie
    assert found.rates.plain.mean == pytest.approx(1.5 / 4)
    assert found.gold.plain.mean == pytest.approx(2 / 4)
    assert found.agreement == pytest.approx(3 / 4)  # the tie is no decision
    assert found.alpha is None  # both said the same of the one pair that two people saw
    assert [line for line in found.lines() if line.startswith("| win rate of the new policy | 50% (")]
    assert found.lines()[-1].startswith(
        "2 people made 5 judgements. Where they decided, the gold model prefers the same"
    )


def test_people_are_asked_what_they_say_at_equal_length() -> None:
    seen = lengthened(pairs(4, 4), 6.0)
    rows = [said("kim", pair, (1, 2)) for pair in seen[:5]] + [said("kim", pair, (2, 1)) for pair in seen[5:]]
    found = people_beside_gold(rows, seen, CONFIG)
    assert found is not None
    expected = length_controlled_win_rate(
        [1.0] * 5 + [0.0] * 3, [6.0] * 4 + [-6.0] * 4, [pair.prompt for pair in seen], samples=200, seed=0
    )
    assert found.rates.equal == expected
    metrics = found.metrics()
    assert metrics["length_controlled_win_rate"] == expected.mean != metrics["win_rate"]
    assert metrics["gold_length_controlled_win_rate"] == pytest.approx(0.5, abs=1e-3)
    [line] = [line for line in found.lines() if line.startswith("| the same at equal length | 50% (")]
    assert line.split(" | ")[2].startswith(f"{expected.mean:.0%} ")


@pytest.mark.parametrize(("judgements", "promoted"), [(1, False), (3, False), (5, False), (9, False), (10, True)])
def test_people_promote_only_by_an_interval_that_holds_whenever_they_stop(judgements: int, promoted: bool) -> None:
    config = CONFIG.model_copy(update={"judge": "people"})
    people = people_beside_gold([said("kim", pair, (1, 2)) for pair in GOOD[:judgements]], GOOD, config)
    assert people is not None
    assert people.rates.plain == judged_so_far([1.0] * judgements).win_rate
    assert judge_round(GOOD, _judge(GOOD, people, config), EVALUATE, config).promoted == promoted


def test_agreement_among_people_needs_a_pair_that_several_judged() -> None:
    seen = pairs(3, 0)
    rows = [said(who, pair, (1, 2)) for who in ("kim", "sam") for pair in seen[:2]]
    rows += [said("kim", seen[2], (2, 1)), said("sam", seen[2], (2, 1))]
    found = people_beside_gold(rows, seen, CONFIG)
    assert found is not None
    assert found.alpha == pytest.approx(1.0)
    assert found.metrics()["alpha"] == pytest.approx(1.0)


def test_where_nobody_judged_there_is_nothing_beside_the_gold_model() -> None:
    assert people_beside_gold([], GOOD, CONFIG) is None
    assert people_beside_gold([said("kim", pairs(1, 0, category="other")[0], (1, 2))], GOOD, CONFIG) is None


def test_it_tells_which_side_answers_stood_on_and_which_side_people_chose() -> None:
    seen = pairs(2, 2)
    sides, ranks = (0, 1, 0, 0), ((1, 2), (1, 2), (2, 1), (1, 1))
    rows = [{**said("kim", pair, rank), "first": side} for pair, side, rank in zip(seen, sides, ranks, strict=True)]
    found = people_beside_gold(rows, seen, CONFIG)
    assert found is not None
    assert found.new_first == pytest.approx(3 / 4)
    assert found.chose_first == pytest.approx(1 / 3)  # first: the new one, chosen; then the new one, second; then not
    assert {"new_first", "chose_first"} < set(found.metrics())
    assert found.lines()[-1].endswith(
        "What the new policy said stood first in 75%. People chose what stood first in 33%."
    )


def test_the_report_shows_what_people_said_and_nothing_else_changes() -> None:
    page = '<nav><a href="#policies">Policies</a></nav><section id="policies">\n</section>'
    found = people_beside_gold([said("<kim>", pair, (1, 2)) for pair in pairs(4, 0)], pairs(4, 0), CONFIG)
    assert found is not None
    shown = in_report(page, found, "round 3's policy", "the current one")
    assert '<nav><a href="#people">People</a><a href="#policies">' in shown
    assert "round 3&#39;s policy" in shown
    assert re.search(
        r'<tr><th scope="row">Win rate of round 3&#39;s policy</th><td>[^<]*</td><td>100% \(28% to 100%\)</td></tr>',
        shown,
    )
    assert "1 person made 4 judgements." in shown
    assert shown.index('id="people"') < shown.index('id="policies"')
    start, end = shown.index('<section id="people">'), shown.index('<section id="policies">')
    assert (shown[:start] + shown[end:]).replace('<a href="#people">People</a>', "") == page


def test_the_reports_page_has_the_places_that_people_are_put_before() -> None:
    from rlhf_core.people import LINK, PLACE

    template = (PROJECT / "rlhf_core/templates/report.html.j2").read_text(encoding="utf-8")
    assert (template.count(LINK), template.count(PLACE)) == (1, 1)


def test_people_who_have_nothing_to_compare_are_all_ties_and_the_old_policy_stays() -> None:
    config = CONFIG.model_copy(update={"judge": "people"})
    same = [pair._replace(new="same", current="same") for pair in pairs(0, 0, ties=20)]
    verdict = judge_round(same, _judge(same, None, config), EVALUATE, config)
    assert failed(verdict) == ["win_rate"]
    assert verdict.metrics["win_rate"] == 0.5
    assert verdict.checks[0].words.endswith("people had nothing to compare: all ties")
    spaced = [pair._replace(new="same \n", current="s\0ame") for pair in same]
    assert failed(judge_round(spaced, _judge(spaced, None, config), EVALUATE, config)) == ["win_rate"]
    with pytest.raises(DataError, match=r"holds no comparison, and gate\.judge is people"):
        _judge(GOOD, None, config)


@pytest.mark.parametrize("other", ["Same.", " Same.\n", "Sa\0me.", "same.", "Sa me.", "", "Same.\ud83d", "Same.?"])
@pytest.mark.parametrize("one", ["Same.", "", "Same.?"])
def test_what_the_gate_calls_alike_the_pages_do_not_show(one: str, other: str) -> None:
    item = exchange.stored(exchange.Found("compare", [("user", "Why?")], [one, other], ["a", "b"], ""))
    assert alike(one, other) == item.identical
