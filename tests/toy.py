"""A workspace with the pipeline's stages, each a script that copies its input: what tests of the doors run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tasks.pipeline import STAGES

PROJECT = Path(__file__).resolve().parents[1]

# What a stage does can be told from outside: `behaviour/<stage>` holds fail (among many), hang, crash, or a text.
SCRIPT = """
import os, sys, time, pathlib, signal
stage, upstream = sys.argv[1], sys.argv[2:]
behaviour = pathlib.Path("behaviour", stage)
wish = behaviour.read_text().strip() if behaviour.exists() else ""
print(f"{stage} 1/1 steps  100 %", flush=True)
if wish.startswith("fail"):
    print(f"{stage}: Found 0 rows in train.jsonl, expected some. Run `rlhf stage prepare`.", file=sys.stderr)
    if wish == "fail among many":
        print("[rank1]: RuntimeError: Connection closed by peer", file=sys.stderr)
        print("E1124 13:48:28 failed (exitcode: 1) local_rank: 1", file=sys.stderr)
    sys.exit(1)
if wish == "raise":
    raise ZeroDivisionError("of its own")
if wish == "hang":
    pathlib.Path("hanging").write_text(str(os.getpid()))
    time.sleep(120)
if wish == "crash":
    behaviour.write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
out = pathlib.Path("artifacts", stage)
out.mkdir(parents=True, exist_ok=True)
(out / "out.txt").write_text("".join(pathlib.Path("artifacts", up, "out.txt").read_text() for up in upstream) + stage)
"""


def make_toy(folder: Path, *, script: str = SCRIPT) -> Path:
    """Write the workspace into folder and give it back."""
    (folder / "behaviour").mkdir(parents=True)
    shutil.copy(PROJECT / "params.yaml", folder)
    (folder / "stage.py").write_text(script, encoding="utf-8")
    stages = {}
    for index, stage in enumerate(STAGES):
        upstream = STAGES[max(0, index - 1) : index]
        stages[stage] = {
            "cmd": f"python stage.py {stage} {' '.join(upstream)}".strip(),
            "deps": [f"artifacts/{name}" for name in upstream],
            "params": [stage],
            "outs": [f"artifacts/{stage}"],
        }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False), encoding="utf-8")
    (folder / ".gitignore").write_text("/.rlhf/\n/artifacts/\n", encoding="utf-8")
    init_dvc(folder)
    return folder


def init_dvc(folder: Path) -> None:
    """What `dvc init --no-scm` leaves, without starting DVC."""
    (folder / ".dvc" / "tmp").mkdir(parents=True, exist_ok=True)
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = True\n", encoding="utf-8")


def dvc(folder: Path, *arguments: str) -> str:
    """The output of a dvc command in the workspace."""
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def store(folder: Path) -> str:
    """The address of a workspace's own MLflow store."""
    return f"sqlite:///{folder}/mlflow.db"


def child_environment(folder: Path) -> dict[str, str]:
    """For a `dvc repro` of real stages in a workspace: this Python, its own store, no project around it."""
    env = {**os.environ, "MLFLOW_TRACKING_URI": store(folder), "RLHF_MIN_FREE_GB": "0.5", "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    env.pop("DVC_ROOT", None)
    return env
