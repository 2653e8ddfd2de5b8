"""tasks/stage.py: what a stage leaves behind when it ends well, fails, or is stopped."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from mlflow.entities import Run
from safetensors.torch import load_file
from stores import PROJECT, sqlite_store
from toy import dvc, init_dvc

from flows.server import prepare_prefect
from rlhf_core import checkpoints
from rlhf_core.checkpoints import Checkpoints, LoopState
from rlhf_core.errors import DataError, ResourceError, TrainingDiverged
from tasks import stage as stage_module
from tasks.environment import prepare_environment, project_root, state_folder, workspace_root
from tasks.lineage import StageEntry, locked_key
from tasks.stage import History, check_disk, forget_checkpoints, stage_run, write_json, write_text
from tasks.tracking import connect, experiment_id, experiment_name, tracking_uri


@pytest.fixture
def project(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml, an MLflow store, and no DVC."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "RLHF_PARENT_RUN_ID", "RLHF_FLOW_RUN_ID", "RANK", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("RLHF_MIN_FREE_GB", "0")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    sqlite_store(tmp_path / ".rlhf", tmp_path_factory)
    return tmp_path


def recorded() -> list[Run]:
    """All runs of the default store, oldest first."""
    client = connect()
    return list(client.search_runs([experiment_id(client)], order_by=["start_time ASC"]))


def of_stage(stage: str) -> Run:
    (run,) = [run for run in recorded() if run.data.tags.get("rlhf.stage") == stage]
    return run


def ends_of(stage: str) -> list[str]:
    return [run.info.status for run in recorded() if run.data.tags.get("rlhf.stage") == stage]


def test_a_stage_writes_its_metrics_and_curve_and_records_them(project: Path) -> None:
    with stage_run("ppo", torch=False) as run:
        assert run.params.ppo.kl_coef == 0.05
        for step in range(3):
            run.tracker.metrics({"ppo/kl": step / 3, "ppo/tokens_per_second": time.time()}, step=step)
        run.finish_metrics({"kl": 0.7, "policy": {"reward": 1.5}, "gap": float("nan")})
    text = (project / "metrics/ppo.json").read_text()
    assert text == '{\n  "gap": null,\n  "kl": 0.7,\n  "policy": {\n    "reward": 1.5\n  }\n}\n'
    assert (project / "plots/ppo.csv").read_text() == f"step,ppo/kl\n0,0.0\n1,{1 / 3!r}\n2,{2 / 3!r}\n"
    ppo = of_stage("ppo")
    assert ppo.info.status == "FINISHED"
    assert ppo.data.params["ppo.kl_coef"] == "0.05"
    assert all(name.startswith("ppo.") for name in ppo.data.params)
    assert ppo.data.metrics["ppo/policy/reward"] == 1.5
    assert ppo.data.metrics["ppo/kl"] == 2 / 3  # the curve's last point: the final figure of this name is the parent's
    (parent,) = [run for run in recorded() if run.info.run_id == ppo.data.tags["mlflow.parentRunId"]]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["sft.epochs"] == str(run.params.sft.epochs)
    assert ppo.info.run_name == f"ppo · {parent.info.run_name}"


def test_the_users_mistake_is_one_message_and_exit_1(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, stage_run("sft", torch=False):
        raise DataError("train.jsonl:3: Found no response.")
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "sft: train.jsonl:3: Found no response.\n"
    assert of_stage("sft").info.status == "FAILED"
    assert not (project / "metrics").exists()


def test_under_bare_dvc_a_failed_stage_tells_how_to_get_back_what_dvc_took(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = {"schema": "2.0", "stages": {"sft": {"cmd": "x", "outs": [{"path": "artifacts/sft/model"}]}}}
    (project / "dvc.lock").write_text(yaml.safe_dump(lock))
    monkeypatch.setattr(stage_module, "_dvc_process", psutil.Process)

    def fail() -> str:
        with pytest.raises(SystemExit), stage_run("sft", torch=False):
            raise DataError("no rows.")
        return capsys.readouterr().err

    assert fail().startswith(
        "sft: no rows.\nDVC took away what sft left the last time. `dvc checkout sft` brings it back"
    )
    monkeypatch.setenv("RLHF_PUTS_BACK", "1")
    assert fail() == "sft: no rows.\n"
    monkeypatch.delenv("RLHF_PUTS_BACK")
    (project / "artifacts/sft/model").mkdir(parents=True)
    assert fail() == "sft: no rows.\n"
    (project / "dvc.lock").unlink()
    assert fail() == "sft: no rows.\n"


def test_a_mistake_of_ours_keeps_its_traceback(project: Path) -> None:
    with pytest.raises(ZeroDivisionError), stage_run("sft", torch=False):
        raise ZeroDivisionError
    assert of_stage("sft").info.status == "FAILED"


def test_a_full_disk_is_said_plainly(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), stage_run("sft", torch=False):
        raise OSError(28, "No space left on device", "artifacts/sft/model.safetensors")
    assert capsys.readouterr().err == "sft: The disk is full (artifacts/sft/model.safetensors); free some space.\n"


def test_the_batch_that_training_stopped_at_is_kept(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids_BS = torch.arange(6).reshape(2, 3)
    with pytest.raises(SystemExit), stage_run("sft", torch=False):
        raise TrainingDiverged("The loss of sft is nan.", {"ids_BS": ids_BS, "turned": ids_BS.T})
    said = "sft: The loss of sft is nan. The batch it came from is in .rlhf/diverged/sft.safetensors.\n"
    assert capsys.readouterr().err == said
    kept = load_file(project / ".rlhf/diverged/sft.safetensors")
    assert torch.equal(kept["ids_BS"], ids_BS)
    assert torch.equal(kept["turned"], ids_BS.T)


@pytest.mark.parametrize(
    ("dep", "said"),
    [
        ("artifacts/sft/model", "ppo: artifacts/sft/model is missing. Run `dvc repro sft`"),
        ("artifacts/base", "ppo: artifacts/base is missing. Run `dvc repro prepare`"),
        ("data/prepared", "ppo: data/prepared is missing. Run `dvc repro prepare`"),
    ],
)
def test_a_missing_input_names_the_stage_that_writes_it(
    project: Path, capsys: pytest.CaptureFixture[str], dep: str, said: str
) -> None:
    with pytest.raises(SystemExit) as exit_, stage_run("ppo", deps=[dep], torch=False):
        raise AssertionError("never reached")
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith(said)
    assert recorded() == []


def test_a_wrong_parameter_stops_before_anything_is_recorded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (project / "params.yaml").read_text().replace("kl_coef:", "kl_coeff:")
    (project / "params.yaml").write_text(text)
    with pytest.raises(SystemExit), stage_run("ppo", torch=False):
        raise AssertionError("never reached")
    assert "did you mean ppo.kl_coef?" in capsys.readouterr().err
    assert recorded() == []


def test_little_disk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_MIN_FREE_GB", "1e9")
    with pytest.raises(ResourceError, match=r"GB are free .* a stage needs 1e\+09 GB"):
        check_disk()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_stage_is_marked_killed(project: Path, number: signal.Signals) -> None:
    code = """
