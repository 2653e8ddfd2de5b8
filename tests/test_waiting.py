"""A flow run that waits for people: paused with count and link, judged over real HTTP, and going on by itself."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from person import Person
from sqlalchemy.exc import OperationalError
from toy import PROJECT

from flows import waiting
from flows.server import free_port
from rlhf_core.feedback.rounds import Count

pytestmark = pytest.mark.thorough

FLOW = """
import json, os, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from flows.server import use_server
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print(use_server(Path.cwd()), flush=True)
from prefect import flow
from prefect.runtime import flow_run
from flows.waiting import StoppedByHand, pages, wait_for_people
from rlhf_core.feedback import rounds
from rlhf_core.feedback.exchange import add_items
from rlhf_core.feedback.store import open_store

port, seconds = int(sys.argv[1]), float(sys.argv[2])
rows = [{"prompt": [{"role": "user", "content": f"Question {n}?"}], "responses": ["One.", "Two."], "origins": ["", ""]}
        for n in range(3)]
items = rounds.items_from(rows, "rank")
keys = [item.key() for item in items]
store = open_store("feedback.db")
with store.session() as session:
    add_items(session, items)

def look():
    with store.session() as session:
        return rounds.count(session, keys, overlap=1)

@flow(name="waits", persist_result=False)
def waits():
    try:
        wait()
    except StoppedByHand as stopped:
        return stopped.state()

def wait():
    with pages("feedback.db", port=port, say=print) as served:
        found = wait_for_people(
            str(flow_run.get_id()), look, enough=3, deadline=datetime.now(UTC) + timedelta(seconds=seconds),
            link=served.address + "/rank", what="round 1 of try", every=0.2, tend=served.look_after,
            say=lambda line: print(line, flush=True))
    print("FOUND", *found, flush=True)

