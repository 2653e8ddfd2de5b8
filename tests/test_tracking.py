"""tasks/tracking.py against real SQLite stores, a real MLflow server, and servers that do not answer."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from stores import PROJECT, make_by_two_processes, sqlite_store, template

from rlhf_core.errors import ResourceError
from tasks.progress import ProgressLine
from tasks.tracking import (
    MODEL_ALIAS,
    MLflowTracker,
    Parent,
    Replay,
    connect,
    ensure_database,
    experiment_id,
    find_recorded_run,
    finish_pipeline_run,
    newest_pipeline_runs,
    start_pipeline_run,
    sync_outbox,
    write_metrics,
)

PIPELINE = Parent("key:one", "first", {"rlhf.kind": "pipeline"}, {"ppo.kl_coef": "0.05"})


@pytest.fixture
def uri(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of the test's own, which is also the default one."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    store = sqlite_store(tmp_path / ".rlhf", tmp_path_factory)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return store


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / ".rlhf" / "outbox"


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def runs(uri: str) -> dict[str, list[Run]]:
    """All runs by name, oldest first."""
    client = connect(uri)
    by_name: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment_id(client)], order_by=["start_time ASC"]):
        by_name.setdefault(run.info.run_name.partition(" · ")[0], []).append(run)
    return by_name


def record(uri: str, stage: str = "ppo", *, status: str = "FINISHED", steps: int = 3, **options: object) -> bool:
    """A stage that reports what a real one does."""
    tags = {"rlhf.stage": stage, "rlhf.run_key": f"key-of-{stage}"}
    tracker = MLflowTracker(stage, params={f"{stage}.seed": "0"}, tags=tags, parent=PIPELINE, uri=uri)
    tracker.dataset("prompts", "data/prepared", "0" * 32 + ".dir", context="training", profile={"rows": 320})
    for step in range(steps):
        tracker.metrics({f"{stage}/kl": step / 3, f"{stage}/reward": float(step)}, step=step)
        tracker.table("samples", [{"prompt": "hi", "response": f"ho {step}"}], step=step)
    tracker.model("policy", "artifacts/ppo", metrics={"ppo/reward": 2.0}, tags={"rlhf.dvc_hash": "abc.dir"})
    tracker.summary(
        {
            "params": {"ppo.kl_coef": "0.05", "sft.seed": "1"},
            "metrics": {"evaluate/ppo/reward": 1.25},
            "run_keys": {stage: f"key-of-{stage}", "sft": "key-of-sft"},
            "dependencies": {"data/starter": "f" * 32 + ".dir"},
        }
    )
    return tracker.close(status, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_open_a_new_database_at_once(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    shared = template(tmp_path_factory)  # spares the tests behind this one its making
    for child in make_by_two_processes(tmp_path / "mlflow.db" if shared.exists() else shared):
        assert child.returncode == 0, child.stderr


def test_a_database_whose_making_was_cut_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, made = tmp_path / "mlflow.db", []

    def cut_off(engine: Any) -> None:
        with engine.connect() as connection:  # what a kill leaves: some tables, and no word of what version they are
            connection.exec_driver_sql("CREATE TABLE experiment_tags (key VARCHAR)")
        made.append(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.db.utils._initialize_tables", cut_off)
        patch.setattr("mlflow.store.db.utils._all_tables_exist", lambda engine: False)
        with pytest.raises(KeyboardInterrupt):
            ensure_database(f"sqlite:///{database}")
    assert len(made) == 1
    assert not database.exists()
    (tmp_path / "mlflow.db.new-killed").mkdir()  # a kill leaves its folder
    (tmp_path / "mlflow.db.new-killed/mlflow.db").write_bytes(b"half of it")
    for _ in range(2):
        client = connect(f"sqlite:///{database}")
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    assert [path.name for path in tmp_path.glob("*.new*")] == []


def check_recorded(uri: str) -> None:
    """What `record` reported is there, once."""
    found = runs(uri)
    assert {name: len(group) for name, group in found.items()} == {"first": 1, "ppo": 1}
    (run,), (parent,) = found["ppo"], found["first"]
    client = connect(uri)
    assert run.info.status == parent.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.params == {"ppo.seed": "0"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "ppo/kl")] == [
        (0, 0.0),
        (1, 1 / 3),
        (2, 2 / 3),
    ]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("prompts", "0" * 32 + ".dir")
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "prompt", "response"]
    assert table["data"] == [[step, "hi", f"ho {step}"] for step in range(3)]
    version = client.get_model_version_by_alias("policy", MODEL_ALIAS)
    assert (int(version.version), version.source, version.run_id) == (1, "dvc:///artifacts/ppo", run.info.run_id)
    assert version.tags == {"rlhf.path": "artifacts/ppo", "rlhf.dvc_hash": "abc.dir", "metric.ppo/reward": "2.0"}
    assert len(client.search_model_versions("name='policy'")) == 1
    assert parent.data.params == {"ppo.kl_coef": "0.05", "sft.seed": "1"}
    assert parent.data.metrics == {"evaluate/ppo/reward": 1.25}
    assert len(client.get_metric_history(parent.info.run_id, "evaluate/ppo/reward")) == 1
    assert parent.data.tags["rlhf.dep.data/starter"] == "f" * 32 + ".dir"
    assert parent.data.tags["rlhf.ppo.run_id"] == run.info.run_id
    assert parent.data.tags["rlhf.ppo.cached"] == "false"


def test_a_stage_is_recorded_whole(uri: str, outbox: Path) -> None:
    assert record(uri)
    check_recorded(uri)
    assert list(outbox.iterdir()) == []


def test_replaying_a_journal_again_doubles_nothing(uri: str, outbox: Path, closed_port: str) -> None:
    assert not record(closed_port, patience=0.0)
    (journal,) = outbox.glob("*.jsonl")
    kept = shutil.copy(journal, outbox.parent / "kept.jsonl")
    assert sync_outbox(uri=uri) == (1, 0)
    Replay(Path(kept), uri=uri, live=False).pump()
    check_recorded(uri)


def test_a_server_that_refuses_neither_kills_nor_stalls(
    uri: str, outbox: Path, closed_port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    tracker = MLflowTracker("ppo", params={}, tags={}, uri=closed_port)
    for step in range(100):
        tracker.metrics({"ppo/kl": 1.0}, step=step)
    assert time.monotonic() - began < 1.0
    assert tracker.close(patience=1.0) is False
    assert time.monotonic() - began < 5.0
    said = capsys.readouterr().out
    assert said.count("rlhf sync") == 1
    assert closed_port in said
    assert len(list(outbox.glob("*.jsonl"))) == 1


def test_what_a_dead_server_missed_is_sent_exactly_once(uri: str, closed_port: str) -> None:
    assert not record(closed_port, patience=0.0)
    assert sync_outbox(uri=closed_port) == (0, 1)
    assert sync_outbox(uri=uri) == (1, 0)
    assert sync_outbox(uri=uri) == (0, 0)
    check_recorded(uri)


def test_a_server_that_hangs_costs_no_more_than_the_patience(uri: str, silent_server: str) -> None:
    tracker = MLflowTracker("ppo", params={}, tags={}, uri=silent_server)
    time.sleep(0.3)  # the thread is in its first request now
    began = time.monotonic()
    for step in range(100):
        tracker.metrics({"ppo/kl": 1.0}, step=step)
    assert time.monotonic() - began < 1.0  # less than one request's patience
    assert tracker.close(patience=0.5) is False
    assert time.monotonic() - began < 3.0


def test_the_next_stage_sends_what_the_last_could_not(uri: str, outbox: Path, closed_port: str) -> None:
    assert not record(closed_port, patience=0.0)
    (journal,) = outbox.glob("*.jsonl")
    journal.write_text(journal.read_text().replace(closed_port, uri))  # the same address answers again
    tracker = MLflowTracker("evaluate", params={}, tags={}, uri=uri)
    for _ in range(100):
        if not journal.exists():
            break
        time.sleep(0.1)
    assert tracker.close()
    assert [run.info.status for run in runs(uri)["ppo"]] == ["FINISHED"]


def test_a_run_that_another_one_replaces_is_no_finished_one_even_if_it_is_sent_late(
    uri: str, outbox: Path, closed_port: str
) -> None:
    assert not record(closed_port, patience=0.0)
    (journal,) = outbox.glob("*.jsonl")
    journal.write_text(journal.read_text().replace(closed_port, uri))
    for _ in range(2):  # the second time it is recorded already
        tracker = MLflowTracker("ppo", params={}, tags={}, uri=uri)
        tracker.replaces(journal.stem)
        assert tracker.close()
    assert not list(outbox.iterdir())
    by_id = {run.data.tags["rlhf.outbox_id"]: run.info.status for run in runs(uri)["ppo"]}
    assert by_id.pop(journal.stem) == "KILLED"
    assert list(by_id.values()) == ["FINISHED", "FINISHED"]


def test_leftovers_for_another_server_stay(uri: str, outbox: Path, closed_port: str) -> None:
    assert not record(closed_port, patience=0.0)
    assert sync_outbox(only_uri=uri) == (0, 0)
    assert len(list(outbox.glob("*.jsonl"))) == 1


def test_a_journal_in_use_is_left_alone(uri: str) -> None:
    tracker = MLflowTracker("ppo", params={}, tags={}, uri=uri)
    assert sync_outbox(uri=uri) == (0, 0)
    assert tracker.close()
    assert len(runs(uri)["ppo"]) == 1


@pytest.mark.slow
def test_a_stage_killed_with_9_is_closed_by_the_next_sync(uri: str, tmp_path: Path) -> None:
    code = f"""
