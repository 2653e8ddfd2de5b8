"""scripts/fast_and_slow.py: what is done is not done again, and what follows from it."""

from pathlib import Path
from typing import Any

import pytest
from loading import load_script

from rlhf_core.config import PPO, Params, load_params

PROJECT = Path(__file__).resolve().parents[1]
WIN = "gold_win_rate"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("fast_and_slow")


def rows(fast: list[float], slow: list[float]) -> list[dict[str, Any]]:
    pairs = {"fast": fast, "slow": slow}
    return [{"way": way, "seed": seed, WIN: win} for way, wins in pairs.items() for seed, win in enumerate(wins)]


def test_a_way_is_below_the_other_by_more_than_chance(script: Any) -> None:
    assert script.not_below(rows([0.7, 0.6, 0.65], [0.6, 0.65, 0.6]))[0]
    assert script.not_below(rows([0.6, 0.6, 0.66], [0.62, 0.64, 0.6]))[0]  # below, by less than seeds differ
    held, words = script.not_below(rows([0.5, 0.52, 0.51], [0.6, 0.63, 0.6]))
    assert not held
    assert words == "fast less slow: -10.0 points over 3 seeds, standard error 0.6"


def test_a_run_that_was_stopped_goes_on_and_one_of_other_values_starts(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROJECT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    done: list[tuple[str, int, int]] = []

    def measure(config: PPO, params: Params) -> dict[str, Any]:
        way = "slow" if config.value_network == "own" else "fast"
        done.append((way, config.seed, config.updates))
        if len(done) == 3:
            raise KeyboardInterrupt
        win = 0.7 if way == "fast" else 0.6
        return {WIN: win, f"{WIN}_low": win - 0.1, f"{WIN}_high": win + 0.1, "kl": 4.0, "seconds": 240.0}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr("sys.argv", ["fast_and_slow.py", "0", "1"])
    updates = load_params().ppo.updates
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert script.main() == 0
    assert done[2:] == [("fast", 1, updates), ("fast", 1, updates), ("slow", 1, updates)]
    assert "| slow | 1 | 60% (50% to 70%) | 4.0 | 4.0 |" in capsys.readouterr().out
    (tmp_path / "params.yaml").write_text(text.replace(f"updates: {updates}", "updates: 3"))
    script.main()
    assert {found[2] for found in done[5:]} == {3}
