"""Everything that touches MLflow, and the journal that makes it safe to be without.

A stage's events go to `.rlhf/outbox/<id>.jsonl` first; a thread replays that file into MLflow. Every step of the replay
may be repeated without doubling anything (runs are found again by a tag, points carry the time they were journaled), so
a server that is away costs nothing but a later `rlhf sync`, and a stage killed with -9 is closed by the next one.
What is read for comparison is here too. Nothing else imports mlflow.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from rlhf_core.errors import ResourceError
from tasks.environment import recipe_workspace, record_folder, state_folder
from tasks.lineage import find_revision, git_state, metric_name, project_state
from tasks.progress import ProgressLine

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MODEL_ALIAS = "current"  # MLflow keeps "latest" for itself: models:/NAME/latest is the newest version anyway
PATIENCE_SECONDS = 10.0  # how long a stage's end waits for MLflow; RLHF_TRACKER_PATIENCE overrides
_LONGEST_PAUSE = 60.0
_TABLE_SECONDS = 60.0  # a growing table is sent again at most this often, and at the end
_JOIN_SECONDS = 2.0  # how long a stage that gives up waits for the request that is under way
_PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS"}


# Places


def experiment_name() -> str:
    """The MLflow experiment that runs are put in: MLFLOW_EXPERIMENT_NAME, or one for the project and one a recipe."""
    recipe = recipe_workspace()
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or (f"rlhf-{recipe[1]}" if recipe else "rlhf")


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or SQLite under the project by an absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{record_folder() / 'mlflow.db'}"


def _now() -> int:
    return int(time.time() * 1000)


# Opening MLflow


def ensure_database(uri: str) -> None:
    """Create or upgrade a SQLite store once, under a file lock: processes that open a new one at once would die.

    A new one is made under another name and moved into place: MLflow cannot open one whose making was cut off. A file
    beside the database names the MLflow version that last did so; a store of another version is copied first.
    """
    if not uri.startswith("sqlite:///"):
        return
    import mlflow
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine_with_retry

    database = Path(uri.removeprefix("sqlite:///"))
    marker = Path(f"{database}.version")
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        if database.is_file() and marker.is_file() and marker.read_text() == mlflow.__version__:
            return
        if database.is_file() and database.stat().st_size:
            shutil.copyfile(database, f"{database}.before-upgrade")
        else:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            for left in database.parent.glob(f"{database.name}.new-*"):  # of a start that was killed
                shutil.rmtree(left)
            with TemporaryDirectory(dir=database.parent, prefix=f"{database.name}.new-") as folder:
                new = Path(folder) / database.name
                store = SqlAlchemyStore(f"sqlite:///{new}", str(database.parent / "mlartifacts"))
                store.engine.dispose()
                new.replace(database)
        engine = create_sqlalchemy_engine_with_retry(uri)
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # the UI reads while a stage writes
        _upgrade_db(engine)
        engine.dispose()
        marker.write_text(mlflow.__version__)


def connect(uri: str | None = None) -> "MlflowClient":
    """A client for the store; the database is made ready first.

    Raises:
        ResourceError: the address of a server is not reachable at all.
    """
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a failure is told once, by the tracker
    uri = uri or tracking_uri()
    if uri.startswith(("file:", "./", "/")):
        raise ResourceError(
            f"MLFLOW_TRACKING_URI is {uri}; MLflow needs a database or server: sqlite:////path or http://host"
        )
    ensure_database(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_id(client: "MlflowClient", name: str | None = None) -> str:
    """The experiment's id; it is created where missing, with artifacts beside a SQLite store."""
    from mlflow.exceptions import MlflowException

    name = name or experiment_name()
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = str(client.tracking_uri)
    beside = None
    if uri.startswith("sqlite:///"):
        beside = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / metric_name(name)).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=beside))
    except MlflowException:
        again = client.get_experiment_by_name(name)  # another process was faster
        if again is None:
            raise
        return str(again.experiment_id)


def _find_run(client: "MlflowClient", experiment: str, **tags: str) -> "Run | None":
    """The newest run with these tags; `__` in a name stands for a dot."""
    clauses = [f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items()]
    runs = client.search_runs([experiment], " and ".join(clauses), order_by=["start_time DESC"], max_results=1)
    return runs[0] if runs else None


# The journal and its replay


