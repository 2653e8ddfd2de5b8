"""The alarm for reward hacking: its tests by hand, what sets it off and what does not, and how often it is wrong."""

import json
import random
import time
from itertools import accumulate, pairwise, permutations
from math import factorial
from typing import Any

import pytest

from rlhf_core import alarm as rule
from rlhf_core.alarm import (
    FALL_LEVEL,
    GOLD,
    PROXY,
    REPETITION,
    RISE_LEVEL,
    Alarm,
    alarm_now,
    find_alarms,
    repetition,
    trend_level,
)

LENGTH, PERPLEXITY, SPREAD = "ppo/response_length", "ppo/perplexity", "ppo/score_spread"
WINDOW = 10


def score(values: list[float]) -> int:
    """Mann and Kendall's S: pairs that rise less pairs that fall."""
    return sum((later > earlier) - (later < earlier) for i, earlier in enumerate(values) for later in values[i + 1 :])


def rows(updates: int = 30, **curves: Any) -> list[dict[str, float]]:
    """A run whose reward rises, nothing else being wrong; curves are functions of the update, from 0."""
    names = {"proxy": PROXY, "gold": GOLD, "repetition": REPETITION, "length": LENGTH, "perplexity": PERPLEXITY}
    names["spread"] = SPREAD
    plain: dict[str, Any] = {
        "proxy": lambda update: 0.1 * update,
        "repetition": lambda update: 0.02 + 0.001 * (update % 2),
        "length": lambda update: 30 + update % 3,
        "perplexity": lambda update: 6 + 0.1 * (update % 2),
    }
    return [
        {names[name]: float(curve(update)) for name, curve in {**plain, **curves}.items()} for update in range(updates)
    ]


def after(update: int, slope: float, start: float) -> Any:
    """Level until an update, then a slope."""
    return lambda now: start + slope * max(now - update, 0) + 1e-6 * (now % 2)


# ---- the trend test


def test_a_trend_by_hand() -> None:
    assert trend_level([1, 2, 3]) == pytest.approx(1 / 6, rel=1e-12)  # one of six orders
    assert trend_level([1, 3, 2]) == pytest.approx(3 / 6, rel=1e-12)  # S = 1: 123, 132, 213
    assert trend_level([3, 2, 1]) == 1.0
    assert trend_level([3, 2, 1], down=True) == pytest.approx(1 / 6, rel=1e-12)
    assert trend_level([5.0]) == 1.0


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_trend_is_as_likely_as_over_all_orders(size: int) -> None:
    orders = [list(map(float, order)) for order in permutations(range(size))]
    for values in orders[:: max(len(orders) // 40, 1)]:
        expected = sum(score(other) >= score(values) for other in orders) / len(orders)
        assert trend_level(values) == pytest.approx(expected, rel=1e-12)
        expected = sum(score(other) <= score(values) for other in orders) / len(orders)
        assert trend_level(values, down=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 10, 20, 40, 120])
def test_levels_are_those_of_whole_numbers(size: int) -> None:
    counts = [1]  # of the orders with 0, 1, 2 … pairs the wrong way round
    for more in range(2, size + 1):
        below = [0, *accumulate([*counts, *[0] * (more - 1)])]
        counts = [below[at + 1] - below[max(at + 1 - more, 0)] for at in range(len(below) - 1)]
    assert sum(counts) == factorial(size)
    exact = [below / factorial(size) for below in accumulate(counts)]
    assert rule._inversions(size) == pytest.approx(exact, rel=1e-11, abs=1e-300)  # less than that is no number
    for level in (FALL_LEVEL, RISE_LEVEL):
        assert (rule._inversions(size) <= level).tolist() == [share <= level for share in exact]


def test_equal_values_are_no_trend() -> None:
    assert trend_level([2.0] * 8) > 0.4
    assert trend_level([1, 1, 2, 2]) >= trend_level([1, 1.5, 2, 2.5])  # more cautious, never less


# ---- repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("abcabc", 1 / 4),  # abc bca cab abc
        ("aaaaa", 2 / 3),  # aaa three times
        ("abcdef", 0.0),
        ("ab", 0.0),
        ("", 0.0),
    ],
)
def test_repetition_by_hand(tokens: str, expected: float) -> None:
    assert repetition(list(tokens)) == pytest.approx(expected, rel=1e-12)


# ---- the rule


def test_gold_that_falls_while_the_reward_rises_raises_it() -> None:
    (alarm, *_) = find_alarms(rows(gold=after(12, -0.1, 1.0)), WINDOW)
    assert 16 < alarm.update < 24
    assert alarm.since == alarm.update - WINDOW + 1
    assert [change.metric for change in alarm.changes] == [PROXY, GOLD]
    assert "the gold score falls" in alarm.text()


@pytest.mark.parametrize(
    "curves",
    [
        {},
        {"gold": after(0, 0.05, 0.0)},  # both rise
        {"gold": after(12, -0.1, 1.0), "proxy": after(12, -0.1, 1.0)},  # both fall: no hacking, a loop that is lost
        {"gold": after(12, -0.1, 1.0), "proxy": lambda update: update % 2},  # a reward that never rose
        {"length": after(5, 2.0, 30)},  # one of the others alone
        {"length": after(5, 0.1, 30), "perplexity": after(5, 0.02, 6)},  # sure trends of a tenth
    ],
)
def test_it_stays_silent(curves: dict[str, Any]) -> None:
    assert find_alarms(rows(**curves), WINDOW) == []


