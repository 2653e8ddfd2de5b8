"""The judge of section judge where a round opens it: the bar, and what is said to get past it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from toy import PROJECT

from flows.online import open_annotator
from rlhf_core.config import Params, load_params
from rlhf_core.errors import JudgeRefused
from tasks.pipeline import apply_overrides

ROWS = [{"prompt": f"Question {number}?", "responses": ["a", "the longer one"], "ranks": [1, 2]} for number in range(9)]


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Params]:
    """Stands in a workspace whose judge is the rule that longer is better, and is wrong each time."""
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def enter(place: str = ".", bar: float = 0.5) -> Params:
        folder = tmp_path / place
        (folder / "data/prepared").mkdir(parents=True)
        (folder / "data/prepared/rankings_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (folder / "dvc.yaml").write_text("stages: {}\n")
        (folder / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
        monkeypatch.chdir(folder)
        return apply_overrides(["judge.kind=rule", "judge.model=longest", f"judge.bar={bar}"], root=folder)

    return enter


def test_with_a_bar_of_0_a_round_measures_no_judge(judged: Callable[..., Params]) -> None:
    params = judged(bar=0)
    Path("data/prepared/rankings_test.jsonl").unlink()
    assert open_annotator("judge", 1, params).name == "longest"


def test_a_judge_that_reaches_the_bar_is_told(
    judged: Callable[..., Params], capsys: pytest.CaptureFixture[str]
) -> None:
    params = judged()
    rows = [{**row, "ranks": [2, 1]} for row in ROWS]
    Path("data/prepared/rankings_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_annotator("judge", 1, params).name == "longest"
    assert capsys.readouterr().out == "judge    longest agrees with 100.0% of known answers\n"


@pytest.mark.parametrize(
    ("place", "how"),
    [
        (".", "take this one all the same: `rlhf run -S judge.bar=0`."),
        (".rlhf/tiny", "take this one all the same: `rlhf run --recipe tiny -S judge.bar=0`."),
    ],
)
def test_a_refused_judge_is_taken_by_the_command_at_hand(judged: Callable[..., Params], place: str, how: str) -> None:
    params = judged(place)
    with pytest.raises(JudgeRefused) as error:
        open_annotator("judge", 1, params)
    assert str(error.value).endswith(how)


def test_in_a_campaign_it_is_taken_by_what_its_next_start_reads(judged: Callable[..., Params]) -> None:
    params = judged(".rlhf/mine")
    Path("campaign.yaml").write_bytes(Path("params.yaml").read_bytes())
    with pytest.raises(JudgeRefused) as error:
        open_annotator("judge", 1, params)
    assert str(error.value).endswith(
        "all the same: set `bar: 0` in section judge of params.yaml and campaign.yaml in .rlhf/mine."
    )
    assert load_params("campaign.yaml").judge.bar == 0.5
