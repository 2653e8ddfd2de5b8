"""scripts/online_rounds.py and rule_seeds.py: what they say of rounds that went otherwise. The rounds take an hour."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loading import load_script

from rlhf_core.statistics import Interval


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("online_rounds")


def rounds(script: Any, rates: tuple[float, ...], promoted: str) -> list[Any]:
    """A round a rate; + was promoted, - stopped."""
    return [
        script.Round(number, sign == "+", Interval(rate, 0.0, 1.0), ())
        for number, (rate, sign) in enumerate(zip(rates, promoted, strict=True))
    ]


def test_all_is_well_where_rates_rise_and_the_coins_round_is_stopped(script: Any) -> None:
    seen = [*script.PHASES, "pause"]
    assert script.problems(rounds(script, (0.5, 0.6, 0.7, 0.8, 0.4), "++++-"), seen, quick=False) == []


def test_what_went_wrong_is_told(script: Any) -> None:
    seen = [phase for phase in script.PHASES if phase != "gate"]
    found = script.problems(rounds(script, (0.5, 0.6, 0.6, 0.8, 0.4), "+++-+"), seen, quick=False)
    assert found == [
        "round 2 was never killed: gate",
        "the flow run of round 2 was never seen paused",
        "round 2 is no better against SFT by short than the one before: 60.0% after 60.0%",
        "round 3 was stopped",
        "round 4 was promoted",
    ]


def test_of_a_random_model_only_that_it_works_is_asked(script: Any) -> None:
    seen = [*script.PHASES, "pause"]
    assert script.problems(rounds(script, (0.5, 0.4, 0.4, 0.4, 0.4), "+---+"), seen, quick=True) == []
    found = script.problems(rounds(script, (0.5, 0.4), "++"), seen, quick=True)
    assert found == ["2 rounds are over, expected 5, round 0 included"]


# ---- rule_seeds.py


def test_every_seed_has_to_beat_sft_with_its_whole_interval() -> None:
    seeds = load_script("rule_seeds")
    won, even = (seeds.Round(1, True, Interval(0.6, low, 0.7), ()) for low in (0.51, 0.5))
    assert seeds.verdict([won, won]) == (True, "Above one half with the whole interval: 2 of 2 seeds.")
    assert seeds.verdict([won, even]) == (False, "Above one half with the whole interval: 1 of 2 seeds.")


def test_a_seed_has_a_campaign_of_its_own_that_is_told_its_settings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = load_script("rule_seeds")
    asked: list[list[str]] = []

    def runs(command: list[str]) -> SimpleNamespace:
        asked.append(command[3:])
        Path(".rlhf/short-7").mkdir(parents=True, exist_ok=True)
        Path(".rlhf/short-7/campaign.json").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeds.subprocess, "run", runs)
    monkeypatch.setattr(seeds, "read_round", lambda place: place.as_posix())
    assert seeds.run(7, ["--recipe", "tiny"]) == ".rlhf/short-7/rounds/001"
    assert asked[0][:5] == ["online", "run", "short-7", "--recipe", "tiny"]
    assert asked[0][-4:] == ["--annotator", "rule:short", "--until", "1"]
    settings = [one for flag, one in zip(asked[0], asked[0][1:], strict=False) if flag == "-R"]
    assert {"preferences.seed=7", "reward.seed=7", "ppo.seed=7", "gate.judge=rule:short"} <= set(settings)
    seeds.run(7, ["--recipe", "tiny"])
    assert asked[1] == ["online", "run", "short-7", "--annotator", "rule:short", "--until", "1"]
