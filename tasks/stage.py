"""The frame around a stage: parameters, environment, determinism, tracking, and one clear message where it fails.

    with stage_run("ppo", deps=["artifacts/sft/model"]) as run:
        ... run.params.ppo ... run.tracker ...
        run.finish_metrics({"reward": 0.4})

What a stage computes is in rlhf_core; how DVC calls it is in dvc.yaml.
"""

import csv
import ctypes
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from filelock import FileLock, Timeout

from rlhf_core.config import Params, load_params
from rlhf_core.errors import ConfigError, MissingArtifact, ResourceError, RLHFError, TrainingDiverged
from rlhf_core.tracking import NullTracker, Tracker
from tasks.environment import PUTS_BACK, STOP_PATIENCE_SECONDS, project_root, state_folder, workspace_root
from tasks.lineage import StageEntry, Workspace, flat_metrics, flat_params, git_state, metric_name, project_state
from tasks.preflight import run_disk_gb
from tasks.tracking import MLflowTracker, Parent

if TYPE_CHECKING:
    from rlhf_core.checkpoints import Checkpoints, Unsaved

ENDED = "ended"  # in a folder of checkpoints: the journal of the run that ended well
IN_USE = "lock"  # in a folder of checkpoints: held by the process that writes there
KEPT_CONFIGURATIONS = 2  # of a stage, whose checkpoints wait beside the present one's
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# These differ from run to run, so they stay out of files that DVC tracks.
TIMINGS = ("_per_second", "_seconds", "/seconds")
JUDGE = "judge/"  # an endpoint that is asked again remembers


class Killed(BaseException):
    """SIGTERM or SIGINT arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class History:
    """Step metrics by step and name, kept beside the checkpoints so that a resumed stage writes the whole curve."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.steps: dict[int, dict[str, float]] = {}
        self._interrupted: dict[str, dict[int, float]] = {}  # what the run before got to, by name and step
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):  # the kill cut a line short; what follows gets a line of its own
                path.write_text(f"{text}\n", encoding="utf-8")
            for line in text.splitlines():
                with suppress(ValueError):
                    step, values = json.loads(line)
                    for name, value in values.items():
                        self._interrupted.setdefault(name, {})[step] = value

    def add(self, step: int, values: Mapping[str, float]) -> list[tuple[int, dict[str, float]]]:
        """Keep values; returns what an interrupted run, which this one goes on from, recorded of them before."""
        before = self._take({name: step for name in values if name in self._interrupted})
        self.steps.setdefault(step, {}).update(values)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([step, dict(values)]) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that outlives a power cut has its curve
        return before

    def rest(self) -> list[tuple[int, dict[str, float]]]:
        """At the end: curves that were complete before the interruption, so that this run never added to them."""
        return self._take({name: max(points) + 1 for name, points in self._interrupted.items()})

    def _take(self, until: Mapping[str, int]) -> list[tuple[int, dict[str, float]]]:
        """Move the interrupted run's values of some names before a step into the history."""
        taken: dict[int, dict[str, float]] = {}
        for name, end in until.items():
            for step, value in self._interrupted.pop(name).items():
                if step < end:
                    taken.setdefault(step, {})[name] = value
                    self.steps.setdefault(step, {})[name] = value
        return sorted(taken.items())

    def csv(self) -> str:
        """All steps as CSV; columns sorted, numbers exact, nothing that differs from run to run."""
        names = sorted(
            {
                name
                for row in self.steps.values()
                for name in row
                if not name.endswith(TIMINGS) and not name.startswith(JUDGE)
            }
        )
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", *names])
        for step in sorted(step for step, row in self.steps.items() if any(not name.startswith(JUDGE) for name in row)):
            writer.writerow([step, *(repr(self.steps[step][n]) if n in self.steps[step] else "" for n in names)])
        return text.getvalue()