class Journal:
    """An append-only file of events; one line each, flushed, so that a killed process loses nothing."""

    def __init__(self, folder: Path, *, name: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.id = f"{name}-{uuid.uuid4().hex[:16]}" if name else uuid.uuid4().hex[:16]
        self.path = folder / f"{self.id}.jsonl"
        self.lock = FileLock(f"{self.path}.lock")
        self.lock.acquire()
        self.events = 0
        self._file = self.path.open("a", encoding="utf-8")
        self._writing = threading.Lock()

    def append(self, event: str, **fields: Any) -> None:
        """Write one event with its time."""
        line = json.dumps({"event": event, "time": _now(), **fields}, ensure_ascii=False, default=str)
        with self._writing:
            self._file.write(line + "\n")
            self._file.flush()
            self.events += 1

    def close(self, *, delete: bool) -> None:
        """Let others have it, or remove it once everything is sent."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)
        self.lock.release()
        if delete:
            Path(f"{self.path}.lock").unlink(missing_ok=True)


@dataclass
class Replay:
    """Sends one journal to MLflow from where it left off; `run_id` is known once the run exists."""

    path: Path
    client: "MlflowClient | None" = None
    uri: str | None = None
    live: bool = True
    run_id: str | None = None
    parent_id: str | None = None
    ended: bool = False
    _experiment: str = ""
    _owns_parent: bool = False
    _offset: int = 0
    _tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _unsent_tables: set[str] = field(default_factory=set)
    _tables_sent: float = field(default_factory=time.monotonic)
    _last_time: int = 0

    def pump(self, stop: threading.Event | None = None) -> None:
        """Send what has been appended since the last call; an exception leaves the place for the next call.

        Args:
            stop: checked before each step; once set, nothing more is sent.

        Raises: whatever MLflow's client raises where the store does not answer.
        """
        for events, offset in self._groups():
            if stop is not None and stop.is_set():
                return
            self._guarded(events)
            self._offset = offset
            self._last_time = events[-1]["time"]
        if self._unsent_tables and time.monotonic() - self._tables_sent > _TABLE_SECONDS:
            self._guarded([{"event": "tables"}])

    def close_dead(self) -> None:
        """End the run of a process that died without saying so."""
        if self.run_id and not self.ended:
            self._guarded([{"event": "end", "status": "KILLED", "time": self._last_time}])

    def _groups(self) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Complete lines behind the offset; neighbouring metric events up to MLflow's batch size in one group."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            group: list[dict[str, Any]] = []
            points, offset = 0, self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                event = json.loads(line)
                size = len(event["values"]) if event["event"] == "metrics" else 1000
                if group and (points + size > 1000 or event["event"] != group[0]["event"]):
                    yield group, offset
                    group, points = [], 0
                group.append(event)
                points += size
                offset += len(line)
            if group:
                yield group, offset

    def _guarded(self, events: list[dict[str, Any]]) -> None:
        """Apply events; one that the store will never take is reported and passed over, so that it blocks nothing."""
        from mlflow.exceptions import MlflowException

        kind = events[0]["event"]
        try:
            if kind == "end" and self._unsent_tables:
                self._guarded([{"event": "tables"}])
            self._apply(events)
        except (
            MlflowException,
            PermissionError,
            ImportError,
        ) as error:  # of files: no right or no client for that store
            if kind == "start" or getattr(error, "error_code", "BAD_REQUEST") not in _PERMANENT:
                raise
            print(f"MLflow refused the {kind} of this run: {_first_line(error)}", flush=True)
            if kind == "tables":
                self._unsent_tables.clear()
            self.ended = self.ended or kind == "end"

    def _apply(self, events: list[dict[str, Any]]) -> None:
        kind = events[0]["event"]
        if kind == "metrics":
            self._send_metrics(events)
        else:
            getattr(self, f"_on_{kind}")(events[0])

    def _run(self) -> tuple["MlflowClient", str]:
        assert self.client is not None, "a journal opens with a start event"
        assert self.run_id is not None, "only a stage's journal holds its events"
        return self.client, self.run_id

    def _on_start(self, event: dict[str, Any]) -> None:
        self.uri = self.uri or event["uri"]
        self.client = self.client or connect(self.uri)
        self._experiment = experiment_id(self.client, event["experiment"])
        parent = event.get("parent")
        if parent:
            self.parent_id = self._parent(parent)
        if not event.get("name"):  # a journal about a pipeline run only
            return
        found = _find_run(self.client, self._experiment, rlhf__outbox_id=event["id"])
        if found is None:
            tags = {**event["tags"], "rlhf.outbox_id": event["id"], "mlflow.runName": event["name"]}
            if self.parent_id:
                tags["mlflow.parentRunId"] = self.parent_id
                # Where curves of two runs lie over each other, the legend has this name and no more.
                tags["mlflow.runName"] += f" · {self.client.get_run(self.parent_id).info.run_name}"
            found = self.client.create_run(self._experiment, start_time=event["time"], tags=tags)
        self.run_id = str(found.info.run_id)
        _send_params(self.client, self.run_id, event["params"])

    def _parent(self, parent: dict[str, Any]) -> str:
        """The parent's run id: the one given, or the run with the given key, created where missing."""
        assert self.client is not None
        if not parent["ref"].startswith("key:"):
            return str(parent["ref"])
        key = parent["ref"].removeprefix("key:")
        self._owns_parent = bool(parent.get("owned"))
        found = _find_run(self.client, self._experiment, rlhf__parent_key=key)
        if found is None:
            tags = {**parent["tags"], "rlhf.parent_key": key, "mlflow.runName": parent["name"]}
            found = self.client.create_run(self._experiment, start_time=parent["time"], tags=tags)
            _send_params(self.client, found.info.run_id, parent.get("params", {}))
        elif self._owns_parent and self.live and found.info.status != "RUNNING":
            self.client.update_run(found.info.run_id, status="RUNNING")
        return str(found.info.run_id)

    def _send_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        client, run_id = self._run()
        points = [Metric(name, value, e["time"], e["step"]) for e in events for name, value in e["values"].items()]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])

    def _on_table(self, event: dict[str, Any]) -> None:
        rows = self._tables.setdefault(event["name"], [])
        rows.extend({"step": event["step"], **row} for row in event["rows"])
        self._unsent_tables.add(event["name"])

    def _on_tables(self, event: dict[str, Any]) -> None:
        """Each table as one JSON file in the form that MLflow's UI shows as a table."""
        client, run_id = self._run()
        for name in sorted(self._unsent_tables):
            rows = self._tables[name]
            columns = list(dict.fromkeys(column for row in rows for column in row))
            table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
            client.log_text(run_id, json.dumps(table, ensure_ascii=False), _table_file(name))
        shown = [{"path": _table_file(name), "type": "table"} for name in sorted(self._tables)]
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(shown))
        self._unsent_tables.clear()
        self._tables_sent = time.monotonic()

    def _on_dataset(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run_id = self._run()
        dataset = Dataset(
            name=event["name"],
            digest=event["hash"][:36],
            source_type="local",
            source=json.dumps({"uri": event["path"]}),
            profile=json.dumps({"path": event["path"], "dvc_hash": event["hash"], **event.get("profile", {})}),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])])

    def _on_model(self, event: dict[str, Any]) -> None:
        """A version whose source is a pointer, `dvc:///folder`: a server refuses folders outside its artifacts."""
        from mlflow.exceptions import MlflowException

        client, run_id = self._run()
        with suppress(MlflowException):
            client.create_registered_model(
                event["name"], description="Folder versioned by DVC; see the version's tags."
            )
        versions = client.search_model_versions(f"name='{event['name']}'")
        version = next((v for v in versions if v.run_id == run_id and v.tags.get("rlhf.path") == event["path"]), None)
        if version is None:
            tags = {f"metric.{name}": repr(value) for name, value in event["metrics"].items()} | event["tags"]
            source = f"dvc:///{event['path']}"
            version = client.create_model_version(event["name"], source, run_id, tags=tags, await_creation_for=0)
        if all(int(v.version) <= int(version.version) for v in versions):
            client.set_registered_model_alias(event["name"], MODEL_ALIAS, str(version.version))

    def _on_tags(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        client, run_id = self._run()
        client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in event["tags"].items()])

    def _on_replaces(self, event: dict[str, Any]) -> None:
        """A run whose outputs were lost before DVC had them is no finished one, whatever its own journal says."""
        _send_leftover(self.path.with_name(f"{event['id']}.jsonl"), only_uri=self.uri)
        assert self.client is not None
        lost = _find_run(self.client, self._experiment, rlhf__outbox_id=event["id"])
        if lost is not None:
            self.client.set_terminated(lost.info.run_id, "KILLED", lost.info.end_time)

    def _on_summary(self, event: dict[str, Any]) -> None:
        if self.client is not None and self.parent_id:
            own = {event["stage"]: self.run_id} if event.get("stage") and self.run_id else {}
            _apply_summary(self.client, self._experiment, self.parent_id, event["summary"], own)

    def _on_text(self, event: dict[str, Any]) -> None:
        if self.client is not None and self.parent_id:
            self.client.log_text(self.parent_id, event["text"], event["file"])

    def _on_end(self, event: dict[str, Any]) -> None:
        if self.client is not None and self.run_id:
            self.client.set_terminated(self.run_id, event["status"], event["time"])
        if self.client is not None and self.parent_id and (self._owns_parent or not self.run_id):
            parent = self.client.get_run(self.parent_id).info
            if not parent.end_time or parent.end_time <= event["time"]:
                self.client.set_terminated(self.parent_id, event["status"], event["time"])
        self.ended = True

    def _on_done(self, event: dict[str, Any]) -> None:
        self.ended = True


