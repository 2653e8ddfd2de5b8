"""The frontier across runs: who is beaten, which scores may be compared, and a page that stands alone."""

import csv
import math
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from stores import sqlite_store
from typer.testing import CliRunner

from flows.cli import app
from rlhf_core.errors import MissingArtifact
from rlhf_core.frontier import Group, Point, on_frontier, render_frontier
from tasks.compare import Snapshot
from tasks.frontier import frontier, group_runs
from tasks.tracking import MLflowTracker, Parent

POINTS = [
    Point("low", "SFT", 0.0, 0.0, 0.1),
    Point("low", "PPO", 4.0, 1.5, 0.9, "ppo.kl_coef 0.05"),
    Point("high", "PPO", 1.0, 1.0, 1.0, "ppo.kl_coef 0.2"),
    Point("low", "DPO", 4.0, 1.5, 1.0),
    Point("low", "best of 4", 0.6, 0.8, 0.5),
    Point("high", "DPO", 9.0, 1.4, 1.1),
]


def test_a_point_is_beaten_by_as_much_at_less_distance_or_more_at_as_much() -> None:
    # By gold: 1.0 at KL 1 beats 0.9 at 4 and 1.0 at 4; 1.1 at 9 is the highest. By proxy 1.5 at 4 stands twice.
    assert on_frontier(POINTS, "gold_reward") == [True, False, True, False, True, True]
    assert on_frontier(POINTS, "reward") == [True, True, True, True, True, False]
    assert on_frontier([POINTS[0], POINTS[0]._replace(reward=0.1)], "reward") == [False, True]
    assert on_frontier([POINTS[0], POINTS[0]], "reward") == [True, True]  # equals beat each other not