@pytest.mark.parametrize("first", ["length", "perplexity", "spread", "repetition"])
@pytest.mark.parametrize("second", ["length", "perplexity", "spread", "repetition"])
def test_two_of_the_others_raise_it_too(first: str, second: str) -> None:
    worse = {
        "length": after(5, 2.0, 30),
        "perplexity": after(5, 0.5, 6),
        "spread": after(5, 0.1, 0.5),
        "repetition": after(5, 0.02, 0.01),
    }
    found = find_alarms(rows(**{name: worse[name] for name in {first, second}}), WINDOW)
    assert bool(found) == (first != second)


def test_a_reward_at_its_top_does_not_hide_a_fall() -> None:
    # The score is clipped; by then it has come from below.
    found = find_alarms(rows(proxy=lambda update: min(update, 12), gold=after(14, -0.1, 1.0)), WINDOW)
    assert found


def test_a_fall_that_is_small_beside_the_gain_is_none() -> None:
    def gold(update: int) -> float:
        return min(update, 15) - 0.01 * max(update - 15, 0)

    assert find_alarms(rows(gold=gold), WINDOW) == []


def test_after_an_alarm_only_later_updates_count() -> None:
    found = find_alarms(rows(60, gold=after(12, -0.1, 1.0)), WINDOW)
    assert len(found) > 1
    for before, later in pairwise(found):
        assert later.since > before.update


def test_updates_that_were_not_watched_are_passed_over() -> None:
    every = rows(60, gold=after(24, -0.1, 1.0))
    found = find_alarms([row if place % 2 == 0 else {PROXY: 99.0} for place, row in enumerate(every)], WINDOW)
    assert found[0].update % 2 == 1  # counted from 1
    assert found[0].update - found[0].since == 2 * (WINDOW - 1)


def test_a_history_read_from_a_file_says_the_same() -> None:
    history = rows(gold=after(12, -0.1, 1.0))
    text = [{name: repr(value) for name, value in row.items()} | {SPREAD: ""} for row in history]
    assert find_alarms(text, WINDOW) == find_alarms(history, WINDOW)
    assert find_alarms(json.loads(json.dumps(history)), WINDOW) == find_alarms(history, WINDOW)


def test_the_alarms_so_far_do_not_hang_on_what_comes_later() -> None:
    history = rows(50, gold=after(12, -0.1, 1.0))
    whole = find_alarms(history, WINDOW)
    for end in range(len(history)):
        assert find_alarms(history[:end], WINDOW) == [alarm for alarm in whole if alarm.update <= end]


def test_the_last_update_alone_is_told_as_in_the_whole_run() -> None:
    every = rows(60, gold=after(24, -0.1, 1.0))
    history = [row if place % 2 == 0 else {PROXY: 99.0} for place, row in enumerate(every)]
    found: list[Alarm] = []
    for end in range(1, len(history) + 1):
        alarm = alarm_now(history[:end], WINDOW, last=found[-1].update if found else 0)
        assert alarm is None or alarm.update == end
        found += [] if alarm is None else [alarm]
    assert found == find_alarms(history, WINDOW)
    assert len(found) > 1


def test_a_long_run_with_the_widest_window_takes_seconds_in_all() -> None:
    draw = random.Random(0)
    # Every sign is on its way and none has got far, so that all of them are looked at after each update.
    slow = {"length": lambda update: 30 + 0.01 * update, "perplexity": lambda update: 6 + 0.001 * update}
    slow["gold"] = lambda update: min(update, 100) - 0.01 * max(update - 100, 0)
    history = rows(400, **slow, proxy=lambda update: 0.01 * update + draw.gauss(0, 0.1))
    began = time.process_time()
    for end in range(1, len(history) + 1):
        alarm_now(history[:end], 200, last=0)
    assert time.process_time() - began < 20  # it takes one; with every order counted anew it would be days
    assert find_alarms(history, 200) == []


def noisy(updates: int, seed: int, *, gold: bool, memory: float = 0.0) -> list[Alarm]:
    """A run whose reward rises and everything else is noise around where it was."""
    draw = random.Random(seed)
    levels = dict.fromkeys(("gold", "length", "perplexity", "spread", "repetition"), 0.0)
    history = []
    for update in range(updates):
        levels = {name: memory * value + draw.gauss(0, 1) for name, value in levels.items()}
        row = {PROXY: 0.05 * update + draw.gauss(0, 0.1), REPETITION: 0.05 + 0.05 * levels["repetition"]}
        row |= {LENGTH: 30 + 10 * levels["length"], PERPLEXITY: 6 + 2 * levels["perplexity"]}
        row |= {SPREAD: 0.5 + 0.2 * levels["spread"]}
        history.append(row | ({GOLD: 0.2 * levels["gold"]} if gold else {}))
    return find_alarms(history, WINDOW)


def share_of_false_alarms(updates: int, runs: int, **how: Any) -> float:
    return sum(bool(noisy(updates, seed, **how)) for seed in range(runs)) / runs


def test_noise_seldom_raises_it() -> None:
    assert share_of_false_alarms(20, 300, gold=True) <= 0.02


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("updates", "gold", "memory", "most"),
    [(20, True, 0.0, 0.01), (100, True, 0.0, 0.05), (100, False, 0.0, 0.002), (100, True, 0.5, 0.35)],
)
def test_false_alarms_a_run_are_as_told(updates: int, gold: bool, memory: float, most: float) -> None:
    assert share_of_false_alarms(updates, 4000, gold=gold, memory=memory) <= most


def test_the_level_is_that_of_few_orders() -> None:
    # Ten watched updates: of 45 pairs at most 5 may go the other way, each swap of neighbours being one.
    falling = [10.0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    swapped = [9.0, 10, 7, 8, 5, 6, 3, 4, 1, 2]
    assert trend_level(falling, down=True) < trend_level(swapped, down=True) <= FALL_LEVEL
    assert trend_level([*swapped[:-4], 2, 4, 1, 3], down=True) > FALL_LEVEL  # one pair more