import os, time
from tasks.tracking import MLflowTracker
tracker = MLflowTracker("ppo", params={{}}, tags={{}}, uri={uri!r})
tracker.metrics({{"ppo/kl": 1.0}}, step=0)
while not tracker.run_id:
    time.sleep(0.05)
tracker.metrics({{"ppo/kl": 2.0}}, step=1)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == -9
    assert [run.info.status for run in runs(uri)["ppo"]] == ["RUNNING"]
    assert sync_outbox() == (1, 0)
    (run,) = runs(uri)["ppo"]
    assert (run.info.status, run.data.metrics) == ("KILLED", {"ppo/kl": 2.0})


def test_an_event_that_the_store_never_takes_blocks_nothing(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MLflowTracker("ppo", params={}, tags={}, uri=uri)
    tracker.model("a/b:c", "artifacts/ppo", metrics={}, tags={})  # no model may be called that
    tracker.metrics({}, step=0)
    tracker.table("a/../../b", [{"prompt": "x"}], step=0)
    tracker.metrics({"ppo/kl": 1.0}, step=0)
    assert tracker.close()
    (run,) = runs(uri)["ppo"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"ppo/kl": 1.0})
    assert "MLflow refused the model of this run" in capsys.readouterr().out


def test_not_a_number_and_odd_names_are_recorded(uri: str) -> None:
    tracker = MLflowTracker("ppo", params={}, tags={}, uri=uri)
    tracker.metrics({"ppo/kl": float("nan"), "ppo/reward@5 (%)": 1.0, "ppo/inf": float("inf")}, step=0)
    assert tracker.close()
    metrics = runs(uri)["ppo"][0].data.metrics
    assert metrics["ppo/kl"] != metrics["ppo/kl"]
    assert metrics["ppo/reward_5____"] == 1.0


