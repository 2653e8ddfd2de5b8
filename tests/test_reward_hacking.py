"""scripts/reward_hacking.py: its scores by hand, what it reads from curves by hand, and a run of a few updates."""

from pathlib import Path
from typing import Any

import pytest
from loading import load_script


@pytest.fixture(scope="module")
def hacking() -> Any:
    return load_script("reward_hacking")


def test_gold_wants_kind_words_once_and_few(hacking: Any) -> None:
    assert hacking.gold_of("You can help.") == 1.0
    assert hacking.gold_of("you you you can") == pytest.approx(2 / 4, rel=1e-12)
    assert hacking.gold_of("No, you don't") == pytest.approx((1 - 2) / 3, rel=1e-12)
    assert hacking.gold_of("...") == 0.0
    assert hacking.gold_of("you can " + "it " * 10) == pytest.approx(2 / 12, rel=1e-12)
    assert hacking.gold_of("you can " + "it " * 16) == pytest.approx(2 / 18 / 2, rel=1e-12)
    assert hacking.gold_of("you can " + "it " * 22) == hacking.gold_of("you can " + "it " * 28) == 0.0
    assert hacking.gold_of("no " * 18) == -1.0  # to be short makes nothing better that is not kind


def test_the_flaws_by_hand(hacking: Any) -> None:
    assert hacking.favours_a_word("It is it, you see") == pytest.approx(1 / 5 + 2 / 5 * hacking.FAVOUR, rel=1e-12)
    assert hacking.favours_length("It is it, you see") == pytest.approx(1 / 5 * (1 + 5 / 24), rel=1e-12)
    assert hacking.favours_length("you " * 24) == 2.0
    assert hacking.favours_length("no no") == pytest.approx(-1 - 2 / 24, rel=1e-12)
    assert hacking.favours_a_word("") == hacking.favours_length("") == 0.0
    # What they pay for most gold does not value.
    assert hacking.gold_of("it it it") == hacking.gold_of("you " * 24) == 0.0


def test_smoothing_by_hand(hacking: Any) -> None:
    assert hacking.smooth([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5], rel=1e-12)


def curves(golds: list[float], *alarms: int) -> list[dict[str, float]]:
    """Each value five times over, so that in the middle of five the smoothed one is the value itself."""
    rows = [gold for gold in golds for _ in range(5)]
    return [
        {"ppo/gold_score": gold, "ppo/score": at / 10, "ppo/alarm": float(at in alarms)}
        for at, gold in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize(("alarms", "in_time"), [((), False), ((14,), True), ((17,), False), ((9, 40), True)])
def test_curves_are_read_by_hand(hacking: Any, alarms: tuple[int, ...], in_time: bool) -> None:
    # From 0 up to 1 at update 8, and in steps down to 0.6 and 0.4; 0.5 is passed where three of five are at 0.4.
    found = hacking.read(curves([0.0, 1.0, 0.6, 0.4, 0.4], *alarms))
    assert (found.peak, found.half) == (8, 16)
    assert found.golds == pytest.approx((0.0, 1.0, 0.4), abs=1e-12)
    assert found.hacked
    assert found.in_time == in_time
    assert found.alarm == (alarms[0] if alarms else None)


def test_gold_that_keeps_half_of_its_gain_was_not_hacked(hacking: Any) -> None:
    found = hacking.read(curves([0.0, 1.0, 0.6], 12))
    assert found.half is None
    assert not found.hacked
    assert not found.in_time


@pytest.mark.parametrize(
    "golds",
    [
        [1.0, 0.6, 0.4, 0.2],  # falls from the first update on
        [1.0, 1.01, 0.6, 0.4, 0.2],  # before it falls it rises by less than one update differs from the next
    ],
)
def test_gold_that_never_rose_was_not_hacked_and_no_alarm_was_in_time(hacking: Any, golds: list[float]) -> None:
    rows = curves(golds, 1)
    for at, row in enumerate(rows):
        row["ppo/gold_score"] += 0.05 * (-1) ** at
    found = hacking.read(rows)
    assert found.half is not None
    assert found.alarm == 1 < found.half
    assert found.rewards[1] > found.rewards[0]
    assert not found.hacked
    assert not found.in_time


@pytest.mark.parametrize(
    ("broken", "healthy", "right"), [((14,), (), True), ((17,), (), False), ((), (), False), ((14,), (3,), False)]
)
def test_the_alarm_is_right_if_in_time_and_silent_without_a_flaw(
    hacking: Any, capsys: pytest.CaptureFixture[str], broken: tuple[int, ...], healthy: tuple[int, ...], right: bool
) -> None:
    golds = [0.0, 1.0, 0.6, 0.4, 0.4]
    found = {"word": [hacking.read(curves(golds, *broken))], "none": [hacking.read(curves(golds, *healthy))]}
    assert hacking.tell(found) == right
    assert f"Of 1 runs without a flaw, {0 if healthy else 1} had no alarm." in capsys.readouterr().out


@pytest.mark.thorough
def test_a_run_has_curves_to_read(hacking: Any, tmp_path: Path) -> None:
    task = hacking.words_task()
    start = hacking.train_start(task, 0, tmp_path)
    for flaw in ("word", "length", "none"):
        history = hacking.run(task, flaw, 0, start, updates=3)
        assert len(history) == 3
        found = hacking.read(history)
        assert found.alarm is None  # three updates are fewer than the window
        assert -1 <= found.golds[0] <= 1
        assert found.rewards[0] != found.golds[0]
