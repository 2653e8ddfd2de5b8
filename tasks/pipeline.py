"""Runs one stage through DVC, and changes params.yaml as DVC does. Nothing else in the project starts DVC.

A stage is a child process in its own process group: its memory and its crashes stay its own, and a cancelled flow
ends all of it. DVC decides whether there is anything to do; this module reports what it decided.
"""

import codecs
import contextlib
import fcntl
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import yaml

from rlhf_core.config import Params, check_params
from rlhf_core.errors import ConfigError, MissingArtifact, ResourceError, RLHFError
from tasks.environment import PUTS_BACK, STOP_PATIENCE_SECONDS
from tasks.mending import mend

STAGES = ("prepare", "sft", "reward", "ppo", "dpo", "evaluate", "people")
PARAMS = "params.yaml"
LOCK = ".rlhf/flow.lock"
LOCK_PATIENCE_SECONDS = 10.0  # DVC's own repository lock is held for moments, unless another command works long
NOISE = ("Use `dvc push`", "To track the changes with git", "To enable auto staging", "Updating lock file",
         "Generating lock file", "Data and pipelines are up to date", "\tgit add")  # fmt: skip
LAUNCHERS_WORDS = re.compile(r"\[rank\d+\]|[WE]\d{4} |Traceback ")  # of torchrun, once one of its processes has failed
# A stage's time to save itself, to mark its MLflow run and go; less than the 30 s that Prefect leaves a cancelled run.
TERM_GRACE_SECONDS = STOP_PATIENCE_SECONDS + 10.0


class Outcome(StrEnum):
    """What DVC did with a stage."""

    RAN = "ran"
    CACHED = "cached"  # the same inputs were run before; its outputs came back from the cache
    SKIPPED = "skipped"  # everything is as dvc.lock says


class StageFailed(RLHFError, RuntimeError):
    """A stage ended with an error; the message is the stage's own."""

    def __init__(self, stage: str, exit_code: int, message: str) -> None:
        super().__init__(stage, exit_code, message)
        self.stage, self.exit_code, self.message = stage, exit_code, message

    def __str__(self) -> str:
        return f"Stage {self.stage} failed: {self.message}"

    @property
    def crashed(self) -> bool:
        """Ended by a signal, such as the kernel's when memory runs out, and not by an error of its own."""
        return self.exit_code < 0 or self.exit_code > 128


def find_root(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds dvc.yaml."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise MissingArtifact(f"Found no dvc.yaml in {start} or above it. Run this in the project's folder.")


def run_stage(
    stage: str,
    *,
    force: bool = False,
    on_line: Callable[[str], None] = print,
    env: Mapping[str, str] | None = None,
    root: Path | None = None,
) -> Outcome:
    """Bring one stage up to date with `dvc repro --single-item`, and tell what DVC did.

    Args:
        stage: one of STAGES.
        force: run it even if nothing changed.
        on_line: called with each line that DVC and the stage write, as it comes.
        env: environment variables to add for the stage.
        root: the folder of dvc.yaml; the nearest one upwards if None.

    Raises:
        ResourceError: another run holds DVC's lock.
        StageFailed: the stage or DVC ended with an error.
    """
    root = root or find_root()
    for line in mend(root):
        on_line(line)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if force else []), stage]
    metrics = root / "metrics" / f"{stage}.json"
    last_metrics = metrics.read_bytes() if metrics.is_file() else None
    had = _has_outputs(stage, root)
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while True:
        try:
            exit_code, lines = _stream(
                command,
                cwd=root,
                env=_child_environment({**(env or {}), PUTS_BACK: "1"}),
                on_line=on_line,
                grace=grace_of(stage, root),
            )
        except BaseException:  # Ctrl-C, a timeout, a cancelled flow run
            _put_back(stage, root, metrics, last_metrics, had, on_line)
            raise
        if exit_code == 0:
            return _outcome(stage, lines)
        text = "\n".join(lines)
        if "is being blocked by:" in text:
            raise ResourceError(_blocked_message(stage, text))
        if "Unable to acquire lock" not in text:
            _put_back(stage, root, metrics, last_metrics, had, on_line)
            raise _stage_error(stage, exit_code, lines)
        holder = _lock_holder(root)
        if time.monotonic() > deadline:
            raise ResourceError(
                f"DVC's lock is held by {holder}; stage {stage} waited {LOCK_PATIENCE_SECONDS:.0f} seconds for it. "
                f"Wait until that command ends, or end it, then run `rlhf run` again."
            )
        on_line(f"DVC's lock is held by {holder}; trying again")