def _table_file(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-]", "_", name) + ".json"


def _send_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    """Log the parameters that the run does not have yet; MLflow never changes one."""
    from mlflow.entities import Param

    have = client.get_run(run_id).data.params
    missing = [Param(name, value[:6000]) for name, value in params.items() if name not in have]
    for start in range(0, len(missing), 100):
        client.log_batch(run_id, params=missing[start : start + 100])


def _apply_summary(
    client: "MlflowClient", experiment: str, run_id: str, summary: Mapping[str, Any], own: Mapping[str, str]
) -> None:
    """Bring a parent run up to a summary: params, final metrics, and which run computed each stage."""
    from mlflow.entities import Metric, RunTag

    data = client.get_run(run_id).data
    _send_params(client, run_id, summary["params"])
    now = _now()
    changed = [Metric(n, v, now, 0) for n, v in summary["metrics"].items() if data.metrics.get(n) != v]
    tags = {f"rlhf.dep.{path}": value for path, value in summary["dependencies"].items()} | summary.get("tags", {})
    for stage, key in summary["run_keys"].items():
        tags[f"rlhf.{stage}.run_key"] = key
        computed = own.get(stage) or _computed_by(client, experiment, key)
        if computed:
            tags[f"rlhf.{stage}.run_id"] = computed
            parent = client.get_run(computed).data.tags.get("mlflow.parentRunId")
            tags[f"rlhf.{stage}.cached"] = "false" if parent == run_id else "true"
    new_tags = [RunTag(name, value) for name, value in tags.items() if data.tags.get(name) != value]
    for start in range(0, max(len(changed), len(new_tags)), 100):
        client.log_batch(run_id, metrics=changed[start : start + 100], tags=new_tags[start : start + 100])