@pytest.mark.filterwarnings("default")  # the server's own
def test_a_real_server_takes_the_same(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", uri)
    monkeypatch.setenv("_MLFLOW_SERVER_REGISTRY_STORE", uri)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(tmp_path / "served"))
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server

    for store in ("_tracking_store", "_model_registry_store"):
        monkeypatch.setattr(handlers, store, None)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert record(address)
        assert record(address)
        assert len(runs(address)["ppo"]) == 2
    finally:
        server.shutdown()
        server.server_close()


def test_a_pipeline_run_takes_numbers_that_no_stage_has(uri: str) -> None:
    parent = start_pipeline_run("round", {"rlhf.flow_run_id": "f1"})
    for _ in range(2):
        write_metrics(parent, {"judge/pairs": 12, "judge/cost": 0.25})
    [run] = runs(uri)["round"]
    assert run.data.metrics == {"judge/pairs": 12, "judge/cost": 0.25}
    assert run.info.status == "RUNNING"


def test_a_pipeline_run_is_opened_once_and_ended(uri: str) -> None:
    first = start_pipeline_run("nightly", {"rlhf.flow_run_id": "f1"})
    assert start_pipeline_run("nightly", {"rlhf.flow_run_id": "f1"}) == first
    finish_pipeline_run(first, "FAILED")
    (run,) = runs(uri)["nightly"]
    assert (run.info.run_id, run.info.status, run.data.tags["rlhf.door"]) == (first, "FAILED", "flow")
    assert [recorded.run_id for recorded in newest_pipeline_runs()] == [first]
    found = find_recorded_run(first[:10])
    assert found is not None
    assert found == find_recorded_run("nightly")
    assert find_recorded_run("daily") is None


def test_stages_find_a_pipeline_run_that_could_not_be_opened(
    uri: str, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port)
    parent = start_pipeline_run("nightly", {"rlhf.flow_run_id": "f2"})
    assert parent == "key:flow-f2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert MLflowTracker("sft", params={}, tags={}, parent=Parent(parent, "flow", owned=False)).close()
    finish_pipeline_run(parent)
    assert sync_outbox(uri=uri) == (1, 0)
    assert runs(uri)["sft"][0].data.tags["mlflow.parentRunId"] == runs(uri)["flow"][0].info.run_id
    assert "nightly" not in runs(uri)


def test_a_folder_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="needs a database or server"):
        connect("file:///tmp/mlruns")


def test_progress_prints_first_last_and_in_between_by_time(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("ppo", every=0.2)
    line.latest = {"ppo/reward": 0.421, "ppo/kl": 2.1}
    for done in range(1, 31):
        line.update(done, 30, unit="updates", tokens=100)
        time.sleep(0.025)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("ppo      1/30 updates  3 %")
    assert printed[-1].startswith("ppo      30/30 updates  100 %")
    assert "tokens/s" in printed[1]
    assert " left  reward 0.421  kl 2.1" in printed[1]
    assert 4 <= len(printed) <= 6


def test_progress_of_a_resumed_stage_counts_only_its_own_work(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("ppo", every=0.0)
    time.sleep(0.1)
    line.update(21, 30, unit="updates")
    assert "0:01 left" in capsys.readouterr().out  # nine units at a tenth of a second, not nine at a two-hundredth