@dataclass
class StageRun:
    """What a stage gets: its parameters, and where its results go. It is a Tracker itself."""

    stage: str
    params: Params
    run_key: str
    main: bool  # False in all but one of the processes that share a stage's work; they write and report nothing
    _sink: Tracker
    _history: History
    _entry: StageEntry | None
    _workspace: Workspace | None
    _place: Path | None  # of its checkpoints; None where nothing is saved
    _stopping: "Stopping"
    _final: dict[str, Any] | None = field(default=None)

    @property
    def tracker(self) -> "StageRun":
        """The Tracker to hand to a loop."""
        return self

    @property
    def checkpoints(self) -> "Checkpoints":
        """Where a loop saves itself, and goes on from: outside DVC's outputs, and of this very configuration only."""
        from rlhf_core.checkpoints import Checkpoints, Unsaved  # torch, which the flow and stage prepare do without

        if self._stopping.unsaved is None and not _many_processes():  # several would stop at different steps
            self._stopping.unsaved = Unsaved()
        return Checkpoints(self._place, writes=self.main, unsaved=self._stopping.unsaved)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values named `stage/quantity` at a step."""
        if not self.main:
            return
        values = {metric_name(name): float(value) for name, value in values.items()}
        for old, kept in self._history.add(step, values):
            self._sink.metrics(kept, step=old)
        self._sink.metrics(values, step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Record rows of text and numbers, such as sample responses."""
        self._sink.table(name, rows, step=step)

    def remark(self, name: str, text: str) -> None:
        """Say something that a reader must not miss: a line, and a tag of the run."""
        if self.main:
            print(f"{name}: {text}", flush=True)
        if isinstance(self._sink, MLflowTracker):
            self._sink.remark(name, text)

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        """Say how far the stage is."""
        self._sink.progress(done, total, unit=unit, tokens=tokens, note=note)

    def finish_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Keep the final metrics; they are written to metrics/<stage>.json and recorded when the stage ends well."""
        self._final = dict(metrics)

    def log_dataset(self, name: str, path: str | Path, *, context: str = "training", **profile: Any) -> None:
        """Record a data set by its DVC hash; profile holds what is worth showing, such as rows=320."""
        if isinstance(self._sink, MLflowTracker):
            self._sink.dataset(name, str(path), self._hash(path), context=context, profile=profile)

    def register_model(self, name: str, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> None:
        """Register a folder that this stage wrote as a new version of a model; the weights stay DVC's."""
        if isinstance(self._sink, MLflowTracker):
            tags = {"rlhf.stage": self.stage, "rlhf.run_key": self.run_key, "rlhf.dvc_hash": self._hash(folder)}
            tags["rlhf.git_commit"] = git_state()[0]
            numbers = flat_metrics(metrics or {}, self.stage)
            self._sink.model(name, Path(folder).as_posix(), metrics=numbers, tags=tags)

    def is_dependency(self, path: str | Path) -> bool:
        """Whether DVC runs the stage again when this file changes; True outside of DVC, which runs it always."""
        if self._entry is None:
            return True
        return any(Path(path).is_relative_to(dependency) for dependency in self._entry.dependencies)

    def _hash(self, path: str | Path) -> str:
        known = self._entry.dependencies if self._entry else {}
        if str(path) in known:
            return known[str(path)]
        with suppress(Exception):  # lineage is a service; a stage never fails for it
            return self._workspace.path_hash(path) if self._workspace else ""
        return ""


@contextmanager
def stage_run(stage: str, deps: Sequence[str | Path] = (), *, torch: bool = True) -> Iterator[StageRun]:
    """Run a stage: on leaving, its MLflow run is FINISHED, FAILED or KILLED and the process exits as it should.

    Args:
        stage: prepare, sft, reward, ppo, dpo, evaluate, people, or one of a campaign.
        deps: paths that must exist; the message where one does not names the stage that writes it.
        torch: make torch deterministic.
    """
    try:
        stopping = Stopping()
        with stopping.heeded():
            yield from _run(stage, deps, torch, stopping)
    except Killed as killed:
        print(
            f"{stage} was stopped by {killed}; running it again goes on from its last checkpoint, if it wrote one.",
            file=sys.stderr,
        )
        _say_what_dvc_took(stage)
        raise SystemExit(128 + killed.number) from None
    except RLHFError as error:
        print(f"{stage}: {error}", file=sys.stderr, flush=True)
        _say_what_dvc_took(stage)
        raise SystemExit(1) from None


def _say_what_dvc_took(stage: str) -> None:
    """DVC removes a stage's outputs before it starts it; where nobody brings them back, tell how to."""
    if os.environ.get(PUTS_BACK) or not _dvc_process():
        return
    with suppress(OSError, AttributeError, KeyError, TypeError, yaml.YAMLError):  # no lock, or none of this stage
        lock = yaml.safe_load(Path("dvc.lock").read_text(encoding="utf-8"))
        paths = [out["path"] for out in lock["stages"][stage]["outs"]]
        if any(not Path(path).exists() for path in paths):
            print(
                f"DVC took away what {stage} left the last time. `dvc checkout {stage}` brings it back, and "
                f"`git checkout metrics/{stage}.json` the metrics as committed; `rlhf stage {stage}` does both itself.",
                file=sys.stderr,
                flush=True,
            )