def test_the_frontier_rises_with_distance() -> None:
    for judge in ("reward", "gold_reward"):
        best = [point for point, on in zip(POINTS, on_frontier(POINTS, judge), strict=True) if on]
        scores = [getattr(point, judge) for point in sorted(best, key=lambda point: point.kl)]
        assert scores == sorted(scores)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_tells_its_numbers() -> None:
    page = render_frontier([Group("judged alike", POINTS)])
    assert page == render_frontier([Group("judged alike", POINTS)])
    parsed = Tags(page)
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert not re.search(r"https?://", page)
    ids = [value for _, attributes in parsed.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= set(re.findall(r"--(\w+):", page))
    # The best by gold first: DPO of high, which its numbers and the chart's words agree on.
    rows = re.findall(r'<tr class="(.*?)"><td>(\d)</td><th scope="row">(.*?)</th><td>(.*?)<small>', page)
    assert rows == [
        ("", "1", "DPO", "high"), ("", "2", "PPO", "high"), ("", "3", "DPO", "low"), ("", "4", "PPO", "low"),
        ("", "5", "best of 4", "low"), ("", "6", "SFT", "low"),
    ]  # fmt: skip
    assert "1, DPO of high: 1.10 at √KL 3.00" in page
    assert "≤ 0.6" in parsed.text
    assert "scores of one section" not in parsed.text


def test_what_is_beaten_by_both_judges_is_grey() -> None:
    page = render_frontier([Group("", [*POINTS, Point("worse", "PPO", 5.0, 0.1, 0.2)])])
    assert re.findall(r'<tr class="beaten"><td>\d</td><th scope="row">PPO</th><td>(\w+)<', page) == ["worse"]
    assert "worse: " not in page  # has no number in a chart


def test_names_of_runs_are_shown_and_not_run() -> None:
    hostile = "<script>alert(1)</script>{note}"
    page = render_frontier([Group(hostile, [POINTS[0]._replace(run=hostile, settings=hostile)])])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;{note}") >= 3


def snapshot(name: str, *, ppo: float, judge: str = "a", best: bool = False, **params: str) -> Snapshot:
    metrics = {}
    for method, kl, reward in (("sft", 0.0, 0.0), ("ppo", 2.5, ppo)):
        metrics |= {f"evaluate/{method}/kl": kl, f"evaluate/{method}/reward": reward}
        metrics |= {f"evaluate/{method}/gold_reward": reward / 2}
    if best:
        for n in (16, 2):
            metrics |= {f"evaluate/best_of_n/{n}/{key}": n / 10 for key in ("kl", "reward", "gold_reward")}
    metrics["evaluate/base/kl"] = 9.0
    dependencies = {"artifacts/reward": judge * 32, "data/prepared": "d" * 32, "artifacts/sft/model": "s" * 32}
    return Snapshot(name, "here", {"ppo.seed": "0", "evaluate.temperature": "0.7", **params}, metrics, dependencies)


def test_scores_of_other_judges_stand_apart() -> None:
    groups = group_runs([
        snapshot("one", ppo=1.0), snapshot("other judge", ppo=3.0, judge="b"), snapshot("two", ppo=2.0),
        snapshot("warmer", ppo=2.0, **{"evaluate.temperature": "1.0"}),
    ])  # fmt: skip
    assert [[(point.run, point.method) for point in group.points] for group in groups] == [
        [("one", "SFT"), ("one", "PPO"), ("two", "PPO")],  # SFT of run two is that of run one
        [("other judge", "SFT"), ("other judge", "PPO")],
        [("warmer", "SFT"), ("warmer", "PPO")],
    ]
    assert "artifacts/reward aaaaaaaaaa, " in groups[0].conditions
    assert groups[2].conditions.endswith("evaluate.temperature 1.0, evaluate.response_tokens –")
    assert "scores of one section say nothing" in render_frontier(groups).replace("\n", " ")


def test_a_run_is_told_by_the_settings_that_differ() -> None:
    runs = [
        snapshot("one", ppo=1.0, **{"ppo.kl_coef": "0.05"}),
        snapshot("two", ppo=2.0, **{"ppo.kl_coef": "0.2", "evaluate.report_prompts": "3"}),
    ]
    (group,) = group_runs(runs)
    assert [point.settings for point in group.points] == ["ppo.kl_coef 0.05", "ppo.kl_coef 0.05", "ppo.kl_coef 0.2"]


def test_best_of_n_is_read_in_the_order_of_n_and_what_is_no_number_is_left_out() -> None:
    run = snapshot("one", ppo=math.nan, best=True)
    (group,) = group_runs([run])
    assert [(point.method, point.kl) for point in group.points] == [
        ("SFT", 0.0),
        ("best of 2", 0.2),
        ("best of 16", 1.6),
    ]
    assert group_runs([Snapshot("nothing", "here", {}, {}, {})]) == []


# ---- where runs come from


@pytest.fixture
def repo(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", "config", "user.name", "t"], check=True)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("ppo: {seed: 0}\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = True\n")
    sqlite_store(tmp_path / ".rlhf", tmp_path_factory)
    return tmp_path


def record(name: str, run: Snapshot) -> None:
    parent = Parent(f"key:{name}", name, {"rlhf.kind": "pipeline"})
    tracker = MLflowTracker("evaluate", params={}, tags={"rlhf.kind": "stage"}, parent=parent)
    summary: dict[str, Any] = {"params": run.params, "metrics": run.metrics, "run_keys": {}}
    tracker.summary({**summary, "dependencies": run.dependencies})
    assert tracker.close()


def test_all_recorded_runs_stand_on_one_page(repo: Path) -> None:
    with pytest.raises(MissingArtifact, match="None of these runs has been evaluated"):
        frontier([], repo / "out" / "page.html")
    record("low", snapshot("low", ppo=1.0))
    record("again", snapshot("again", ppo=1.0))
    record("high", snapshot("high", ppo=2.0, best=True))
    done = CliRunner().invoke(app, ["frontier"])
    assert done.exit_code == 0, done.output
    assert "5 points, of which by gold reward and KL none beats these:" in done.output
    with (repo / ".rlhf" / "frontier.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["method"], row["on_gold_frontier"]) for row in rows] == [
        ("low", "SFT", "1"), ("low", "PPO", "0"), ("high", "PPO", "0"), ("high", "best of 2", "1"),
        ("high", "best of 16", "1"),
    ]  # fmt: skip
    assert float(rows[1]["root_kl"]) == math.sqrt(2.5)
    page = (repo / ".rlhf" / "frontier.html").read_text(encoding="utf-8")
    assert "again" not in Tags(page).text  # it only took over what the first had computed
    (one,) = frontier(["high"], repo / "one.html")
    assert {point.run for point in one.points} == {"high"}
    assert (repo / "one.csv").is_file()