def _computed_by(client: "MlflowClient", experiment: str, run_key: str) -> str | None:
    """The newest finished run with this run key."""
    clause = f"tags.`rlhf.run_key` = '{run_key}' and attributes.status = 'FINISHED'"
    runs = client.search_runs([experiment], clause, order_by=["start_time DESC"], max_results=1)
    return str(runs[0].info.run_id) if runs else None


# The tracker


@dataclass(frozen=True)
class Parent:
    """The pipeline run that a stage belongs to: an MLflow run id, or `key:…` where it is to be found or made."""

    ref: str
    name: str = "pipeline"
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    time: int = field(default_factory=_now)
    owned: bool = True  # nobody else will end it


class MLflowTracker:
    """Records a stage to MLflow through its journal; see rlhf_core.tracking.Tracker for the loop's side of it."""

    def __init__(
        self,
        stage: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        parent: Parent | None = None,
        uri: str | None = None,
        outbox: Path | None = None,
    ) -> None:
        from mlflow import MlflowClient  # noqa: F401  here, since a thread's import could collide with the stage's own

        self.stage = stage
        self.uri = uri or tracking_uri()
        self._outbox = outbox or state_folder() / "outbox"
        self._journal = Journal(self._outbox, name=stage)
        self._replay = Replay(self._journal.path)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._done, self._given_up = threading.Event(), threading.Event()
        self._problem = ""
        self._journal_failed = False
        self._bar = ProgressLine(stage)
        self._append("start", **_start(self._journal.id, stage, self.uri, params, tags, parent))
        self._thread = threading.Thread(target=self._ship, name=f"mlflow-{stage}", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once MLflow has answered."""
        return self._replay.run_id

    @property
    def journal_id(self) -> str:
        """What names this run in the outbox and, as tag rlhf.outbox_id, in MLflow."""
        return self._journal.id

    def replaces(self, journal_id: str) -> None:
        """Say that this run stands for an earlier one, whose outputs were lost; that one is then KILLED."""
        self._append("replaces", id=journal_id)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values named `stage/quantity` at a step."""
        self._append("metrics", step=step, values={metric_name(n): float(v) for n, v in values.items()})
        self._bar.latest.update(values)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Add rows to a table of the run."""
        self._append("table", name=name, step=step, rows=[dict(row) for row in rows])

    def remark(self, name: str, text: str) -> None:
        """Keep a remark as a tag of the run, rlhf.<name>."""
        self._append("tags", tags={f"rlhf.{name.replace('/', '.')}": text[:5000]})

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        """Print how far the stage is, at most every five seconds."""
        self._bar.update(done, total, unit=unit, tokens=tokens, note=note)

    def dataset(self, name: str, path: str, dvc_hash: str, *, context: str, profile: Mapping[str, Any]) -> None:
        """Record a data set that the stage used."""
        self._append("dataset", name=name, path=path, hash=dvc_hash, context=context, profile=dict(profile))

    def model(self, name: str, path: str, *, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Register a folder as a new version of a model."""
        self._append("model", name=name, path=path, metrics=dict(metrics), tags={"rlhf.path": path, **tags})

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Bring the parent run up to date; `project_state` and the stage's own results make a summary."""
        self._append("summary", stage=self.stage, summary=dict(summary))

    def close(self, status: str = "FINISHED", *, patience: float | None = None) -> bool:
        """End the run; False, after one printed line, where MLflow did not take everything in time."""
        if patience is None:
            patience = float(os.environ.get("RLHF_TRACKER_PATIENCE") or PATIENCE_SECONDS)
        self._append("end", status=status)
        self._closing.set()
        self._wake.set()
        sent = self._done.wait(patience)
        self._given_up.set()
        if not sent:
            # What is under way must end before others may have the journal, or both would send it.
            self._thread.join(_JOIN_SECONDS)
            print(
                f"MLflow at {_shown(self.uri)} did not take this run's numbers ({self._problem or 'no answer'}). "
                f"They are kept in {self._journal.path}; send them with `rlhf sync`.",
                flush=True,
            )
        self._journal.close(delete=sent)
        return sent

    def _append(self, event: str, **fields: Any) -> None:
        try:
            self._journal.append(event, **fields)
        except OSError as error:  # the training goes on without its numbers; a full disk ends it soon enough
            if not self._journal_failed:
                print(f"Cannot write {self._journal.path}: {error}. Metrics from here on are lost.", flush=True)
            self._journal_failed = True
        self._wake.set()

    def _ship(self) -> None:
        """The thread: send, wait for more, and after a failure wait longer. Ends when all is sent."""
        pause, leftovers = 1.0, True
        while not self._given_up.is_set():
            self._wake.clear()
            try:
                self._replay.pump(self._given_up)
                if self._replay.ended:
                    self._done.set()
                    return
                if leftovers:  # what earlier stages could not send, once this one has its run
                    leftovers = False
                    sync_outbox(outbox=self._outbox, only_uri=self.uri, stop=self._closing)
                pause = 1.0
                if not self._closing.is_set():
                    self._wake.wait()
                    self._closing.wait(1.0)  # gather a second's steps into one call
            except Exception as error:  # border: whatever MLflow or the network does, the stage goes on
                if not self._problem and not self._closing.is_set():
                    print(f"MLflow does not answer ({_first_line(error)}); the stage goes on.", flush=True)
                self._problem = _first_line(error)
                if self._closing.is_set():
                    self._given_up.wait(0.5)
                else:
                    self._closing.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)


