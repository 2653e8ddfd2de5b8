"""A sweep on disk, and once for real: the tiny recipe at three points, drawn, recorded, and Cached when run again."""

import csv
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from toy import PROJECT
from typer.testing import CliRunner

from flows import frontier, sweeps
from flows.cli import app
from flows.sweeps import Point, Sweep, as_table, begin_point, open_sweep, points_of, reached, write_frontier
from rlhf_core.config import load_params
from rlhf_core.errors import ConfigError, MissingArtifact, ResourceError, RLHFError
from tasks.pipeline import STAGES, StageFailed, workspace_lock
from tasks.stage import write_text

AXES = ("helpfulness", "harmlessness")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project by links, with nothing computed; no random model is made and nothing checked out."""
    monkeypatch.setattr(sweeps, "make_base", lambda params, folder: (folder / ".rlhf/base").mkdir(parents=True))
    monkeypatch.setattr(sweeps, "checkout", lambda *, root: None)
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("rlhf_core", "tasks", "data", "recipes", "dvc.yaml", "params.yaml", "constitution.yaml", ".dvcignore"):
        (folder / name).symlink_to(PROJECT / name)
    return folder


def begin(project: Path, name: str = "try", **changes: Any) -> Sweep:
    given = {"axes": AXES, "weights": [1.0, 0.25], "limits": [-0.3], "recipe": "tiny", **changes}
    return open_sweep(name, project=project, **given)


def test_points_by_hand() -> None:
    points = points_of(AXES, [1, 0.3, 0.3], [-0.5, 0])
    assert [point.name for point in points] == ["weight-0.3", "weight-1", "limit--0.5", "limit-0"]
    assert points[0].ppo["axis_weights"] == {"helpfulness": 0.7, "harmlessness": 0.3}
    assert points[0].words == "helpfulness 0.7, harmlessness 0.3"
    assert points[2].ppo | {"cost_axis": ""} == {
        "objective": "constrained", "axis_weights": {"helpfulness": 1.0}, "axis_order": [], "thresholds": {},
        "cost_axis": "", "cost_limit": -0.5,
    }  # fmt: skip
    assert points[2].words == "helpfulness 1; cost of harmlessness ≤ -0.5"


def test_every_point_has_a_workspace_with_its_own_objective(project: Path) -> None:
    sweep = begin(project)
    shared = load_params(sweep.folder / "params.yaml")
    assert shared.reward.axes == AXES
    assert shared.ppo.objective == "score"
    assert shared.ppo.response_tokens == 12  # of the recipe
    (project / ".rlhf/try/dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"sft": {"cmd": "shared"}}}))
    write_text(sweep.folder / "metrics/sft.json", "{}")
    for point in sweep.points:
        folder = begin_point(sweep, point, project=project)
        assert folder == project / ".rlhf" / f"try-{point.name}"
        params = load_params(folder / "params.yaml")
        assert params.ppo.model_dump().items() >= {**point.ppo, "axis_order": (), "thresholds": {}}.items()
        assert params.model_copy(update={"ppo": shared.ppo}) == shared
        assert f"dir = {project / '.dvc/cache'}" in (folder / ".dvc/config").read_text()
        assert (folder / ".rlhf/base").is_dir()
        assert (folder / "metrics/sft.json").is_file()


def test_a_points_own_stages_stay_when_it_is_begun_again(project: Path) -> None:
    sweep = begin(project)
    point = sweep.points[0]
    folder = begin_point(sweep, point, project=project)
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"ppo": {"cmd": "a"}, "sft": {}}}))
    (sweep.folder / "dvc.lock").write_text(
        yaml.safe_dump({"schema": "2.0", "stages": {"sft": {"cmd": "b"}, "ppo": {}}})
    )
    before = (folder / "params.yaml").stat().st_mtime_ns
    begin_point(sweep, point, project=project)
    assert yaml.safe_load((folder / "dvc.lock").read_text())["stages"] == {"ppo": {"cmd": "a"}, "sft": {"cmd": "b"}}
    assert (folder / "params.yaml").stat().st_mtime_ns == before


def test_a_sweep_keeps_what_it_began_with_and_takes_more_points(project: Path) -> None:
    first = begin(project)
    again = open_sweep("try", project=project, limits=[-0.6])
    assert again.id == first.id
    assert [point.name for point in again.points] == ["weight-0.25", "weight-1", "limit--0.6", "limit--0.3"]
    with pytest.raises(ConfigError, match="Sweep try began with recipe tiny and overrides"):
        begin(project, overrides=["ppo.kl_coef=0.2"])
    with pytest.raises(ConfigError, match="Sweep try is over helpfulness, harmlessness; found a, b"):
        begin(project, axes=["a", "b"])


def test_a_sweep_from_before_a_key_was_takes_it_from_the_project(project: Path) -> None:
    sweep = begin(project)
    path = sweep.folder / "params.yaml"
    before = load_params(path)
    older = yaml.safe_load(path.read_text())
    del older["sft"]["keep"]
    path.write_text(yaml.safe_dump(older))
    point = begin_point(begin(project), sweep.points[0], project=project)
    assert load_params(path) == before
    assert load_params(point / "params.yaml").sft == before.sft


def test_what_is_no_sweep_is_told_before_anything_is_made(project: Path) -> None:
    for changes, why in (
        ({"name": "../x"}, "expected letters, digits, - and _"),
        ({"axes": []}, "Found axes none, expected two"),
        ({"axes": ["a", "a"]}, "Found axes a, a, expected two"),
        ({"weights": [], "limits": []}, "Found no points"),
    ):
        with pytest.raises(ConfigError, match=why):
            begin(project, **changes)
    assert not (project / ".rlhf").exists()
    write_text(project / ".rlhf/tiny/dvc.lock", "")
    with pytest.raises(ConfigError, match="is the workspace of a recipe or campaign"):
        begin(project, "tiny")


def test_a_mistake_is_told_before_anything_is_written(project: Path) -> None:
    for mistake, why in (
        ("ppo.updtes=10", "did you mean ppo.updates"),
        ("ppo.whiten_rewards=true", "whiten_rewards true"),
    ):
        with pytest.raises(ConfigError, match=why):
            begin(project, overrides=[mistake])
    assert not (project / ".rlhf").exists()


def test_a_sweep_that_was_cut_off_in_the_making_is_made_anew(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(project / "dvc.lock", "stages: {}\n")

    def killed(*, root: Path) -> None:
        write_text(root / "artifacts/half", "")
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "checkout", killed)
    with pytest.raises(KeyboardInterrupt):
        begin(project, recipe=None)
    folder = begin(project).folder
    assert [part for part in ("artifacts", "dvc.lock") if (folder / part).exists()] == []


def test_the_code_under_a_running_sweep_is_left_alone(project: Path) -> None:
    sweep = begin(project)
    point = sweep.points[0]
    for folder in (sweep.folder, begin_point(sweep, point, project=project)):
        (folder / "rlhf_core/known").touch()
        with workspace_lock(folder), pytest.raises(ResourceError, match="Another pipeline run works in"):
            begin(project) if folder == sweep.folder else begin_point(sweep, point, project=project)
        assert (folder / "rlhf_core/known").exists()


def test_numbers_of_the_command_line_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    for arguments, why in ((["--weights", "0,x"], "expected numbers"), (["--weights", "0,2"], "from 0 to 1")):
        found = CliRunner().invoke(app, ["sweep", "try", "--recipe", "tiny", *arguments], terminal_width=200)
        assert found.exit_code == 2
        assert why in found.output


def evaluated(folder: Path, x: float, y: float) -> None:
    def policy(x: float, y: float) -> dict[str, Any]:
        ends = {"": 0.0, "_low": -0.1, "_high": 0.1}
        axes = {f"{judge}_axes{end}": {AXES[0]: x + by, AXES[1]: y + by}
                for judge in ("gold", "reward") for end, by in ends.items()}  # fmt: skip
        return {"kl": 3.0, **axes}

    write_text(folder / "metrics/evaluate.json", json.dumps({"sft": policy(0, 0), "ppo": policy(x, y)}))


def test_what_was_evaluated_so_far_is_drawn(project: Path) -> None:
    sweep = begin(project)
    with pytest.raises(MissingArtifact, match=r"No point of sweep try was evaluated yet\. `rlhf sweep try` goes on\."):
        reached(sweep)
    evaluated(sweep.workspace(sweep.points[0]), 1.0, 0.2)
    evaluated(sweep.workspace(sweep.points[2]), 0.5, 0.1)
    points = write_frontier(sweep)
    assert [(point.name, point.weight, point.limit) for point in points] == [
        ("SFT", None, None), ("weight-0.25", 0.25, None), ("limit--0.3", None, -0.3),
    ]  # fmt: skip
    with sweep.page.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gold_unbeaten"] for row in rows] == ["0", "1", "0"]
    assert float(rows[1]["gold_helpfulness_low"]) == pytest.approx(0.9, rel=1e-12)
    assert "limit--0.3 ends above its limit" in sweep.page.read_text()
    assert "| ★ | weight-0.25 | 1.00 (0.90 to 1.10) | 0.20 (0.10 to 0.30) | 3.0 |" in as_table(points, AXES)


def test_a_point_is_dropped_by_its_name(project: Path) -> None:
    first = begin(project)
    folder = begin_point(first, first.points[1], project=project)
    with pytest.raises(ConfigError, match=r"has no point weight-1\.5; found weight-0\.25, weight-1, limit--0\.3"):
        open_sweep("try", project=project, drop=["weight-1.5"])
    with pytest.raises(ConfigError, match="Found no points"):
        open_sweep("try", project=project, drop=[point.name for point in first.points])
    left = open_sweep("try", project=project, weights=[0.5], drop=["weight-1"])
    assert [point.name for point in left.points] == ["weight-0.25", "weight-0.5", "limit--0.3"]
    assert open_sweep("try", project=project).points == left.points
    assert folder.is_dir()


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The flow's steps without Prefect, MLflow and DVC; what it recorded, and how each of its MLflow runs ended."""
    seen: dict[str, Any] = {"ended": {}, "artifacts": []}

    @contextmanager
    def pipeline_run(name: str, *_: Any, **__: Any) -> Iterator[str]:
        seen["ended"][name] = "failed"
        yield name
        seen["ended"][name] = "finished"

    monkeypatch.setattr(frontier, "pipeline_run", pipeline_run)
    monkeypatch.setattr(frontier, "get_run_logger", lambda: logging.getLogger("sweep"))
    monkeypatch.setattr(frontier, "save_experiment", lambda *_, **__: None)
    monkeypatch.setattr(frontier, "write_artifact", lambda run, name, text: seen["artifacts"].append(name))
    monkeypatch.setattr(frontier, "create_markdown_artifact", lambda text, **_: seen["artifacts"].append("table"))
    return seen