def _run(stage: str, deps: Sequence[str | Path], torch: bool, stopping: "Stopping") -> Iterator[StageRun]:
    _die_with_the_launcher()
    params = load_params()
    check_disk()
    for dep in deps:
        _must_exist(Path(dep))
    if torch:
        set_up_torch()
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a stage has one progress line, its own
    main = int(os.environ.get("RANK", "0")) == 0
    workspace, entry = _lineage(stage)
    run_key = entry.run_key if entry else ""
    place = _checkpoints(stage, run_key) if run_key else None
    lock = _claim(place) if main and place else None
    if main and place and lock is None:
        _say_it_is_shared(stage)
        place = None
    sink: Tracker = _open_tracker(stage, params, entry) if main else NullTracker()
    if lock and workspace:
        _clear_checkpoints(stage, run_key, workspace)
        if isinstance(sink, MLflowTracker) and (lost := _ended(stage, run_key)):
            sink.replaces(lost)
    history = History(place / "history.jsonl" if main and place else None)
    run = StageRun(stage, params, run_key, main, sink, history, entry, workspace, place, stopping)
    status = "FAILED"
    try:
        with _as_resource_error(stage), _keeping_what_diverged(stage):
            yield run
            if main:
                _finish(run)
        status = "FINISHED"
    except (Killed, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        if isinstance(sink, MLflowTracker):
            sink.close(status, patience=None if status != "KILLED" else 3.0)
        if lock and place:
            if {path.name for path in place.glob("*")} <= {IN_USE}:  # nothing that anybody could go on from
                shutil.rmtree(place, ignore_errors=True)
            lock.release()
        if status == "FINISHED" and _many_processes():  # after an error others may still wait: the launcher ends them
            from rlhf_core import processes

            processes.close()


def _many_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _die_with_the_launcher() -> None:
    """torchrun gives each process a session of its own, so no signal to the stage's group would reach this one."""
    if _many_processes() and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it went in between
            os.kill(os.getpid(), signal.SIGKILL)


def _finish(run: StageRun) -> None:
    """After the body: curve and final metrics as files, and with the parent's summary to MLflow."""
    if run._final is not None:
        write_json(Path("metrics") / f"{run.stage}.json", run._final)
    for step, values in run._history.rest():
        run._sink.metrics(values, step=step)
    plot = f"plots/{run.stage}.csv"
    if (run._entry and plot in run._entry.outputs) or (not run._entry and run._history.steps):
        write_text(Path(plot), run._history.csv())
    if isinstance(run._sink, MLflowTracker):
        final = flat_metrics(run._final or {}, run.stage)
        curves = {name for row in run._history.steps.values() for name in row}
        alone = {name: value for name, value in final.items() if name not in curves}
        if alone:
            run._sink.metrics(alone, step=max(run._history.steps, default=0))
        if run._entry and run._workspace and not _flow_parent():
            with suppress(Exception):  # border: as above
                state = project_state(run._workspace)
                state["metrics"].update(final)
                state["run_keys"][run.stage] = run.run_key
                state["dependencies"].update(run._entry.dependencies)
                run._sink.summary(state)
    if run._place and isinstance(run._sink, MLflowTracker) and _dvc_process():
        # DVC has yet to record the outputs. Until it has, a kill would lose them, but not what they came from.
        write_text(run._place / ENDED, run._sink.journal_id)
    elif run._place:
        shutil.rmtree(run._place, ignore_errors=True)  # run again, it starts anew


def _open_tracker(stage: str, params: Params, entry: StageEntry | None) -> MLflowTracker:
    commit, dirty = git_state()
    flow_run, experiment = os.environ.get("RLHF_FLOW_RUN_ID", ""), os.environ.get("DVC_EXP_NAME", "")
    raw = params.model_dump(mode="json")
    shared = {"rlhf.git_commit": commit, "rlhf.git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}
    shared |= {"rlhf.flow_run_id": flow_run, "rlhf.dvc_experiment": experiment}
    shared = {name: value for name, value in shared.items() if value}
    parent, door = _parent(shared, flat_params(raw))
    tags = {**shared, "rlhf.kind": "stage", "rlhf.stage": stage, "rlhf.door": door}
    if entry:
        tags |= {"rlhf.run_key": entry.run_key, **{f"rlhf.dep.{p}": h for p, h in entry.dependencies.items()}}
    return MLflowTracker(stage, params=flat_params(raw.get(stage, {}), stage), tags=tags, parent=parent)


def _flow_parent() -> str:
    """What the flow named as the parent run, or could be found under."""
    flow_run = os.environ.get("RLHF_FLOW_RUN_ID")
    return os.environ.get("RLHF_PARENT_RUN_ID") or (f"key:flow-{flow_run}" if flow_run else "")


def _parent(tags: Mapping[str, str], params: Mapping[str, str]) -> tuple[Parent, str]:
    """The pipeline run of the flow, or one that the stages of this `dvc repro` process share; and the door's name."""
    if ref := _flow_parent():
        return Parent(ref, "flow", {**tags, "rlhf.kind": "pipeline", "rlhf.door": "flow"}, owned=False), "flow"
    me, dvc = psutil.Process(), _dvc_process()
    door = "dvc" if dvc else "python"
    started = (dvc or me).create_time()
    name = tags.get("rlhf.dvc_experiment") or f"{door}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(started))}"
    key = f"key:{door}-{(dvc or me).pid}-{started:.2f}"
    parent_tags = {**tags, "rlhf.kind": "pipeline", "rlhf.door": door}
    return Parent(key, name, parent_tags, params, int(started * 1000)), door


def _dvc_process() -> psutil.Process | None:
    """The `dvc` command that runs this stage."""
    return next((process for process in psutil.Process().parents() if _is_dvc(process)), None)


def _is_dvc(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:3]
    except psutil.Error:
        return False
    return any(Path(word).name in ("dvc", "dvc.exe") for word in words)


def _lineage(stage: str) -> tuple[Workspace | None, StageEntry | None]:
    """The stage in DVC; nothing where it runs outside of a DVC repository."""
    if not ((workspace_root() / ".dvc").is_dir() and (workspace_root() / "dvc.yaml").is_file()):
        return None, None
    try:
        workspace = Workspace()
        return workspace, workspace.entry(stage)
    except Exception as error:  # border: DVC's internals; a stage never fails for its lineage
        print(f"No lineage for {stage}: {str(error)[:200]}", file=sys.stderr, flush=True)
        return None, None


def _checkpoints(stage: str, run_key: str) -> Path:
    return state_folder() / "checkpoints" / stage / run_key[:16]


def _ended(stage: str, run_key: str) -> str:
    """The journal of the run that ended well with this key, if DVC was killed before it had recorded the outputs."""
    file = _checkpoints(stage, run_key) / ENDED
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _claim(folder: Path) -> FileLock | None:
    """The folder for this process alone, until it ends; None where another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / IN_USE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _say_it_is_shared(stage: str) -> None:
    """Two workspaces compute the same, such as two experiments of `dvc exp run --temp`: one of them saves itself.

    Raises:
        ResourceError: it is the work of several processes, of which only this one knows.
    """
    if _many_processes():
        raise ResourceError(
            f"{stage} is being computed by another run with the same values, expected by none. Wait until that has "
            "ended; DVC then takes over what it computed."
        )
    print(
        f"{stage} is being computed by another run too, which keeps the checkpoints; this one keeps none.", flush=True
    )


def _clear_checkpoints(stage: str, run_key: str, workspace: Workspace) -> None:
    """Remove what nobody goes on from: runs whose outputs DVC has, and of this stage all but the last few stopped."""
    own = _checkpoints(stage, run_key)
    for file in (state_folder() / "checkpoints").glob(f"*/*/{ENDED}"):
        if not workspace.recorded(file.parent.name):
            continue
        if file.parent != own:
            _remove_unused(file.parent)
            continue
        for path in (path for path in own.iterdir() if path.name != IN_USE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    others = [other for other in own.parent.glob("*") if other != own]
    with suppress(FileNotFoundError):  # a stage of another workspace clears them too
        for other in sorted(others, key=lambda path: path.stat().st_mtime)[:-KEPT_CONFIGURATIONS]:
            _remove_unused(other)


def _remove_unused(folder: Path) -> None:
    """Remove checkpoints, unless a run is writing there."""
    with suppress(OSError):
        if folder.is_dir() and (lock := _claim(folder)):
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def forget_checkpoints(stages: Collection[str]) -> None:
    """Whatever was stopped of some stages shall start anew."""
    for stage in stages:
        for folder in (state_folder() / "checkpoints" / stage).glob("*"):
            _remove_unused(folder)


# Checks


def check_disk(folder: Path | None = None) -> None:
    """Refuse to begin where the disk would fill up.

    Raises:
        ResourceError: less is free than tasks/preflight.py asks for.
    """
    needed = run_disk_gb()
    for place in {folder or Path.cwd(), project_root()}:
        free = shutil.disk_usage(place).free / 1e9
        if free < needed:
            raise ResourceError(
                f"{free:.1f} GB are free where {place.name}/ lies; a stage needs {needed:g} GB. "
                "`dvc gc --workspace` frees what no present run uses."
            )


def require_watched(run: StageRun, key: str, folder: str) -> None:
    """Refuse a folder that DVC does not watch: it could change, and nothing would be run again."""
    if folder and not run.is_dependency(folder):
        raise ConfigError(
            f"{key} = {folder!r} is none of the deps of stage {run.stage} in dvc.yaml, so DVC would not see it change. "
            f"`rlhf online` and `rlhf constitution` write such a dvc.yaml; by hand, add a line `- {folder}` there."
        )


def _must_exist(path: Path) -> None:
    filled = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if not filled:
        parts = path.parts
        stage = parts[1] if parts[0] == "artifacts" and len(parts) > 1 else "prepare"
        stage = "prepare" if stage == "base" else stage
        what = "is empty" if path.is_dir() else "is missing"
        raise MissingArtifact(f"{path} {what}. Run `dvc repro {stage}`, which writes it.")


def _less_memory(stage: str) -> str:
    """What to change so that the stage needs less."""
    return {
        "sft": "Halve sft.micro_batch_size in params.yaml.",
        "reward": "Halve reward.micro_batch_size or reward.norm_samples in params.yaml.",
        "dpo": "Halve dpo.micro_batch_size in params.yaml.",
        "ppo": "Halve ppo.micro_batch_size, ppo.rollouts or ppo.response_tokens in params.yaml.",
        "evaluate": "Lower evaluate.response_tokens in params.yaml.",
    }.get(stage, "Take a smaller base model.")


@contextmanager
def _as_resource_error(stage: str) -> Iterator[None]:
    """A full disk or memory is the user's to mend, so it gets a message and no traceback."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(f"The memory is used up. {_less_memory(stage)}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC and not isinstance(error, RLHFError):
            raise ResourceError(f"The disk is full ({error.filename or 'while writing'}); free some space.") from error
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise ResourceError(f"The GPU's memory is used up. {_less_memory(stage)}") from error
        raise


@contextmanager
def _keeping_what_diverged(stage: str) -> Iterator[None]:
    """The batch that a loop stopped at goes to a file, for whoever looks for the cause."""
    try:
        yield
    except TrainingDiverged as error:
        from safetensors.torch import save

        rank = f"-{os.environ['RANK']}" if _many_processes() else ""
        path = state_folder() / "diverged" / f"{stage}{rank}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(save({name: tensor.detach().contiguous() for name, tensor in error.batch.items()}))
            os.replace(partial, path)
        except OSError:  # a full disk must not hide what happened
            partial.unlink(missing_ok=True)
            raise error from None
        kept = path.relative_to(project_root())
        raise TrainingDiverged(f"{error} The batch it came from is in {kept}.", error.batch) from error


class Stopping:
    """SIGTERM and SIGINT become Killed, once; what comes while the run is being closed is ignored.

    At once, unless steps are done that no checkpoint holds: then after the step that is under way and its checkpoint,
    or when patience ends.
    """

    def __init__(self) -> None:
        self.unsaved: Unsaved | None = None
        self._before: dict[int, Any] = {}  # handlers that were there

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Heed the signals inside, and give back what heeded them before."""
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            if signal.SIGALRM in self._before:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        if self.unsaved is None or not self.unsaved.steps:
            raise Killed(number)

        def stop(*_: Any) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Killed(number)

        print("Stopping after this step, which is saved first.", file=sys.stderr, flush=True)
        self.unsaved.then = stop
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, STOP_PATIENCE_SECONDS)


def set_up_torch() -> None:
    """The same bytes from the same machine, on the cores that are ours, and memory that is asked for once."""
    import torch

    torch.use_deterministic_algorithms(True)
    # It costs up to a tenth, and serves to find errors only.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    _keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _many_processes():  # torchrun sets one thread for each, however many cores there are
        torch.set_num_threads(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1))
    else:  # in a container, torch counts the host's cores
        torch.set_num_threads(min(torch.get_num_threads(), cores))


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: every page that is given back has to be asked for and cleared again.

    By default a block of megabytes is asked for at each product and given back after it, which costs a training step a
    tenth of its time.
    """
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as malloc.h numbers them; all in bytes
    for name, value in ((mmap_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 28)):
        ctypes.CDLL(None).mallopt(name, value)


# Files


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all: keys sorted, numbers exact, what is not finite as null."""
    text = json.dumps(_finite(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