def _start(
    journal: str, name: str, uri: str, params: Mapping[str, str], tags: Mapping[str, str], parent: Parent | None
) -> dict[str, Any]:
    return {
        "id": journal,
        "name": name,
        "uri": uri,
        "experiment": experiment_name(),
        "params": dict(params),
        "tags": {"mlflow.source.name": "rlhf", "mlflow.user": os.environ.get("USER", "rlhf"), **tags},
        "parent": {**vars(parent), "tags": dict(parent.tags), "params": dict(parent.params)} if parent else None,
    }


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _shown(uri: str) -> str:
    """The address without a password."""
    return re.sub(r"//[^@/]*@", "//", uri)


# Leftovers


def outboxes() -> list[Path]:
    """Where journals wait: in the project, and in the workspaces of its recipes, campaigns and sweeps."""
    folder = state_folder()
    return [folder / "outbox", *sorted(folder.glob("*/.rlhf/outbox"))]


def sync_outbox(
    *,
    outbox: Path | None = None,
    uri: str | None = None,
    only_uri: str | None = None,
    stop: threading.Event | None = None,
) -> tuple[int, int]:
    """Send what stages could not send, each journal exactly once; those of running stages are left alone.

    A stage that died without ending its run has it ended as KILLED.

    Args:
        outbox: the folder of journals.
        uri: send there, in place of the address each journal was written for.
        only_uri: leave journals for other addresses where they are.
        stop: checked between journals.

    Returns:
        How many journals were sent, and how many are left.
    """
    outbox = outbox or state_folder() / "outbox"
    sent = left = 0
    for path in sorted(outbox.glob("*.jsonl"), key=lambda journal: journal.stat().st_mtime):
        if stop is not None and stop.is_set():
            break
        try:
            sent += _send_leftover(path, uri=uri, only_uri=only_uri)
        except Timeout:  # a stage is writing it
            continue
        except Exception as error:  # border: the store's or the network's failure is told, the journal stays
            left += 1
            print(f"{path.name} stays in the outbox: {_first_line(error)}", flush=True)
    return sent, left


