"""tasks/compare.py: runs that are recorded, revisions in git, and names of neither."""

import json
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from stores import sqlite_store
from typer.testing import CliRunner

from flows.cli import app
from rlhf_core.errors import MissingArtifact, ResourceError
from tasks.compare import compare
from tasks.tracking import MLflowTracker, Parent, connect, newest_pipeline_runs


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository in which no run was recorded yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "t@t")
    subprocess.run(["git", "init", "--quiet"], check=True)
    (tmp_path / ".gitignore").write_text("/.rlhf/\n")
    return tmp_path


@pytest.fixture
def store(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_store(repo / ".rlhf", tmp_path_factory)


def record(name: str, kl_coef: float, reward: float, data: str) -> None:
    """A pipeline run with one stage."""
    parent = Parent(f"key:{name}", name, {"rlhf.kind": "pipeline"})
    tracker = MLflowTracker("ppo", params={}, tags={"rlhf.kind": "stage"}, parent=parent)
    for step in range(3):
        tracker.metrics({"ppo/kl": kl_coef * step}, step=step)
    tracker.summary(
        {
            "params": {"ppo.kl_coef": str(kl_coef), "ppo.seed": "0"},
            "metrics": {"evaluate/ppo/reward": reward, "evaluate/ppo/kl": 3.0},
            "run_keys": {"ppo": name},
            "dependencies": {"rlhf_core/ppo.py": "c" * 32, "data/starter": data},
        }
    )
    assert tracker.close()


def write_revision(repo: Path, kl_coef: float, reward: float) -> None:
    """A commit as a run leaves it."""
    params = {"ppo": {"kl_coef": kl_coef, "seed": 0}}
    (repo / "params.yaml").write_text(yaml.safe_dump(params))
    (repo / "metrics").mkdir(exist_ok=True)
    (repo / "metrics/ppo.json").write_text(json.dumps({"reward": reward}))
    lock = {"ppo": {"cmd": "x", "deps": [{"path": "data/starter", "md5": "a" * 32 + ".dir"}], "outs": []}}
    (repo / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    subprocess.run(["git", "add", "--all"], check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", str(kl_coef)], check=True)


def rows(text: str) -> dict[str, list[str]]:
    """The cells behind each name."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}


def test_two_recorded_runs_differ_in_parameters_metrics_and_data(store: str) -> None:
    record("low", 0.05, 1.5, "a" * 32 + ".dir")
    record("high", 0.2, 1.25, "b" * 32 + ".dir")
    text = compare("low", "high")
    found = rows(text)
    assert found["ppo.kl_coef"] == ["0.05", "0.2"]
    assert "ppo.seed" not in found
    assert found["evaluate/ppo/reward"] == ["1.5", "1.25", "-0.25"]
    assert found["evaluate/ppo/kl"] == ["3", "3", "+0"]
    assert found["data/starter"] == ["a" * 10, "b" * 10]
    assert "rlhf_core/ppo.py" not in found
    assert text.index("Parameters that differ") < text.index("Final metrics") < text.index("Versions of data")
    high, low = newest_pipeline_runs(2)
    *_, table, curves = (unquote(line) for line in text.splitlines())
    assert f'runs=["{low.run_id}", "{high.run_id}"]' in table
    stages = json.loads(curves.split("runs=")[1].split("&")[0])
    points = [connect().get_metric_history(run, "ppo/kl") for run in stages]
    assert [point.value for run in points for point in run] == [0, 0.05, 0.1, 0, 0.2, 0.4]
    assert compare(low.run_id, high.run_id[:12]) == text == compare() == compare("low")


def test_revisions_are_compared_without_mlflow(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    write_revision(repo, 0.05, 1.5)
    write_revision(repo, 0.2, 1.25)
    found = rows(compare("HEAD~1", "HEAD"))
    assert found["ppo.kl_coef"] == ["0.05", "0.2"]
    assert found["ppo/reward"] == ["1.5", "1.25", "-0.25"]
    assert "Versions of data, code and upstream results that differ: none" in compare("HEAD~1", "HEAD")
    with pytest.raises(ResourceError, match=r"http://127.0.0.1:1 does not answer. Git revisions .* without it"):
        compare("HEAD", "low")


def test_a_recorded_run_is_compared_with_a_revision(repo: Path, store: str) -> None:
    write_revision(repo, 0.05, 1.5)
    record("high", 0.2, 1.25, "b" * 32 + ".dir")
    found = rows(compare("HEAD", "high"))
    assert found["ppo.kl_coef"] == ["0.05", "0.2"]
    assert found["ppo/reward"] == ["1.5", "–"]
    assert found["data/starter"] == ["a" * 10, "b" * 10]


def test_runs_of_a_recipe_are_compared_from_the_projects_folder(
    repo: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT")
    tiny = repo / ".rlhf/tiny"
    for folder in (repo, tiny):
        folder.mkdir(exist_ok=True)
        for name in ("dvc.yaml", "params.yaml"):
            (folder / name).touch()
    monkeypatch.chdir(tiny)
    record("low", 0.05, 1.5, "a" * 32)
    record("high", 0.2, 1.25, "a" * 32)
    monkeypatch.chdir(repo)
    with pytest.raises(MissingArtifact, match="low is no MLflow run"):
        compare("low", "high")
    shown = CliRunner().invoke(app, ["compare", "low", "high", "--recipe", "tiny"])
    assert shown.exit_code == 0, shown.output
    assert rows(shown.output)["ppo.kl_coef"] == ["0.05", "0.2"]


def test_an_unknown_name_lists_what_there_is(store: str) -> None:
    with pytest.raises(MissingArtifact, match="There are no two runs to compare yet; `rlhf run` makes one"):
        compare()
    with pytest.raises(MissingArtifact, match="Nothing has been recorded yet"):
        compare("low", "high")
    record("low", 0.05, 1.5, "a" * 32)
    with pytest.raises(MissingArtifact, match=r"hihg is no MLflow run, .* Newest runs: low \([0-9a-f]{8}\)"):
        compare("low", "hihg")