waits()
"""


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path_factory.getbasetemp() / "prefect"))
    return tmp_path


class Waits:
    """The flow in a process of its own, and what it says."""

    def __init__(self, folder: Path, *, seconds: float) -> None:
        self.port = free_port()
        command = [sys.executable, "-c", FLOW, str(self.port), str(seconds)]
        env = {**os.environ, "PYTHONPATH": str(PROJECT)}
        with (folder / "flow.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        self.said: list[str] = []
        self.server = self.until("http")

    def until(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if line.startswith(start):
                return line.rstrip()
        raise AssertionError(f"the flow ended without a line {start}: {self.said}")

    def api(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server}/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)

    def state(self, kind: str, message: str = "") -> dict[str, Any]:
        """The flow run, once its state is of this kind and says so."""
        deadline = time.monotonic() + 300  # on a machine with other work the pages alone take a minute
        while time.monotonic() < deadline:
            found = self.api("flow_runs/filter", sort="START_TIME_DESC", flows={"name": {"any_": ["waits"]}})
            if found and found[0]["state_type"] == kind and message in (found[0]["state"]["message"] or ""):
                return dict(found[0])
            time.sleep(0.1)
        raise AssertionError(f"the flow run never was {kind} {message!r}: {found}")


@pytest.fixture
def running(folder: Path) -> Iterator[Any]:
    started: list[Waits] = []

    def start(seconds: float = 120.0) -> Waits:
        started.append(Waits(folder, seconds=seconds))
        return started[-1]

    yield start
    for one in started:
        one.process.terminate()  # Python's end stops the server, too
        one.process.wait()
        one.process.stdout.close()


def judge(person: Person, **changes: Any) -> None:
    item, _ = person.look("rank")
    person.say(item, **{"ranks": [1, 2], **changes})


def test_it_is_paused_with_count_and_link_and_goes_on_when_enough_is_judged(running: Any) -> None:
    flow = running()
    flow.until("round 1 of try waits for people: 0 of 3 judged")
    paused = flow.state("PAUSED", "0 of 3 judged for round 1 of try")
    assert paused["state"]["name"] == "Waiting for people"
    assert f"http://127.0.0.1:{flow.port}/rank" in paused["state"]["message"]
    person = Person(flow.port)
    judge(person)
    flow.state("PAUSED", "1 of 3 judged")
    found = flow.api("artifacts/filter", artifacts={"flow_run_id": {"any_": [paused["id"]]}})
    kinds = {artifact["type"]: artifact for artifact in found}
    assert set(kinds) == {"markdown", "progress"}  # a link is kept as Markdown
    assert f"http://127.0.0.1:{flow.port}/rank" in kinds["markdown"]["data"]
    judge(person)
    judge(person)
    assert flow.until("FOUND") == "FOUND 3 3 0"
    assert "3 of 3 are judged: going on." in flow.said
    assert flow.process.wait(timeout=60) == 0


def test_who_judges_alone_and_skips_one_is_not_waited_for(running: Any) -> None:
    flow = running()
    flow.until("round 1 of try waits for people")
    person = Person(flow.port)
    judge(person)
    judge(person, verdict="skipped", ranks=None)
    judge(person)
    assert flow.until("FOUND") == "FOUND 2 3 0"
    assert "Nobody has anything left to judge: going on with 2 of 3." in flow.said


def test_it_goes_on_at_the_deadline_with_what_there_is(running: Any) -> None:
    flow = running(seconds=30.0)
    flow.until("round 1 of try waits for people")
    judge(Person(flow.port))
    assert flow.until("FOUND") == "FOUND 1 3 2"
    assert "The deadline has passed: going on with 1 of 3." in flow.said


def test_resume_on_prefects_page_goes_on_with_what_there_is(running: Any) -> None:
    flow = running()
    paused = flow.state("PAUSED")
    judge(Person(flow.port))
    flow.state("PAUSED", "1 of 3 judged")
    answer = flow.api(f"flow_runs/{paused['id']}/resume")
    assert answer["status"] == "ACCEPT"
    assert flow.until("FOUND") == "FOUND 1 3 2"
    assert "Resumed by hand: going on with 1 of 3." in flow.said


def test_cancel_on_prefects_page_ends_it(running: Any) -> None:
    flow = running()
    paused = flow.state("PAUSED")
    judge(Person(flow.port))
    answer = flow.api(f"flow_runs/{paused['id']}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert answer["status"] == "ACCEPT"
    assert flow.process.wait(timeout=300) != 0
    assert not any(line.startswith("FOUND") for line in flow.process.stdout)
    with closing(sqlite3.connect(Path(os.environ["PREFECT_HOME"]) / "prefect.db")) as records:
        query = "SELECT state_type FROM flow_run ORDER BY created DESC LIMIT 1"
        assert records.execute(query).fetchone() == ("CANCELLED",)


def test_a_restart_of_prefects_server_or_of_the_database_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, closed = httpx.ConnectError("Connection refused"), OperationalError("SELECT", {}, Exception("closed"))
    counts: list[Any] = [Count(0, 2, 2), closed, closed, Count(1, 2, 1), Count(2, 2, 0)]
    answers: list[Any] = [None, refused, None, None]  # paused, paused with another count, running
    paused: list[Any] = [refused, True]

    def next_of(what: list[Any]) -> Any:
        if isinstance(found := what.pop(0), Exception):
            raise found
        return found

    monkeypatch.setattr(waiting, "_set_state", lambda run, state: next_of(answers))
    monkeypatch.setattr(waiting, "_still_paused", lambda run: next_of(paused))
    for name in ("create_link_artifact", "create_progress_artifact", "update_progress_artifact"):
        monkeypatch.setattr(waiting, name, lambda *_, **__: 1)
    said: list[str] = []
    tended: list[None] = []
    found = waiting.wait_for_people(
        str(uuid4()), lambda: next_of(counts), enough=2, deadline=datetime.now(UTC) + timedelta(hours=1),
        link="", what="it", every=0.01, say=said.append, tend=lambda: tended.append(None),
    )  # fmt: skip
    assert found == Count(2, 2, 0)
    assert (counts, answers, paused) == ([], [], [])
    away = [line.partition(": ")[2] for line in said if line.startswith("A server is away")]
    assert away == ["(builtins.Exception) closed", "Connection refused", "Connection refused"]
    assert len(tended) == 6  # at each look, and before each repeat


def test_pages_that_died_are_started_again_as_they_were_and_their_command_tells_no_password(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    database, said = str(folder / "judged.db"), []
    (folder / "mine.md").write_text("Judge by the **moon**.")
    guideline = str(folder / "mine.md")
    with waiting.pages(database, port=free_port(), guideline=guideline, say=said.append) as served:
        first = psutil.Process(served.process.pid)
        assert database not in " ".join(first.cmdline())
        assert Path(database).is_file()
        served.look_after()
        assert (said, served.process.pid) == ([], first.pid)
        first.kill()
        served.process.wait()
        served.look_after()
        assert served.process.pid != first.pid
        waiting._wait_until_served(served.address, served.process, served.log)
        assert (
            "Judge by the <strong>moon</strong>." in urllib.request.urlopen(served.address, timeout=20).read().decode()
        )
        served.process.kill()
        served.process.wait()
        served.look_after()  # those that end at once are not started at each look
        assert served.process.poll() is not None
    assert [line.startswith("The pages for people ended") for line in said] == [True]