def _send_leftover(path: Path, *, uri: str | None = None, only_uri: str | None = None) -> bool:
    """Send the journal of a process that is gone, and remove it; False where there is none or it is not for only_uri.

    Raises:
        Timeout: its process lives.
    """
    if not path.is_file():
        return False
    lock = FileLock(f"{path}.lock")
    lock.acquire(timeout=0)
    try:
        if not path.is_file():
            return False
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        if first.endswith("\n"):
            if only_uri and json.loads(first)["uri"] != only_uri:
                return False
            replay = Replay(path, uri=uri, live=False)
            replay.pump()
            replay.close_dead()
        path.unlink()
        return True
    finally:
        lock.release()
        if not path.exists():
            Path(f"{path}.lock").unlink(missing_ok=True)


# Pipeline runs: parents of the stages' runs


def start_pipeline_run(name: str, tags: Mapping[str, str] | None = None, *, key: str = "") -> str:
    """Open the parent of a pipeline's stage runs; a repeated start of the same Prefect flow run finds it again.

    Args:
        key: find it by this in place of the flow run, where several flow runs may work on one pipeline run.

    Returns:
        What stages get as RLHF_PARENT_RUN_ID: the MLflow run id, or `key:…` while MLflow does not answer. All
        functions here take either.
    """
    tags = dict(tags or {})
    flow_run = tags.get("rlhf.flow_run_id")
    key = key or (f"flow-{flow_run}" if flow_run else uuid.uuid4().hex)
    commit, dirty = git_state()
    own = {"rlhf.kind": "pipeline", "rlhf.door": "flow"}
    if commit:
        own |= {"rlhf.git_commit": commit, "rlhf.git_dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}
    parent = Parent(f"key:{key}", name, {**own, **tags}, owned=False)
    return _send_now(parent).parent_id or parent.ref


def finish_pipeline_run(run_id: str, status: str = "FINISHED") -> None:
    """End a pipeline run as FINISHED, FAILED or KILLED."""
    _send_now(Parent(run_id, owned=False), ("end", {"status": status}))


@contextmanager
def pipeline_run(
    name: str, tags: Mapping[str, str] | None = None, *, key: str = "", summary: bool = True
) -> Iterator[str]:
    """A pipeline run around what happens inside: FINISHED, FAILED after an error, KILLED by Ctrl-C or a cancelled run.

    Args:
        name, tags, key: as in `start_pipeline_run`, whose answer is what this gives.
        summary: write the run's summary at the end, however it ends.
    """
    parent, status = start_pipeline_run(name, tags, key=key), "KILLED"
    try:
        yield parent
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        if summary:
            write_summary(parent)
        finish_pipeline_run(parent, status)


def write_summary(run_id: str) -> None:
    """Give a pipeline run all params, final metrics, data hashes and, for each stage, the run that computed it.

    Read from the workspace; a stage that is out of date there is left out. Repeating it changes nothing.
    """
    try:
        state = project_state()
    except Exception as error:  # border: DVC's internals, a broken params.yaml; the pipeline's own message matters more
        print(f"No summary of this run: {_first_line(error)}", flush=True)
        return
    _send_now(Parent(run_id, owned=False), ("summary", {"summary": state}))


def write_artifact(run_id: str, name: str, text: str) -> None:
    """Give a pipeline run a text file as an artifact; repeating it puts the new text in the old one's place."""
    _send_now(Parent(run_id, owned=False), ("text", {"file": name, "text": text}))


def write_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    """Give a pipeline run numbers that no stage has; repeating it changes nothing."""
    empty: dict[str, Any] = {"params": {}, "dependencies": {}, "run_keys": {}}
    _send_now(Parent(run_id, owned=False), ("summary", {"summary": {**empty, "metrics": dict(metrics)}}))


def project_summary(rev: str) -> str:
    """The same for any git revision or DVC experiment, in a pipeline run of its own that is made once; its id."""
    state = project_state(rev=rev)
    commit = find_revision(rev) or rev
    tags = {"rlhf.kind": "pipeline", "rlhf.door": "summary", "rlhf.git_commit": commit}
    parent = Parent(f"key:rev-{commit}", rev, tags, owned=False)
    replay = _send_now(parent, ("summary", {"summary": state}), ("end", {"status": "FINISHED"}))
    return replay.parent_id or parent.ref


def _send_now(parent: Parent, *events: tuple[str, dict[str, Any]]) -> Replay:
    """Journal events about a pipeline run and try once to send them; what fails stays for later."""
    from mlflow import MlflowClient  # noqa: F401

    journal = Journal(state_folder() / "outbox", name="pipeline")
    journal.append("start", **_start(journal.id, "", tracking_uri(), {}, {}, parent))
    for event, fields in (*events, ("done", {})):
        journal.append(event, **fields)
    replay = Replay(journal.path)
    try:
        replay.pump()
    except Exception as error:  # border: MLflow being away stops no pipeline
        print(
            f"MLflow at {_shown(tracking_uri())} does not answer ({_first_line(error)}); `rlhf sync` sends it.",
            flush=True,
        )
    journal.close(delete=replay.ended)
    return replay


# Reading, for comparisons


@dataclass(frozen=True)
class RecordedRun:
    """What MLflow knows of a run."""

    run_id: str
    name: str
    experiment: str
    status: str
    started: int
    params: dict[str, str]
    metrics: dict[str, float]
    dependencies: dict[str, str]
    stages: dict[str, str]  # stage -> id of the run that computed it and has its curves


def find_recorded_run(name: str) -> RecordedRun | None:
    """The run with this id (or its first 8 or more digits), or the newest pipeline run of this name."""
    client = connect()
    experiment = experiment_id(client)
    if re.fullmatch(r"[0-9a-f]{8,32}", name):
        runs = client.search_runs([experiment], max_results=5000)
        hits = [run for run in runs if run.info.run_id.startswith(name)]
        if len(hits) == 1:
            return _recorded(hits[0])
    if "'" in name:
        return None
    run = _find_run(client, experiment, rlhf__kind="pipeline", mlflow__runName=name)
    return _recorded(run) if run else None


def newest_pipeline_runs(count: int = 5) -> list[RecordedRun]:
    """The pipeline runs that were started last."""
    client = connect()
    clause = "tags.`rlhf.kind` = 'pipeline'"
    runs = client.search_runs([experiment_id(client)], clause, order_by=["start_time DESC"], max_results=count)
    return [_recorded(run) for run in runs]


def _recorded(run: "Run") -> RecordedRun:
    tags = run.data.tags
    return RecordedRun(
        run_id=run.info.run_id,
        name=tags.get("mlflow.runName", ""),
        experiment=run.info.experiment_id,
        status=run.info.status,
        started=run.info.start_time,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        dependencies={k.removeprefix("rlhf.dep."): v for k, v in tags.items() if k.startswith("rlhf.dep.")},
        stages={found[1]: v for k, v in tags.items() if (found := re.fullmatch(r"rlhf\.(\w+)\.run_id", k))},
    )
