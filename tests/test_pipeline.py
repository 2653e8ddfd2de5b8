"""tasks/pipeline.py against a real DVC, in a workspace of five scripts."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from toy import PROJECT, dvc, make_toy

from rlhf_core.config import load_params
from rlhf_core.errors import ConfigError, MissingArtifact, ResourceError
from tasks import pipeline
from tasks.pipeline import Outcome, StageFailed, apply_overrides, apply_recipe, run_stage, workspace_lock


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_toy(tmp_path / "toy")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "seconds", "overrides"),
    [
        ("ppo", 60.0, ["ppo.reward=judge"]),
        ("sft", 0.0, ["ppo.reward=judge"]),
        ("ppo", 0.0, []),
        ("constitution", 60.0, ["constitution.critic=judge"]),
        ("principles", 60.0, ["constitution.annotator=judge"]),
        ("ppo", 0.0, ["ppo.reward=judge", "judge.kind=local", "judge.url=''"]),
    ],
)
def test_a_stage_that_asks_an_endpoint_has_time_to_keep_its_answers(
    tmp_path: Path, stage: str, seconds: float, overrides: list[str]
) -> None:
    (tmp_path / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    endpoint = ["judge.kind=endpoint", "judge.url=http://127.0.0.1:9/v1", "judge.timeout=60"]
    apply_overrides([*endpoint, *overrides], root=tmp_path)
    assert pipeline.grace_of(stage, tmp_path) == pipeline.TERM_GRACE_SECONDS + seconds
    assert pipeline.grace_of(stage, tmp_path / "none") == pipeline.TERM_GRACE_SECONDS


def test_tells_ran_skipped_and_cached_apart(toy: Path) -> None:
    lines: list[str] = []
    assert run_stage("prepare", on_line=lines.append) is Outcome.RAN
    assert "prepare 1/1 steps  100 %" in lines
    assert run_stage("prepare", on_line=lines.append) is Outcome.SKIPPED
    (toy / "artifacts/prepare/out.txt").unlink()
    (toy / "dvc.lock").unlink()
    assert run_stage("prepare", on_line=lines.append) is Outcome.CACHED
    assert (toy / "artifacts/prepare/out.txt").read_text() == "prepare"
    assert run_stage("prepare", force=True, on_line=lines.append) is Outcome.RAN


def test_runs_leave_dvc_status_clean(toy: Path) -> None:
    for stage in pipeline.STAGES:
        run_stage(stage)
    assert "up to date" in dvc(toy, "status")


def test_a_failed_stage_says_its_own_message(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("fail")
    with pytest.raises(
        StageFailed, match=r"^Stage prepare failed: Found 0 rows in train.jsonl, expected some."
    ) as caught:
        run_stage("prepare")
    assert (caught.value.exit_code, caught.value.crashed) == (1, False)
    (toy / "behaviour/prepare").write_text("raise")
    with pytest.raises(StageFailed, match="ZeroDivisionError: of its own"):
        run_stage("prepare")


def test_what_a_launcher_says_after_a_failed_process_is_left_out(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("fail among many")
    said = "Found 0 rows in train.jsonl, expected some. Run `rlhf stage prepare`."
    with pytest.raises(StageFailed) as caught:
        run_stage("prepare")
    assert caught.value.message == said


def test_what_a_launcher_says_of_a_process_that_crashed_is_read() -> None:
    said = [
        "Running stage 'ppo':",
        "> torchrun --nproc_per_node 2 -m tasks.ppo",
        "[rank0]: RuntimeError: Connection closed by peer",
        "E1124 13:48:28 failed (exitcode: -9) local_rank: 1",
        "Root Cause (first observed failure):",
        "[0]:",
        "  exitcode  : -9 (pid: 26447)",
        "============",
        "ERROR: failed to reproduce 'ppo': failed to run: torchrun, exited with 1",
    ]
    failed = pipeline._stage_error("ppo", 1, said)
    assert (failed.exit_code, failed.crashed) == (-9, True)
    assert "SIGKILL. Memory may have run out" in failed.message
    failed = pipeline._stage_error("ppo", 1, [line.replace("-9", "1") for line in said])
    assert (failed.exit_code, failed.message) == (1, "RuntimeError: Connection closed by peer")


def test_a_killed_stage_is_a_crash_and_names_the_signal(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("crash")
    with pytest.raises(StageFailed, match=r"ended by signal SIGKILL. Memory may have run out") as caught:
        run_stage("prepare")
    assert caught.value.crashed


def test_a_stage_without_its_input_says_what_is_missing(toy: Path) -> None:
    with pytest.raises(StageFailed, match=r"artifacts/reward'? is not there. Run the stages before it: `rlhf run`"):
        run_stage("ppo")


def test_a_files_lock_of_another_run_is_named_at_once(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("hang")
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-s", "prepare"], env=pipeline._child_environment(None)
    )
    try:
        wait_for(toy / "hanging")
        began = time.monotonic()
        with pytest.raises(
            ResourceError, match=rf"process {other.pid} \(.*repro -s prepare\) is working on the same files"
        ):
            run_stage("prepare")
        assert time.monotonic() - began < 8
    finally:
        psutil.Process(int((toy / "hanging").read_text())).kill()
        other.wait()


def test_dvcs_own_lock_is_waited_for_a_while_and_its_holder_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LOCK_PATIENCE_SECONDS", 1.0)
    hold = (
        "import zc.lockfile as z, time; lock = z.LockFile('.dvc/tmp/lock'); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResourceError, match=rf"DVC's lock is held by process {other.pid} .* run `rlhf run` again"):
            run_stage("prepare")
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TimeoutError])
def test_an_exception_ends_the_whole_process_group_and_the_last_good_outputs_come_back(
    toy: Path, interrupt: type[BaseException]
) -> None:
    run_stage("prepare")
    (toy / "behaviour/prepare").write_text("hang")

    def interrupted(line: str) -> None:
        if line.startswith("prepare 1/1"):
            wait_for(toy / "hanging")
            raise interrupt

    began = time.monotonic()
    with pytest.raises(interrupt):
        run_stage("prepare", force=True, on_line=interrupted)
    assert is_gone(int((toy / "hanging").read_text()))
    assert (toy / "artifacts/prepare/out.txt").read_text() == "prepare"
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("had", [True, False])
def test_what_does_not_come_back_is_said_where_it_was_there(toy: Path, had: bool) -> None:
    run_stage("prepare")
    shutil.rmtree(toy / ".dvc/cache")
    if not had:  # as in a fresh clone, to which git gives dvc.lock and metrics
        shutil.rmtree(toy / "artifacts/prepare")
    (toy / "behaviour/prepare").write_text("hang")
    lines = []

    def interrupted(line: str) -> None:
        lines.append(line)
        if line.startswith("prepare 1/1"):
            wait_for(toy / "hanging")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("prepare", force=True, on_line=interrupted)
    assert any("What stage prepare left the last time is not back" in line for line in lines) is had


def test_sigterm_to_the_runner_ends_the_stage(toy: Path) -> None:
    (toy / "behaviour/prepare").write_text("hang")
    code = """
        import signal, sys
        from tasks.pipeline import run_stage
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_stage("prepare")
    """
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_for(toy / "hanging")
    runner.terminate()
    assert runner.wait(timeout=10) == 143
    assert is_gone(int((toy / "hanging").read_text()))


def test_a_second_pipeline_run_fails_at_once_and_names_the_first(toy: Path) -> None:
    with (
        workspace_lock(toy),
        pytest.raises(ResourceError, match=rf"Another pipeline run works in .*toy \(process {os.getpid()}\)"),
        workspace_lock(toy),
    ):
        pass
    with workspace_lock(toy):
        pass


def test_overrides_change_params_as_dvc_does(toy: Path) -> None:
    before = (toy / "params.yaml").read_text()
    params = apply_overrides(["ppo.kl_coef=0.1", "params.yaml:prepare.rankings=[a.jsonl,b.jsonl]"])
    assert params == load_params()
    assert params.ppo.kl_coef == 0.1
    assert params.prepare.rankings == ("a.jsonl", "b.jsonl")
    after = (toy / "params.yaml").read_text()
    assert after.splitlines()[0] == before.splitlines()[0]  # comments stay
    assert set(before.split("ppo:")[1].splitlines()) ^ set(after.split("ppo:")[1].splitlines()) == {
        "  kl_coef: 0.05",
        "  kl_coef: 0.1",
    }


def test_an_override_that_changes_nothing_leaves_the_file_alone(toy: Path) -> None:
    before = (toy / "params.yaml").stat()
    apply_overrides(["ppo.kl_coef=0.05"])
    assert (toy / "params.yaml").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.kl_coeff=0.1", r"unknown key ppo\.kl_coeff; did you mean ppo\.kl_coef\?"),
        ("ppo.kl_coef=-1", r"ppo\.kl_coef = -1"),
        ("ppo.kl_coef", r"Cannot read -S ppo\.kl_coef: .* Expected SECTION\.KEY=VALUE"),
        ("ppo.kl_coef=0.1,0.2", r"Cannot read -S ppo\.kl_coef=0\.1,0\.2"),
    ],
)
def test_a_wrong_override_is_explained_and_touches_nothing(toy: Path, override: str, message: str) -> None:
    before = (toy / "params.yaml").read_bytes()
    with pytest.raises(ConfigError, match=message):
        apply_overrides([override])
    assert (toy / "params.yaml").read_bytes() == before
    assert not list(toy.glob(".params-*"))


def test_a_recipe_lays_its_values_over_the_params(toy: Path) -> None:
    params = apply_recipe(PROJECT / "recipes/tiny.yaml")
    overlay = yaml.safe_load((PROJECT / "recipes/tiny.yaml").read_text())
    dumped = json.loads(params.model_dump_json())
    for section, values in overlay.items():
        assert {key: dumped[section][key] for key in values} == values


def test_outside_a_project_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingArtifact, match=r"Found no dvc\.yaml in .* or above it"):
        run_stage("prepare")


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # ended; nobody has read its exit code
    except psutil.NoSuchProcess:
        return True


def wait_for(path: Path, seconds: float = 20) -> None:
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        pause.wait(0.05)


def test_a_failed_stage_gets_its_last_good_outputs_and_metrics_back(toy: Path) -> None:
    run_stage("prepare")
    (toy / "metrics").mkdir(exist_ok=True)
    (toy / "metrics/prepare.json").write_text("{}")
    (toy / "behaviour/prepare").write_text("fail")
    with pytest.raises(StageFailed):
        run_stage("prepare", force=True)
    assert (toy / "artifacts/prepare/out.txt").read_text() == "prepare"
    assert (toy / "metrics/prepare.json").read_text() == "{}"
