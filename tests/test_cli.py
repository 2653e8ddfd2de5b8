"""The console script: it answers at once, teaches, and turns every mistake into one message."""

import re
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy import PROJECT, make_toy
from typer.testing import CliRunner

from flows import cli
from flows.listening import require_free
from flows.recipe import make_workspace
from rlhf_core.errors import MissingArtifact, ResourceError
from tasks import preflight
from tasks.pipeline import STAGES, workspace_lock
from tasks.stage import check_disk


def test_help_is_quick_and_loads_no_tool() -> None:
    code = (
        "import sys, flows.cli\n"
        "print({'prefect', 'mlflow', 'torch', 'transformers', 'dvc'} & {name.split('.')[0] for name in sys.modules})"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # a busy machine is not our slowness
    assert worked < 1.5


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "people",
        "stage",
        "ui",
        "prefect-ui",
        "serve",
        "compare",
        "chat",
        "sync",
        "feedback",
        "judge-check",
        "online",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output.split()) > 20


def test_the_first_help_names_the_first_steps() -> None:
    shown = CliRunner().invoke(cli.app, [])
    for words in ("rlhf run --recipe tiny", "rlhf chat ppo", "rlhf run -S ppo.kl_coef=0.1"):
        assert words in " ".join(shown.output.split())


@pytest.mark.parametrize("arguments", [["stage", "pretrain"], ["run", "--until", "pretrain"]])
def test_an_unknown_stage_lists_the_known(arguments: list[str]) -> None:
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 2
    assert all(stage in shown.output for stage in STAGES)


def test_a_users_mistake_is_one_message_and_exit_1(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy")
    command = [sys.executable, "-m", "flows.cli", "stage", "ppo", "-S", "ppo.kl_coeff=0.1"]
    env = {"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=toy, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr == "Error: params.yaml: unknown key ppo.kl_coeff; did you mean ppo.kl_coef?\n"


def test_a_taken_port_names_the_next() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"Choose another: `rlhf ui --port {port + 1}`"):
            require_free("127.0.0.1", port, "rlhf ui")


def test_an_unknown_recipe_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"Found no recipes/huge\.yaml\. Recipes here: .*tiny"):
        make_workspace("huge", tmp_path, project=PROJECT)


def test_the_code_under_a_running_recipe_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rlhf_core").mkdir()
    with workspace_lock(tmp_path), pytest.raises(ResourceError, match="Another pipeline run works in"):
        make_workspace("tiny", tmp_path, project=PROJECT)
    assert list((tmp_path / "rlhf_core").iterdir()) == []


def test_sync_sends_what_recipes_campaigns_and_sweeps_missed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    places = [tmp_path / ".rlhf" / name for name in ("outbox", "online/.rlhf/outbox", "tiny/.rlhf/outbox")]
    for place in places:
        place.mkdir(parents=True)
    asked = []

    def sync_outbox(*, outbox: Path) -> tuple[int, int]:
        asked.append(outbox)
        return 2, 0

    monkeypatch.setattr("tasks.tracking.sync_outbox", sync_outbox)
    assert CliRunner().invoke(cli.app, ["sync"]).output == "6 sent, 0 left.\n"
    assert asked == places


GIB = 1024**3


def test_preflight_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_MIN_FREE_GB", raising=False)
    fine = {"python": (3, 11), "disk": 50 * GIB, "memory": 16 * GIB}
    assert preflight.problems(install=True, **fine) == []
    assert preflight.problems(install=True, **{**fine, "memory": 2 * GIB}) == []  # or nobody came to the tiny recipe
    [old] = preflight.problems(**{**fine, "python": (3, 8)})
    assert old.startswith("Found Python 3.8, expected 3.11 or newer.")
    [full] = preflight.problems(install=True, **{**fine, "disk": GIB})
    assert full == "Found 1.1 GB of free disk, expected 7 GB. Free some."  # there is no DVC yet
    assert preflight.problems(light=True, **{**fine, "memory": 2 * GIB}) == []
    for light in (False, True):
        [full] = preflight.problems(light=light, **{**fine, "disk": GIB})
        assert full == "Found 1.1 GB of free disk, expected 3 GB. Free some; `make clean` and `dvc gc -w` help."
    [small] = preflight.problems(**{**fine, "memory": 2 * GIB})
    assert small.startswith("Found 2.0 GiB of free memory, expected 6 GiB.")