def grace_of(stage: str, root: Path) -> float:
    """Seconds that a stage has to end by itself: more where an endpoint's answers are under way, which are paid for."""
    try:
        params = check_params(_load_yaml(root / PARAMS), source=PARAMS)
    except (ConfigError, OSError):  # the stage says so itself
        return TERM_GRACE_SECONDS
    asks = {
        "ppo": params.ppo.reward,
        "constitution": params.constitution.critic,
        "principles": params.constitution.annotator,
    }
    if params.judge.kind == "endpoint" and asks.get(stage) == "judge":
        return TERM_GRACE_SECONDS + params.judge.timeout
    return TERM_GRACE_SECONDS


def version_data(path: str, *, root: Path) -> None:
    """Let DVC version a file or folder that no stage writes, with `dvc add`; repeating it changes nothing.

    Raises:
        ResourceError: DVC cannot.
    """
    command = [sys.executable, "-m", "dvc", "add", "--quiet", path]
    done = subprocess.run(command, cwd=root, env=_child_environment(None), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise ResourceError(f"`dvc add {path}` failed in {root}: {' '.join(said)}")


def checkout(*, root: Path) -> None:
    """Bring what dvc.lock names from DVC's cache, as far as it is there."""
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet", "--force", "--allow-missing"]
    subprocess.run(command, cwd=root, env=_child_environment(None), capture_output=True, check=False)


def _has_outputs(stage: str, root: Path) -> bool:
    """Whether the workspace has what the stage's last good run wrote, its metrics apart: git has those in any clone."""
    with contextlib.suppress(OSError, ConfigError, KeyError, TypeError):  # no lock, or none of the stage
        outs = [out["path"] for out in _load_yaml(root / "dvc.lock")["stages"][stage]["outs"]]
        return any((root / out).exists() for out in outs if not out.startswith("metrics/"))
    return False


def _put_back(
    stage: str, root: Path, metrics: Path, last_metrics: bytes | None, had: bool, on_line: Callable[[str], None]
) -> None:
    """Give the workspace back what the stage's last good run wrote: DVC removes it before it starts a new one.

    Args:
        had: whether it was there; where DVC cannot bring it back and it was, that is said.
    """
    command = [sys.executable, "-m", "dvc", "checkout", "--quiet", "--force", stage]
    done = subprocess.run(command, cwd=root, env=_child_environment(None), capture_output=True, text=True, check=False)
    if last_metrics is not None and not metrics.is_file():  # not in DVC's cache, since git keeps it
        metrics.parent.mkdir(exist_ok=True)
        metrics.write_bytes(last_metrics)
    if done.returncode and had:
        on_line(
            f"What stage {stage} left the last time is not back. Mend what is wrong, then run `dvc checkout {stage}`:"
        )
        for line in done.stderr.strip().splitlines()[:5]:
            on_line(f"  {line}")


@contextlib.contextmanager
def workspace_lock(root: Path) -> Iterator[None]:
    """Hold the workspace for one pipeline run; a second one fails at once, naming the first."""
    advice = "Wait for it, stop it with Ctrl-C there, or use a workspace of its own: `dvc exp run --temp`."
    with _lock(root / LOCK, lambda holder: f"Another pipeline run works in {root} ({holder}). {advice}"):
        yield


@contextlib.contextmanager
def serving_lock(root: Path, deployment: str) -> Iterator[None]:
    """Hold a deployment while it is served; of two who serve it, the first to end would pause the other's schedule."""
    advice = "Stop it with Ctrl-C there, or serve under another name."
    path = root / ".rlhf" / f"serve-{quote(deployment, safe='')}.lock"
    with _lock(path, lambda holder: f"{deployment} is served already ({holder}). {advice}"):
        yield


@contextlib.contextmanager
def _lock(path: Path, busy: Callable[[str], str]) -> Iterator[None]:
    """Hold a file, or raise ResourceError with what `busy` says of the process that holds it.

    The lock goes with its process, however that ends, so there is never a stale one to remove.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ResourceError(busy(f"process {file.read().strip() or 'unknown'}")) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def apply_overrides(overrides: Sequence[str], *, root: Path | None = None, keep: bool = True) -> Params:
    """Change params.yaml as `dvc exp run -S` does, keeping its comments, and return the checked whole.

    The result is checked before the file is touched, and put in place in one move.

    Args:
        overrides: such as "ppo.kl_coef=0.1"; DVC's form "params.yaml:ppo.kl_coef=0.1" is understood too.
        keep: whether the file is changed, or only the whole that is returned.

    Raises:
        ConfigError: an override cannot be read, or names no key, or its value is impossible.
    """
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.hydra import apply_overrides as dvc_apply_overrides

    # "++" lets an unknown key through, so that it is the check below that turns it down, naming the nearest one.
    plain = [override.removeprefix(f"{PARAMS}:") for override in overrides]
    forced = [override if override[:1] in "+~" else f"++{override}" for override in plain]

    def change(draft: Path) -> None:
        try:
            dvc_apply_overrides(draft, forced)
        except InvalidArgumentError as error:
            reason = str(error.__cause__).splitlines()[0] if error.__cause__ else str(error)
            reason = reason.replace("++", "")
            raise ConfigError(
                f"Cannot read -S {' '.join(plain)}: {reason}. Expected SECTION.KEY=VALUE, such as -S ppo.kl_coef=0.1"
            ) from error

    return _edit_params(root or find_root(), change if overrides else None, keep=keep)


def apply_recipe(recipe: Path, *, root: Path | None = None) -> Params:
    """Lay the values of a recipe file (a part of params.yaml) over params.yaml, checked and in one move."""
    from dvc.utils.collections import merge_dicts
    from dvc.utils.serialize import modify_yaml

    overlay = yaml.safe_load(recipe.read_text(encoding="utf-8"))

    def change(draft: Path) -> None:
        with modify_yaml(draft) as values:
            merge_dicts(values, overlay)

    return _edit_params(root or find_root(), change)


def _edit_params(root: Path, change: Callable[[Path], None] | None, *, keep: bool = True) -> Params:
    path = root / PARAMS
    if not path.is_file():
        raise MissingArtifact(f"Found no {PARAMS} in {root}. Run this in the project's folder.")
    if change is None:
        return check_params(_load_yaml(path), source=PARAMS)
    with tempfile.TemporaryDirectory(dir=root, prefix=".params-") as folder:
        draft = Path(folder) / PARAMS
        shutil.copy(path, draft)
        change(draft)
        params = check_params(_load_yaml(draft), source=PARAMS)
        if keep and _load_yaml(draft) != _load_yaml(path):  # DVC rewrites some lines' style even where no value changes
            os.replace(draft, path)
    return params


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path.name} holds {type(raw).__name__}; expected sections {', '.join(STAGES)}.")
    return raw


def _child_environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """The launcher `python` of params.yaml has to be this Python, and its lines have to come as they are written."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1", **(extra or {})}


