"""What a DVC that was killed leaves, and what becomes of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import zc.lockfile
from toy import dvc, make_toy

from tasks.mending import mend
from tasks.pipeline import Outcome, run_stage


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_toy(tmp_path / "toy")
    monkeypatch.chdir(folder)
    run_stage("prepare")
    return folder


@pytest.mark.parametrize("name", [".dvc/tmp/rwlock", "dvc.lock"])
def test_a_file_that_a_killed_dvc_left_cut_off_stops_no_run(ran: Path, name: str) -> None:
    whole = (ran / name).read_text()
    cut = '{"write": {"' if name.endswith("rwlock") else whole[: whole.index("params:") + 3]
    (ran / name).write_text(cut)
    refused = subprocess.run([sys.executable, "-m", "dvc", "repro", "prepare"], cwd=ran, capture_output=True)
    assert refused.returncode  # what bare DVC says to it
    lines: list[str] = []
    assert run_stage("prepare", on_line=lines.append) in (Outcome.SKIPPED, Outcome.CACHED)
    assert any("was cut off when DVC was killed" in line for line in lines)
    assert "up to date" in dvc(ran, "status", "prepare")
    assert (ran / ".dvc/tmp" / f"{Path(name).name}.cut-off").read_text() == cut
    assert (ran / "dvc.lock").read_text() == whole or name.endswith("rwlock")
    assert mend(ran) == []


@pytest.mark.parametrize("text", ["", "schema: '2.0'\nstages:\n  prepare:\n    cmd: pyth\n    deps"])
def test_wherever_it_was_cut_off(ran: Path, text: str) -> None:
    (ran / "dvc.lock").write_text(text)
    assert len(mend(ran)) == 1


def test_what_is_whole_is_left_alone(ran: Path) -> None:
    held = {"write": {"data": {"pid": 1, "cmd": "dvc repro"}}}
    (ran / ".dvc/tmp/rwlock").write_text(json.dumps(held))
    before = (ran / "dvc.lock").read_bytes()
    assert mend(ran) == []
    assert json.loads((ran / ".dvc/tmp/rwlock").read_text()) == held
    assert (ran / "dvc.lock").read_bytes() == before


def test_a_file_that_dvc_is_writing_is_left_alone(ran: Path) -> None:
    (ran / ".dvc/tmp/rwlock").write_text("")
    writing = zc.lockfile.LockFile(str(ran / ".dvc/tmp/rwlock.lock"))
    assert mend(ran) == []
    writing.close()
    assert len(mend(ran)) == 1


def test_a_conflict_of_git_is_left_to_its_owner(ran: Path) -> None:
    conflict = f"<<<<<<< HEAD\n{(ran / 'dvc.lock').read_text()}=======\n>>>>>>> other\n"
    (ran / "dvc.lock").write_text(conflict)
    assert mend(ran) == []
    assert (ran / "dvc.lock").read_text() == conflict


def test_a_workspace_in_which_dvc_never_ran_has_nothing_to_mend(tmp_path: Path) -> None:
    assert mend(tmp_path) == []
