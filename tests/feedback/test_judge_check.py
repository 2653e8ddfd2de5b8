"""`rlhf judge-check` on the command line."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import Service
from toy import PROJECT
from typer.testing import CliRunner

from flows import cli, online
from flows.judge import table
from rlhf_core.errors import ConfigError, DataError, JudgeRefused, MissingArtifact
from rlhf_core.feedback.quality import Quality
from rlhf_core.statistics import Interval
from tasks.pipeline import apply_overrides

# The service takes the answer with more "good" in it, and so do these.
ROWS = [
    {"prompt": f"Question {number}?", "responses": ["so so", "good " * (1 + number % 3), "bad"], "ranks": [2, 1, 3]}
    for number in range(25)
]
HH = [
    {
        side: f"\n\nHuman: Question {number}?\n\nAssistant: {word}"
        for side, word in (("chosen", "good"), ("rejected", "bad"))
    }
    for number in range(25)
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    for name, rows in (("data/prepared/rankings_test.jsonl", ROWS), ("hh.jsonl", HH)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("RLHF_JUDGE_KEY", raising=False)
    return tmp_path


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


def check(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["judge-check", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def setting(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("-S", f"judge.{key}={value}")]


def test_an_endpoint_is_measured_and_costs_nothing_the_second_time(project: Path, service: Service) -> None:
    options = setting(kind="endpoint", url=service.url, model="tiny-judge", bar=0.7, prompt_price=1, answer_price=2)
    shown = check(*options)
    # One of three pairs, "so so" beside "bad", is a tie to the service.
    assert "tiny-judge on 75 pairs of 25 prompts" in shown
    assert "agreement with the known answers   83.3% (83.3% to 83.3%)" in shown
    assert "chose what stood first" in shown
    assert "It may judge" in shown
    asked = len(service.requests)
    assert asked == 2 * (75 + 20)  # 20 are asked again
    assert "remembered" in check(*options)
    assert len(service.requests) == asked
    assert (project / ".rlhf" / "judge.db").is_file()


def test_a_round_tells_what_its_judge_takes_and_counts(
    project: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(online, "get_run_logger", lambda: logging.getLogger("round"))
    values = {"kind": "endpoint", "url": service.url, "model": "tiny-judge", "bar": 0, "prompt_price": 1}
    params = apply_overrides([f"judge.{key}={value}" for key, value in values.items()], root=project, keep=False)
    prompt = [{"role": "user", "content": "Question?"}]
    rows = [{"prompt": prompt, "responses": ["good", "bad"]}, {"prompt": prompt, "responses": ["fine", "nice"]}]
    found, counts = online.judge.fn("judge", 1, rows, params)
    assert [row["ranks"] for row in found] == [[1, 2]]
    assert counts == {
        "judge/pairs": 2, "judge/disagreements": 0, "judge/unanswered": 0, "judge/requests": 4, "judge/retries": 0,
        "judge/remembered": 0, "judge/cost": pytest.approx(0.004),
    }  # fmt: skip
    assert "judge    4/4 looks  100 %" in capsys.readouterr().out
    assert online.judge.fn("rule:longest", 1, rows, params)[1] == {}


def test_params_yaml_stays_as_it_is(project: Path) -> None:
    before = (project / "params.yaml").read_bytes()
    check(*setting(kind="rule", model="longest", bar=0))
    assert (project / "params.yaml").read_bytes() == before


def test_a_judge_below_the_bar_is_refused_and_told_why(project: Path) -> None:
    with pytest.raises(JudgeRefused, match="The judge random-0 agrees with"):
        check(*setting(kind="rule", model="random"))
    assert "It may judge" in check(*setting(kind="rule", model="random", bar=0))


def test_other_data_and_fewer_pairs(project: Path) -> None:
    shown = check("hh.jsonl", "--pairs", "10", *setting(kind="rule", model="longest"))
    assert "longest on 10 pairs of 10 prompts" in shown


def test_a_file_is_taken_from_where_the_user_stands(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = setting(kind="rule", model="longest", bar=0)
    workspace = project / ".rlhf" / "tiny"
    workspace.mkdir(parents=True)
    (workspace / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
    assert "on 25 pairs" in check("hh.jsonl", "--recipe", "tiny", *longest)
    (project / "mine").mkdir()
    monkeypatch.chdir(project / "mine")
    (project / "hh.jsonl").rename("mine.jsonl")
    assert "on 25 pairs" in check("mine.jsonl", *longest)
    monkeypatch.chdir(project / "mine")
    with pytest.raises(ConfigError, match="hub:a/b names no revision"):
        check("hub:a/b", *longest)


def test_a_file_that_is_not_there_is_the_commands_to_mend(project: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"none\.jsonl is not there\. Mend the path in the command\."):
        check("none.jsonl", *setting(kind="rule", model="longest"))


def test_a_bad_row_is_named_with_its_line(project: Path) -> None:
    (project / "bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2, row: found fields prompt, expected responses and ranks"):
        check("bad.jsonl", *setting(kind="rule", model="longest"))


def test_before_prepare_the_command_that_helps_is_named(project: Path) -> None:
    (project / "data" / "prepared" / "rankings_test.jsonl").unlink()
    with pytest.raises(MissingArtifact, match="Run `dvc repro prepare`"):
        check(*setting(kind="rule", model="longest"))


def test_a_judge_that_never_decides_has_a_table_too() -> None:
    half, nothing = Interval(0.5, 0.5, 0.5), Interval(float("nan"), 0.0, 1.0)
    found = Quality(9, 3, half, 0.0, nothing, 1.0, Interval(1, 1, 1), half, 0.0, nothing, 0.4, 1.0, half, half, half)
    shown = table("always-first", found, cost=None)
    assert shown.count("none") == 2
    assert "cost" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 120