def _stream(
    command: list[str], *, cwd: Path, env: Mapping[str, str], on_line: Callable[[str], None], grace: float
) -> tuple[int, list[str]]:
    """Run a command in its own process group, pass on its lines, and leave none of the group behind."""
    lines: list[str] = []
    process = subprocess.Popen(
        command, cwd=cwd, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in _lines(process.stdout.fileno()):
            lines.append(line)
            if not line.startswith(NOISE):
                on_line(line)
        return process.wait(), lines
    finally:  # also on KeyboardInterrupt, a task's timeout, and the SIGTERM by which a flow run is cancelled
        _end_group(process, grace)
        process.stdout.close()


def _lines(descriptor: int) -> Iterator[str]:
    """Lines as they come; waits in short steps, so that an exception raised from outside is noticed."""
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    while True:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        chunk = os.read(descriptor, 65536)
        *whole, rest = re.split(r"\r\n|\n|\r", rest + decode(chunk, final=not chunk))
        yield from (line.rstrip() for line in whole if line.strip())
        if not chunk:
            if rest.strip():
                yield rest.rstrip()
            return


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """TERM to what is left of the child's group, KILL after the grace time; returns when it is gone."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace
        if process.poll() is not None and not _group_members(process.pid):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        while time.monotonic() < deadline:
            if process.poll() is not None and not _group_members(process.pid):
                return
            time.sleep(0.05)


def _group_members(group: int) -> list[int]:
    """Living processes of a group. A zombie is gone already, though nobody has read its exit code."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def _outcome(stage: str, lines: list[str]) -> Outcome:
    words = {
        f"Running stage '{stage}'": Outcome.RAN,
        f"Stage '{stage}' is cached": Outcome.CACHED,
        f"Stage '{stage}' didn't change": Outcome.SKIPPED,
    }
    for line in lines:
        for start, outcome in words.items():
            if line.startswith(start):
                return outcome
    raise AssertionError(f"DVC ended well but said none of {', '.join(words)}:\n" + "\n".join(lines))


def _stage_error(stage: str, exit_code: int, lines: list[str]) -> StageFailed:
    """The stage's own last words; DVC's where the stage never started."""
    text = "\n".join(lines)
    if ended := re.search(r"failed to run: .*, exited with (-?\d+)", text):
        exit_code = int(ended.group(1))
    if first := re.search(r"Root Cause.*?exitcode +: (-?\d+)", text, re.DOTALL):  # of torchrun's processes
        exit_code = int(first.group(1))
    start = next((i + 1 for i, line in enumerate(lines) if line.startswith("> ")), None)
    if start is None:  # DVC never came to run it
        words = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-3:]
        message = " ".join(words).replace(f"failed to reproduce '{stage}': ", "")
        if missing := re.search(r"missing data 'source': (.+)|No such file or directory: '(.+)'", message):
            message = f"{missing.group(1) or missing.group(2)} is not there. Run the stages before it: `rlhf run`"
        return StageFailed(stage, exit_code, message)
    said = [line for line in lines[start:] if not line.startswith("ERROR: failed to reproduce")]
    marked = [i for i, line in enumerate(said) if line.startswith(f"{stage}: ")]
    if marked:  # what stage_run prints for a mistake of the user's
        words = list(itertools.takewhile(lambda line: not LAUNCHERS_WORDS.match(line), said[marked[-1] :]))
        message = "\n".join(words).removeprefix(f"{stage}: ")
    elif StageFailed(stage, exit_code, "").crashed:
        number = -exit_code if exit_code < 0 else exit_code - 128
        name = next((known.name for known in signal.Signals if known == number), str(number))
        hint = ". Memory may have run out: halve its micro_batch_size" if name == "SIGKILL" else ""
        message = f"it was ended by signal {name}{hint}"
    else:
        of_ranks = [found.group(1) for line in said if (found := re.match(r"\[rank\d+\]: (\S.*)", line))]
        message = "\n".join((of_ranks or said)[-1:]) or f"exit code {exit_code}, without a word"
    return StageFailed(stage, exit_code, message)


def _blocked_message(stage: str, text: str) -> str:
    holders = ", ".join(f"process {pid} ({command})" for pid, command in re.findall(r"\(PID (\d+)\): (.+)", text))
    return (
        f"Stage {stage} cannot start: {holders or 'another process'} is working on the same files. "
        "Wait until it ends, or stop it, then run `rlhf run` again."
    )


def _lock_holder(root: Path) -> str:
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int((root / ".dvc/tmp/lock").read_text(encoding="utf-8").split()[0]))
        return f"process {process.pid} ({' '.join(process.cmdline()[-4:])})"
    return "another DVC command"
