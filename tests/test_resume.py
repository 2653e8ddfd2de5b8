"""Ten times killed with -9 at random moments, the tiny recipe ends as if it never was: the same bytes, the same curves.

Minutes long: `make test-resume`.
"""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from toy import PROJECT, child_environment, store

from flows.recipe import make_workspace
from tasks.mending import mend
from tasks.pipeline import apply_overrides
from tasks.stage import ENDED, TIMINGS

pytestmark = [pytest.mark.resume, pytest.mark.timeout(1800)]

KILLS = 10
LONGER = ["sft.epochs=4", "reward.epochs=4", "ppo.updates=16"]  # so that there is something to interrupt


def workspace(folder: Path) -> Path:
    make_workspace("tiny", folder, project=PROJECT)
    apply_overrides(LONGER, root=folder)
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    env = child_environment(folder)
    mend(folder)  # as `rlhf run` does: a kill may fall into the moment in which DVC writes a file in place
    with (folder / "repro.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=folder, env=env, stdout=log, stderr=log)


def kill(process: subprocess.Popen[bytes]) -> None:
    """-9 to DVC and all below it."""
    with suppress(psutil.NoSuchProcess):
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=30)
    process.wait()


def saved(folder: Path, name: str) -> set[Path]:
    # os.walk passes over a folder that the loop removes meanwhile, and rglob does not.
    found = os.walk(folder / ".rlhf/checkpoints")
    return {Path(root) / each for root, folders, files in found for each in (*folders, *files) if fnmatch(each, name)}


def wait_for_another(name: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
    known = saved(folder, name)
    while process.poll() is None and not saved(folder, name) - known:
        time.sleep(0.005)


def curves(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Each stage's finished run: step and value of every point, in the order in which MLflow has them."""
    client = MlflowClient(store(folder))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    clause = "tags.`rlhf.kind` = 'stage' and attributes.status = 'FINISHED'"
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in client.search_runs(experiments, clause):
        stage = run.data.tags["rlhf.stage"]
        assert stage not in found, f"{stage} finished twice"
        names = sorted(name for name in run.data.metrics if not name.endswith(TIMINGS))
        found[stage] = {
            name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
            for name in names
        }
    return found


def test_killed_ten_times_it_ends_with_the_same_bytes_and_curves(tmp_path: Path) -> None:
    straight, killed = workspace(tmp_path / "straight"), workspace(tmp_path / "killed")
    assert start(straight).wait() == 0, (straight / "repro.log").read_text()
    seed = int(os.environ.get("RLHF_RESUME_SEED") or time.time())
    print(f"RLHF_RESUME_SEED={seed}")  # to have the same moments again
    chance = random.Random(seed)
    hits = 0
    for count in range(KILLS):
        process = start(killed)
        if count % 3 == 0:
            time.sleep(chance.uniform(2, 16))
        else:  # during a step or a save; or when a stage has ended and DVC may not have recorded it yet
            wait_for_another("*step-*" if count % 3 == 1 else ENDED, killed, process)
            time.sleep(chance.uniform(0, 0.4))
        hits += process.poll() is None
        kill(process)
    assert hits >= KILLS / 2  # the others found all done
    assert start(killed).wait() == 0, (killed / "repro.log").read_text()
    log = (killed / "repro.log").read_text()
    assert "Going on after step" in log
    assert (killed / "dvc.lock").read_text() == (straight / "dvc.lock").read_text()
    assert curves(killed) == curves(straight)
    assert not saved(killed, "*step-*")