import time
from tasks.stage import stage_run
with stage_run("ppo", torch=False) as run:
    run.tracker.metrics({"ppo/kl": 1.0}, step=0)
    print("ready", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert f"ppo was stopped by {number.name}" in said
    assert "Traceback" not in said
    assert of_stage("ppo").info.status == "KILLED"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_stopped_saves_what_is_done_first(
    project: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "LARGEST_SHARE", 1e-9)  # one checkpoint, and then none for days
    done: list[int] = []

    def training() -> None:
        with stage_run("ppo", torch=False) as run:
            saved = Checkpoints(tmp_path / "saved", unsaved=run.checkpoints.unsaved)
            for step in range(1, 9):
                done.append(step)
                if step == 4:
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, after the terminal's
                saved.offer(step, LoopState({}, {}), {"step": step})

    with pytest.raises(SystemExit) as exit_:
        training()
    assert exit_.value.code == 128 + number
    assert done == [1, 2, 3, 4]
    assert Checkpoints(tmp_path / "saved").restore(LoopState({}, {})) == {"step": 4}
    assert of_stage("ppo").info.status == "KILLED"


def test_a_stage_that_is_stopped_waits_for_no_step_for_ever(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "STOP_PATIENCE_SECONDS", 0.1)

    def training() -> None:
        with stage_run("ppo", torch=False) as run:
            run.checkpoints.unsaved.steps = True
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    before, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(SystemExit):
        training()
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGALRM) == before