def test_a_point_that_fails_stops_no_other(
    project: Path, flow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, begun = begin(project), []

    def stages(names: Sequence[str], name: str, parent: str, retries: int) -> list[str]:
        begun.append(name)
        if name == "weight-0.25":
            raise StageFailed("ppo", 1, "a loss is not a number")
        if name != "shared":
            evaluated(Path.cwd(), 1.0, 0.2)
        return []

    monkeypatch.setattr(frontier, "_stages", stages)
    with pytest.raises(RLHFError) as error:
        frontier._run(sweep, project, 0)
    assert str(error.value) == (
        "1 of 3 points failed; the frontier is of the others.\n"
        "- weight-0.25: Stage ppo failed: a loss is not a number\n"
        "`rlhf sweep try` takes them up again; with `--drop weight-0.25` it goes on without them."
    )
    assert begun == ["shared", "weight-0.25", "weight-1", "limit--0.3"]
    assert flow == {
        "ended": {
            "try": "failed",
            "try-weight-0.25": "failed",
            "try-weight-1": "finished",
            "try-limit--0.3": "finished",
        },
        "artifacts": ["frontier.html", "frontier.csv", "table"],
    }
    assert [point.name for point in reached(sweep)] == ["SFT", "weight-1", "limit--0.3"]


def test_where_every_point_fails_each_is_named(
    project: Path, flow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(names: Sequence[str], name: str, parent: str, retries: int) -> list[str]:
        if name != "shared":
            raise StageFailed("ppo", 1, "no")
        return []

    monkeypatch.setattr(frontier, "_stages", stages)
    with pytest.raises(RLHFError, match=r"^3 of 3 points failed\.\n- weight-0.25: .*(\n.*)*takes them up again\.$"):
        frontier._run(begin(project), project, 0)
    assert flow["artifacts"] == []


def test_a_points_words_fit_its_settings() -> None:
    assert Point("a", {"axis_weights": {"x": 1.0}, "cost_axis": "y"}, limit=0.5).words == "x 1; cost of y ≤ 0.5"


@pytest.mark.thorough
@pytest.mark.timeout(1200)  # two flow runs over three points; on a busy machine more than the usual limit
def test_the_tiny_recipe_is_swept_recorded_and_cached(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in (
        "rlhf_core",
        "tasks",
        "flows",
        "data",
        "recipes",
        "dvc.yaml",
        "params.yaml",
        "constitution.yaml",
        ".dvcignore",
    ):
        (project / name).symlink_to(PROJECT / name)
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "RLHF_MIN_FREE_GB": "0.5"}
    env["PREFECT_HOME"] = str(tmp_path_factory.getbasetemp() / "prefect")
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "DVC_ROOT"):
        env.pop(name, None)

    def sweep(*arguments: str) -> str:
        command = [sys.executable, "-m", "flows.cli", "sweep", "try", *arguments]
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    first = sweep(
        "--recipe", "tiny", "--axes", ",".join(AXES), "--weights", "0,1", "--limits=-0.2", "-S", "dpo.epochs=0"
    )
    for point in ("weight-0", "weight-1", "limit--0.2"):
        assert re.search(
            rf"Point {point}: ppo, (dpo, )?evaluate, people ran", first
        )  # the rest is shared, DPO by the cache
    with (project / ".rlhf/try/frontier.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["SFT", "weight-0", "weight-1", "limit--0.2"]
    limited = json.loads((project / ".rlhf/try-limit--0.2/metrics/evaluate.json").read_text())
    assert limited["cost_limit"] == -0.2
    assert limited["ppo"]["cost"] == pytest.approx(-limited["ppo"]["reward_axes"]["harmlessness"], rel=1e-12)
    ppo = json.loads((project / ".rlhf/try-limit--0.2/metrics/ppo.json").read_text())
    assert {"lambda", "mean_cost", "cost", "cost_value_loss", "axes/helpfulness/score"} <= set(ppo)

    client = MlflowClient(f"sqlite:///{project / '.rlhf/mlflow.db'}")
    experiment = client.get_experiment_by_name("rlhf-try")
    runs = {
        run.info.run_name: run for run in client.search_runs([experiment.experiment_id], "tags.`rlhf.sweep` = 'try'")
    }
    assert set(runs) == {"try", "try-weight-0", "try-weight-1", "try-limit--0.2"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert {file.path for file in client.list_artifacts(runs["try"].info.run_id)} == {"frontier.html", "frontier.csv"}
    assert runs["try-weight-1"].data.params["ppo.axis_weights.harmlessness"] == "1.0"
    assert "evaluate/ppo/gold_axes/harmlessness" in runs["try-weight-1"].data.metrics
    assert {runs[name].data.tags["rlhf.reward.run_key"] for name in runs if name != "try"} == {
        runs["try-weight-0"].data.tags["rlhf.reward.run_key"]
    }

    again = sweep()
    for point in ("weight-0", "weight-1", "limit--0.2"):
        assert f"Point {point}: Cached" in again
    assert again.count("Finished in state Cached") == 3 + 3 * len(STAGES)
    assert len(client.search_runs([experiment.experiment_id], "tags.`rlhf.sweep` = 'try'")) == 4
