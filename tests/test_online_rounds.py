"""scripts/online_rounds.py: what it says of rounds that did not go as they should. The rounds take an hour."""

import runpy
from typing import Any

import pytest
from toy import PROJECT

from rlhf_core.statistics import Interval


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "scripts" / "online_rounds.py"))


def rounds(script: dict[str, Any], rates: tuple[float, ...], promoted: str) -> list[Any]:
    """A round a rate; + was promoted, - stopped."""
    return [
        script["Round"](number, sign == "+", Interval(rate, 0.0, 1.0), ())
        for number, (rate, sign) in enumerate(zip(rates, promoted, strict=True))
    ]


def test_all_is_well_where_rates_rise_and_the_coins_round_is_stopped(script: dict[str, Any]) -> None:
    seen = [*script["PHASES"], "pause"]
    assert script["problems"](rounds(script, (0.5, 0.6, 0.7, 0.8, 0.4), "++++-"), seen, quick=False) == []


def test_what_went_wrong_is_told(script: dict[str, Any]) -> None:
    seen = [phase for phase in script["PHASES"] if phase != "gate"]
    found = script["problems"](rounds(script, (0.5, 0.6, 0.6, 0.8, 0.4), "+++-+"), seen, quick=False)
    assert found == [
        "round 2 was never killed: gate",
        "the flow run of round 2 was never seen paused",
        "round 2 is no better against SFT by short than the one before: 60.0% after 60.0%",
        "round 3 was stopped",
        "round 4 was promoted",
    ]


def test_of_a_random_model_only_that_it_works_is_asked(script: dict[str, Any]) -> None:
    seen = [*script["PHASES"], "pause"]
    assert script["problems"](rounds(script, (0.5, 0.4, 0.4, 0.4, 0.4), "+---+"), seen, quick=True) == []
    found = script["problems"](rounds(script, (0.5, 0.4), "++"), seen, quick=True)
    assert found == ["2 rounds are over, expected 5, round 0 included"]