@pytest.mark.parametrize(
    ("meminfo", "files", "free"),
    [
        (16, {}, 16),
        (16, {"memory.max": "max", "memory.current": 9 * GIB, "memory.stat": "anon 0"}, 16),
        # of 8, 7 are in use; 4 of those are files that were read once
        (
            16,
            {"memory.max": 8 * GIB, "memory.current": 7 * GIB,
             "memory.stat": f"anon {3 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\nfile_mapped {GIB}"},
            5,
        ),
        (
            16,
            {"memory/memory.limit_in_bytes": 8 * GIB, "memory/memory.usage_in_bytes": 7 * GIB,
             "memory/memory.stat": f"active_file {GIB}\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}"},
            3,
        ),
        (16, {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 7 * GIB,
              "memory/memory.stat": "rss 0"}, 16),
        (4, {"memory.max": 8 * GIB, "memory.current": GIB, "memory.stat": "anon 0"}, 4),
    ],
    ids=["no group", "no limit", "version 2", "version 1", "version 1, no limit", "a full machine"],
)  # fmt: skip
def test_free_memory_is_what_a_container_has_left_without_cached_files(
    tmp_path: Path, meminfo: int, files: dict[str, object], free: int
) -> None:
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {meminfo * GIB // 1024} kB\n"} | {
        f"sys/fs/cgroup/{name}": content for name, content in files.items()
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert preflight.available_memory(str(tmp_path)) == free * GIB


def test_a_run_and_its_stages_ask_for_the_same_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, wanted, enough in ((2.9, "", False), (3.1, "", True), (0.6, "0.5", True), (0.4, "0.5", False)):
        monkeypatch.setenv("RLHF_MIN_FREE_GB", wanted)
        bytes_free = int(free * 1e9)
        assert (preflight.problems(disk=bytes_free, memory=16 * GIB) == []) is enough
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=bytes_free: SimpleNamespace(free=free))
        with nullcontext() if enough else pytest.raises(ResourceError, match="GB are free"):
            check_disk()


@pytest.mark.parametrize("command", [["run", "-S", "ppo.kl_coef=0.1"], ["stage", "ppo", "-S", "ppo.kl_coef=0.1"]])
def test_a_full_disk_is_told_before_anything_is_changed_or_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    toy = make_toy(tmp_path / "toy")
    before = (toy / "params.yaml").read_bytes()
    monkeypatch.chdir(toy)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("RLHF_MIN_FREE_GB", "1e9")
    monkeypatch.setattr(preflight, "available_memory", lambda: 16 * GIB)
    monkeypatch.setattr("flows.server.use_server", lambda *_, **__: pytest.fail("a server was started"))
    found = CliRunner().invoke(cli.app, command)
    assert isinstance(found.exception, ResourceError)
    assert re.search(r"GB .*free.* 1e\+09 GB", str(found.exception))
    assert (toy / "params.yaml").read_bytes() == before


def test_preflight_needs_nothing_but_python() -> None:
    done = subprocess.run([sys.executable, "-S", "-I", "tasks/preflight.py", "--install"], cwd=PROJECT, text=True)
    assert done.returncode in (0, 1)


@pytest.mark.parametrize("verb", ["test", "test-resume", "test-thorough", "test-online", "test-browser"])
def test_tests_ask_for_disk_where_everything_is_installed_too(tmp_path: Path, verb: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tasks/preflight.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / ".venv/.installed").touch()
    env = {"PATH": "/usr/bin:/bin", "RLHF_MIN_FREE_GB": "1e9"}
    command = ["make", verb, f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode
    assert re.match(r"Found [0-9.]+ GB of free disk, expected 1e\+09 GB\. Free some; .*\n", done.stderr)
    assert done.stdout == ""


@pytest.mark.parametrize("command", [["chat", "ppo"], ["compare", "low-kl"], ["judge-check"]])
def test_a_recipe_that_never_ran_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    toy = make_toy(tmp_path / "toy")
    (toy / "recipes").mkdir()
    (toy / "recipes" / "tiny.yaml").touch()
    monkeypatch.chdir(toy)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for recipe, message in (("tiny", r"Run `rlhf run --recipe tiny` first"), ("huge", r"Recipes here: tiny\.")):
        found = CliRunner().invoke(cli.app, [*command, "--recipe", recipe])
        assert isinstance(found.exception, MissingArtifact)
        assert re.search(message, str(found.exception))