def test_signal_handlers_are_given_back(project: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stage_run("ppo", torch=False):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_stage_that_fails_leaves_the_metrics_of_its_last_good_run(project: Path) -> None:
    (project / "metrics").mkdir()
    (project / "metrics/ppo.json").write_text('{"kl": 1}')

    def failing() -> None:
        with stage_run("ppo", torch=False) as run:
            run.finish_metrics({"kl": 2.0})
            raise DataError("after all")

    with pytest.raises(SystemExit):
        failing()
    assert (project / "metrics/ppo.json").read_text() == '{"kl": 1}'


def test_a_file_is_a_dependency_if_dvc_watches_it_or_a_folder_above(keyed: Path) -> None:
    with stage_run("ppo", torch=False) as run:
        assert run.is_dependency("data/starter/prompts.jsonl")
        assert run.is_dependency("data/mine.jsonl")
        assert not run.is_dependency("data/other.jsonl")
        assert not run.is_dependency("data/starter.jsonl")


def test_outside_of_dvc_every_file_is_read_anew(project: Path) -> None:
    with stage_run("ppo", torch=False) as run:
        assert run.is_dependency("data/other.jsonl")


def test_helper_processes_of_a_launch_report_nothing(keyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = keyed.parents[2]
    monkeypatch.setenv("RANK", "1")
    with stage_run("ppo", torch=False) as run:
        assert not run.main
        assert not run.checkpoints.writes  # but they go on from those that the first process wrote
        assert run.checkpoints.folder == keyed / ("ab" * 8)
        run.tracker.metrics({"ppo/kl": 1.0}, step=0)
        run.log_dataset("prompts", "data")
        run.register_model("policy", "artifacts/ppo")
        run.finish_metrics({"kl": 1.0})
    assert not (project / "metrics").exists()
    assert recorded() == []


def test_a_flow_run_is_the_parent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    parent = client.create_run(experiment_id(client), run_name="flow").info.run_id
    monkeypatch.setenv("RLHF_PARENT_RUN_ID", parent)
    monkeypatch.setenv("RLHF_FLOW_RUN_ID", "f-1")
    with stage_run("sft", torch=False) as run:
        run.finish_metrics({"perplexity": 9.0})
    sft = of_stage("sft")
    tags = sft.data.tags
    assert (tags["mlflow.parentRunId"], tags["rlhf.door"], tags["rlhf.flow_run_id"]) == (parent, "flow", "f-1")
    assert client.get_run(parent).info.status == "RUNNING"  # the flow ends it


# Resuming


def test_a_resumed_stage_writes_the_whole_curve(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    straight, killed = History(None), History(path)
    for step in range(6):
        straight.add(step, {"ppo/kl": step / 7, "ppo/seconds": 1.0, "ppo/update_seconds": time.time()})
    for step in range(4):
        killed.add(step, {"ppo/kl": step / 7})
    with path.open("a") as file:
        file.write('[4, {"ppo/k')  # cut short by the kill
    resumed = History(path)
    replayed = resumed.add(2, {"ppo/kl": 2 / 7})  # its last checkpoint was written after step 1
    assert replayed == [(0, {"ppo/kl": 0.0}), (1, {"ppo/kl": 1 / 7})]
    for step in range(3, 6):
        assert resumed.add(step, {"ppo/kl": step / 7}) == []
    again = History(path)  # killed once more, at the very end
    assert [step for step, _ in again.add(5, {"ppo/kl": 5 / 7})] == [0, 1, 2, 3, 4]
    assert path.read_text().count("\n") == 4 + 1 + 4 + 1
    rows = list(csv.reader(resumed.csv().splitlines()))
    assert rows == list(csv.reader(again.csv().splitlines()))
    assert [row[:2] for row in csv.reader(straight.csv().splitlines())] == rows
    assert straight.csv().splitlines()[0] == "step,ppo/kl"


def test_what_a_judge_counted_is_in_no_file_that_dvc_tracks() -> None:
    history = History(None)
    history.add(1, {"ppo/kl": 0.5})
    before = history.csv()
    history.add(2, {"judge/pairs": 3.0})
    assert history.csv() == before


def test_a_curve_that_was_complete_before_the_kill_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    killed = History(path)
    for step in range(5):
        killed.add(step, {"reward/loss": step / 7})
    killed.add(0, {"reward/gold_loss": 0.5})
    resumed = History(path)  # the second model is trained anew, the first was done
    assert resumed.add(0, {"reward/gold_loss": 0.25}) == []
    assert resumed.rest() == [(step, {"reward/loss": step / 7}) for step in range(5)]
    assert resumed.rest() == []
    assert resumed.steps[0] == {"reward/gold_loss": 0.25, "reward/loss": 0.0}


@pytest.fixture
def keyed(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stages here have a run key, as under DVC; the folder of ppo's checkpoints."""
    entry = StageEntry("ppo", "ab" * 32, {"data/starter": "1.dir", "data/mine.jsonl": "2"})
    monkeypatch.setattr(stage_module, "_lineage", lambda stage: (SimpleNamespace(recorded=lambda key: False), entry))
    return project / ".rlhf/checkpoints/ppo"


def test_checkpoints_wait_for_the_next_try_and_go_when_the_stage_is_done(keyed: Path) -> None:
    def stopped() -> None:
        with stage_run("ppo", torch=False) as run:
            folder = run.checkpoints.folder
            assert folder == keyed / ("ab" * 8)
            assert run.checkpoints.below("gold").folder == folder / "gold"
            (folder / "step-00000001").mkdir(parents=True)
            raise DataError("stopped")

    with pytest.raises(SystemExit):
        stopped()
    with stage_run("ppo", torch=False) as run:
        assert (keyed / ("ab" * 8) / "step-00000001").is_dir()
        run.tracker.metrics({"ppo/kl": 0.5}, step=2)
    assert list(keyed.iterdir()) == []


def test_without_a_run_key_nothing_is_saved(project: Path) -> None:
    with stage_run("ppo", torch=False) as run:
        assert run.checkpoints.folder is None


def test_of_other_configurations_the_newest_wait(keyed: Path) -> None:
    for age, name in enumerate(["newest", "new", "old", "oldest"]):
        (keyed / name).mkdir(parents=True)
        os.utime(keyed / name, (time.time() - age * 60,) * 2)
    with stage_run("ppo", torch=False):
        assert {path.name for path in keyed.iterdir()} == {"ab" * 8, "newest", "new"}
    (keyed.parent / "sft" / "other").mkdir(parents=True)
    forget_checkpoints(["ppo", "dpo"])
    assert list(keyed.iterdir()) == []
    assert (keyed.parent / "sft" / "other").is_dir()  # its own stage was not asked for


def test_checkpoints_that_another_run_writes_are_left_alone(keyed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, others = keyed / ("ab" * 8), [keyed / name for name in ("used", "new", "old", "oldest")]
    for age, folder in enumerate([own, *others]):
        (folder / "step-00000001").mkdir(parents=True)
        os.utime(folder, (time.time() - age * 60,) * 2)
    with FileLock(keyed / "used" / "lock"):
        os.utime(keyed / "used", (time.time() - 9 * 60,) * 2)
        with stage_run("ppo", torch=False) as run:  # "used" is the oldest
            assert run.checkpoints.folder == own
            assert {path.name for path in keyed.iterdir()} == {own.name, "used", "new", "old"}
            forget_checkpoints(["ppo"])
            assert {path.name for path in keyed.iterdir()} == {own.name, "used"}
            assert (own / "step-00000001").is_dir()
        assert {path.name for path in keyed.iterdir()} == {"used"}
    (own / "step-00000001").mkdir(parents=True)
    with FileLock(own / "lock"), stage_run("ppo", torch=False) as run:
        assert run.checkpoints.folder is None
        run.tracker.metrics({"ppo/kl": 0.5}, step=2)
    assert [path.name for path in own.iterdir() if path.name != "lock"] == ["step-00000001"]
    assert "another run too" in capsys.readouterr().out


def test_several_processes_do_not_share_the_work_of_another_run(
    keyed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stage_module, "_die_with_the_launcher", lambda: None)
    own = keyed / ("ab" * 8)
    own.mkdir(parents=True)

    def run() -> None:
        with FileLock(own / "lock"), stage_run("ppo", torch=False):
            raise AssertionError("it began")

    with pytest.raises(SystemExit):
        run()
    assert "is being computed by another run with the same values" in capsys.readouterr().err


def test_a_run_that_saved_nothing_leaves_nothing(keyed: Path) -> None:
    def stopped() -> None:
        with stage_run("ppo", torch=False):
            raise DataError("stopped")

    with pytest.raises(SystemExit):
        stopped()
    assert list(keyed.iterdir()) == []


# Files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.json"
    write_json(path, {"b": [1.0, float("inf")], "a": {"c": 1}})
    assert json.loads(path.read_text()) == {"a": {"c": 1}, "b": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert json.loads(path.read_text()) == {"a": {"c": 1}, "b": [1.0, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]


# Environment


def test_memory_that_is_freed_is_not_asked_for_again() -> None:
    # Of twenty blocks the middle one counts: the first ones still find places that were never used.
    code = """
import resource, statistics, torch
from tasks.stage import set_up_torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pages():
    before = faults()
    torch.empty(8, 1 << 20).fill_(1.0)  # 32 MiB
    return faults() - before
before = [pages() for _ in range(20)]
set_up_torch()
print(int(statistics.median(before)), int(statistics.median(pages() for _ in range(20))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    before, after = map(int, done.stdout.split())
    assert before > 1000  # pages of 4 KiB, or fewer where the system makes them larger
    assert after < 100


def test_every_switch_is_set_and_a_persons_choices_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.update({"DO_NOT_TRACK": "0", "MPLBACKEND": "svg", "PATH": "/usr/bin"})
    os.environ.pop("HF_HUB_OFFLINE", None)
    prepare_environment()
    prepare_environment()
    assert os.environ["DO_NOT_TRACK"] == "true"
    assert os.environ["MPLBACKEND"] == "svg"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"


def test_state_lies_in_the_repository_and_work_in_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner" / "deep"
    inner.mkdir(parents=True)
    (tmp_path / "inner/dvc.yaml").touch()
    monkeypatch.chdir(inner)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert project_root() == workspace_root() == tmp_path / "inner"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert (project_root(), workspace_root()) == (tmp_path, tmp_path / "inner")


def test_a_recipes_runs_stand_beside_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", "")
    workspace = tmp_path / ".rlhf" / "tiny"
    workspace.mkdir(parents=True)
    for folder, experiment in ((tmp_path, "rlhf"), (workspace, "rlhf-tiny")):
        (folder / "dvc.yaml").touch()
        monkeypatch.chdir(folder)
        monkeypatch.delenv("PREFECT_HOME")
        assert experiment_name() == experiment
        assert tracking_uri() == f"sqlite:///{tmp_path}/.rlhf/mlflow.db"
        assert prepare_prefect(folder) == tmp_path / ".rlhf/prefect"
        assert state_folder() == folder / ".rlhf"  # checkpoints and the outbox stay its own


# Under DVC

STAGE = """
import os, signal, sys
from pathlib import Path
from tasks.stage import _dvc_process, stage_run
name, upstream = sys.argv[1:]
with stage_run(name, deps=[upstream], torch=False) as run:
    run.log_dataset("starter", upstream, rows=1)
    run.tracker.metrics({f"{name}/loss": 0.5}, step=0)
    out = Path("artifacts", name)
    out.mkdir(parents=True)
    (out / "weights").write_text(f"{name} {run.params.ppo.kl_coef if name == 'ppo' else ''}")
    run.register_model(name, out, {"loss": 0.5})
    run.finish_metrics({"accuracy": 0.75})
    Path("seen").write_text(" ".join(sorted(p.name for p in Path(".rlhf/checkpoints").rglob("step-*"))))
    run.checkpoints.folder.joinpath(f"step-{name}").mkdir(parents=True, exist_ok=True)
if Path("kill").exists():
    Path("kill").unlink()
    _dvc_process().send_signal(signal.SIGKILL)
"""


@pytest.fixture
def two_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository with the stages sft and ppo, each of them STAGE."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (project / "stage.py").write_text(STAGE)
    (project / "data").mkdir()
    (project / "data/a").write_text("a")
    stages = {
        stage: {
            "cmd": f"python stage.py {stage} {upstream}",
            "deps": [upstream],
            "params": [stage],
            "outs": [f"artifacts/{stage}"],
            "metrics": [{f"metrics/{stage}.json": {"cache": False}}],
            "plots": [f"plots/{stage}.csv"],
        }
        for stage, upstream in (("sft", "data"), ("ppo", "artifacts/sft"))
    }
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    init_dvc(project)
    return project


@pytest.mark.slow
def test_a_run_that_ended_well_but_was_lost_before_dvc_had_it_gives_way_to_the_next(two_stages: Path) -> None:
    (two_stages / "kill").touch()
    with pytest.raises(subprocess.CalledProcessError):
        dvc(two_stages, "repro")
    assert of_stage("sft").info.status == "FINISHED"  # and gone from the disk with the next run
    dvc(two_stages, "repro", "sft")
    assert (two_stages / "seen").read_text() == "step-sft"  # it goes on from what the lost run had saved
    assert ends_of("sft") == ["KILLED", "FINISHED"]
    dvc(two_stages, "repro", "--force", "sft")  # this one DVC has, so it stands, and the next one starts anew
    assert (two_stages / "seen").read_text() == ""
    assert ends_of("sft")[1:] == ["FINISHED", "FINISHED"]
    dvc(two_stages, "repro")
    assert (two_stages / "seen").read_text() == ""  # sft's are removed


@pytest.mark.slow
def test_stages_of_one_dvc_repro_share_a_parent_with_full_lineage(two_stages: Path) -> None:
    project = two_stages
    dvc(project, "repro")
    sft, ppo = of_stage("sft"), of_stage("ppo")
    client = connect()
    parent = client.get_run(ppo.data.tags["mlflow.parentRunId"])
    assert sft.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert len(recorded()) == 3
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    for run, stage, dep in ((sft, "sft", "data"), (ppo, "ppo", "artifacts/sft")):
        tags = run.data.tags
        assert (tags["rlhf.stage"], tags["rlhf.door"], tags["rlhf.run_key"]) == (stage, "dvc", locked_key(stage))
        assert tags[f"rlhf.dep.{dep}"] == lock[stage]["deps"][0]["md5"]
        assert run.inputs.dataset_inputs[0].dataset.digest == lock[stage]["deps"][0]["md5"]
        assert parent.data.tags[f"rlhf.{stage}.run_id"] == run.info.run_id
        version = client.get_model_version_by_alias(stage, "current")
        assert (
            version.tags["rlhf.dvc_hash"]
            == next(o for o in lock[stage]["outs"] if o["path"] == f"artifacts/{stage}")["md5"]
        )
    assert parent.data.metrics == {"sft/accuracy": 0.75, "ppo/accuracy": 0.75}
    assert parent.info.status == "FINISHED"

    # One parameter changes: only ppo runs, and the new pipeline run names who computed sft.
    text = (project / "params.yaml").read_text().replace("kl_coef: 0.05", "kl_coef: 0.2")
    (project / "params.yaml").write_text(text)
    dvc(project, "repro")
    newest = [run for run in recorded() if run.data.tags["rlhf.kind"] == "pipeline"][-1]
    assert newest.info.run_id != parent.info.run_id
    assert newest.data.params["ppo.kl_coef"] == "0.2"
    assert newest.data.metrics == {"sft/accuracy": 0.75, "ppo/accuracy": 0.75}
    tags = newest.data.tags
    assert (tags["rlhf.sft.run_id"], tags["rlhf.sft.cached"]) == (sft.info.run_id, "true")
    assert tags["rlhf.ppo.cached"] == "false"
