"""Measures what Prefect, DVC and MLflow cost around seven empty stages: `python scripts/orchestration_cost.py`.

Makes a workspace in a temporary folder, runs the real flow in it three times (new workspace, all stages run, nothing to
do), and prints where the seconds go as a markdown table. docs/orchestration.md keeps one such table.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tasks.pipeline import STAGES

PROJECT = Path(__file__).resolve().parents[1]
STAGE = """
import sys
from pathlib import Path
from tasks.stage import stage_run
stage = sys.argv[1]
with stage_run(stage, torch=False) as run:
    run.metrics({f"{stage}/loss": 1.0}, step=1)
    Path("artifacts").mkdir(exist_ok=True)
    Path("artifacts", stage).write_text(stage)
    run.finish_metrics({"loss": 1.0})
"""
PHASES = (
    "start: imports, databases, a temporary Prefect server",
    "params.yaml, MLflow's parent run, DVC's first start",
    *(f"stage {stage}" for stage in STAGES),
    "summary to MLflow",
    "last logs to Prefect, server stopped",
)


def make_workspace(folder: Path) -> None:
    """The pipeline's stages in a chain, which only report to MLflow."""
    shutil.copy(PROJECT / "params.yaml", folder)
    (folder / "stage.py").write_text(STAGE, encoding="utf-8")
    stages = {}
    for index, stage in enumerate(STAGES):
        stages[stage] = {
            "cmd": f"python stage.py {stage}",
            "deps": [f"artifacts/{name}" for name in STAGES[max(0, index - 1) : index]],
            "params": [stage],
            "outs": [f"artifacts/{stage}"],
            "metrics": [{f"metrics/{stage}.json": {"cache": False}}],
        }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    (folder / ".dvc" / "tmp").mkdir(parents=True)
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = True\n", encoding="utf-8")


def timed_run(folder: Path, *arguments: str) -> dict[str, float]:
    """Seconds a phase, by when its last line came."""
    env = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    env["PYTHONPATH"] = str(PROJECT)
    began = last = time.perf_counter()
    command = [sys.executable, "-m", "flows.cli", "run", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    spent: dict[str, float] = {}
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        now = time.perf_counter()
        if "Beginning flow run" in line:
            spent[PHASES[0]], last = now - last, now
        elif "Running stage 'prepare'" in line or "Stage 'prepare'" in line:
            spent[PHASES[1]], last = now - last, now
        elif "Finished in state" in line:
            name = line.split()[1]
            key = PHASES[-2] if name == "rlhf" else f"stage {name}"
            spent[key], last = now - last, now
    if process.wait():
        raise SystemExit("".join(said))
    spent[PHASES[-1]] = time.perf_counter() - last
    spent["in all"] = time.perf_counter() - began
    return spent


def seconds(command: list[str], folder: Path) -> float:
    """Wall-clock time of a command."""
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, check=True, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder)
        runs = {
            "new workspace": timed_run(folder),
            "all stages run": timed_run(folder, "--force"),
            "nothing to do": timed_run(folder),
        }
        alone = {
            "`import prefect`": seconds([sys.executable, "-c", "import prefect.main"], folder),
            "`import mlflow`": seconds([sys.executable, "-c", "import mlflow"], folder),
            "an empty stage in MLflow, without DVC": seconds([sys.executable, "stage.py", "prepare"], folder),
            "a stage in which DVC finds nothing to do": seconds(
                [sys.executable, "-m", "dvc", "repro", "-s", "evaluate"], folder
            ),
        }
    print("| seconds | " + " | ".join(runs) + " |\n|---|" + "---:|" * len(runs))
    for phase in [*PHASES, "in all"]:
        print(f"| {phase} | " + " | ".join(f"{run.get(phase, 0):.1f}" for run in runs.values()) + " |")
    print("\n| alone | seconds |\n|---|---:|")
    for what, took in alone.items():
        print(f"| {what} | {took:.1f} |")


if __name__ == "__main__":
    main()
