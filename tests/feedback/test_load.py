"""Several people at once on a real server, on SQLite and on PostgreSQL: nothing lost, nothing twice."""

import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from people import PASSWORD, RANKINGS, SECRET, Person, log_in
from person import Person as Caller
from sqlalchemy import Connection, create_engine, event, select, text
from test_store import open_at_once

from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import add_user
from rlhf_core.feedback.app import create_app
from rlhf_core.feedback.store import Base, Judgement, open_store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import feedback_load


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    if missing := feedback_load.missing_for_postgres():
        pytest.skip(missing)
    with feedback_load.postgres() as url:
        yield url


def clean(found: feedback_load.Load) -> bool:
    return (found.lost, found.doubled, found.too_often) == (0, 0, 0)


@pytest.mark.slow
def test_five_people_at_once_lose_nothing(tmp_path: Path) -> None:
    found = feedback_load.load(tmp_path, str(tmp_path / "feedback.db"), people=5, each=8, think=0.02)
    assert clean(found), found
    assert len(found.sends) == 40


# `kill -9` by the server's own hand: it is a matter of a millisecond.
KILLED = {
    "before it is committed": """
def killed(session, *given, known=judging.submit, **named):
    known(session, *given, **named)
    os.kill(os.getpid(), signal.SIGKILL)
judging.submit = killed
""",
    "before it is answered": """
def killed(work):
    work()
    os.kill(os.getpid(), signal.SIGKILL)
pages._again_if_outrun = killed
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("when", KILLED)
def test_a_judgement_at_which_the_server_is_killed_is_sent_again_and_stored_once(when: str, tmp_path: Path) -> None:
    database, port = tmp_path / "feedback.db", feedback_load.free_port()
    store = open_store(database)
    with store.session() as session:
        rows = [(1, RANKINGS[0])]
        exchange.add_items(session, exchange.find_items("rows", rows, kind=None, policies=("", ""), how=""))
    code = f"import os, signal\nfrom rlhf_core.feedback import judging, pages\n{KILLED[when]}\n{feedback_load.RLHF}"
    server = feedback_load.start(tmp_path, port, "--database", str(database), code=code)
    someone = Caller(port)
    item, _ = someone.look("rank")
    with pytest.raises(ConnectionError):
        someone.say(item, [1, 2, 3])
    assert server.wait(timeout=30) == -signal.SIGKILL
    with store.session() as session:
        assert len(session.scalars(select(Judgement)).all()) == (when == "before it is answered")
    server = feedback_load.start(tmp_path, port, "--database", str(database))
    try:
        for _ in range(2):
            someone.say(item, [1, 2, 3])
    finally:
        server.kill()
        server.wait()
    with store.session() as session:
        assert len(session.scalars(select(Judgement)).all()) == 1
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"
    store.close()


@pytest.mark.slow
def test_the_pages_work_on_postgresql(postgres: str, tmp_path: Path) -> None:
    store = open_store(postgres)
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    with store.session() as session:
        rows = list(enumerate([{**RANKINGS[0], "prompt": "A NUL: \0", "category": "x" * 200}, *RANKINGS[:2]]))
        items = exchange.find_items("rows", rows, kind=None, policies=("a", "b"), how="")
        exchange.add_items(session, items, axes=["kind"])
    add_user(store, "kim", PASSWORD, admin=True)
    kim = Person(create_app(store, secret=SECRET), base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
    assert log_in(kim, "kim\0", PASSWORD).status_code == 303
    for number in range(3):
        body = {"client_id": f"client-{number}", "item": kim.item(), "verdict": "ranked", "ranks": [1, 2, 3]}
        body |= {"scores": {"kind": [1, 2, 3]}, "seconds": 1, "comment": "half a \ud800 and a \0"}
        headers = {"X-CSRF-Token": kim.token(), "Content-Type": "application/json"}
        answer = kim.post("/judgements", content=json.dumps(body), headers=headers)
        assert answer.status_code == 200, answer.text
    with ThreadPoolExecutor(8) as pool:  # the last one once more, many times at once
        again = list(pool.map(lambda _: kim.post("/judgements", content=json.dumps(body), headers=headers), range(8)))
    assert [answer.json() for answer in again] == [{"stored": True, "new": False}] * 8
    kim.submit(f"/judgements/{kim.last()}/undo")
    assert kim.submit("/admin/gold/1").json() == {"gold": True}
    assert kim.get("/results").status_code == 200
    assert len(kim.get("/admin/rankings.jsonl").text.splitlines()) == 2
    with store.session() as session:
        assert {one.comment for one in session.scalars(select(Judgement))} == {"half a ? and a"}
        for table in reversed(Base.metadata.sorted_tables):  # the tests below start from nothing
            session.execute(table.delete())
    store.close()


@pytest.mark.slow
def test_a_judgement_waits_for_postgresqls_disk_and_taking_a_place_does_not(postgres: str) -> None:
    store = open_store(postgres)
    with store.session() as session:
        exchange.add_items(
            session, exchange.find_items("rows", [(1, RANKINGS[0])], kind=None, policies=("", ""), how="")
        )
    local = Person(create_app(store, secret=SECRET), base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
    token = local.token()
    waits: list[str] = []

    def look(connection: Connection) -> None:
        waits.append(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

    event.listen(store.engine, "commit", look)
    item = local.item()
    assert waits.count("off") == 1
    waits.clear()
    body = {"client_id": "client-1", "item": item, "verdict": "ranked", "ranks": [1, 2, 3], "seconds": 1}
    for path in ("/judgements", "/judgements/{}/undo"):
        with store.session() as session:
            judgement = session.scalar(select(Judgement.id))
        assert local.post(path.format(judgement), json=body, headers={"X-CSRF-Token": token}).status_code == 200
    assert set(waits) == {"on"}
    with store.session() as session:
        for table in reversed(Base.metadata.sorted_tables):
            session.execute(table.delete())
    store.close()


@pytest.mark.slow
def test_processes_that_open_a_new_postgresql_database_at_once_make_it_once(postgres: str) -> None:
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    names = [f"new{number}" for number in range(3)]
    with engine.connect() as connection:
        for name in names:
            connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    open_at_once([postgres.replace("/postgres?", f"/{name}?") for name in names])


def test_what_postgresql_lacks_is_named_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_load, "postgres_programs", lambda: None)
    assert feedback_load.missing_for_postgres() == "Found no initdb. On Debian: `apt-get install postgresql`"
    with pytest.raises(RuntimeError, match="Found no initdb"), feedback_load.postgres():
        pass
    monkeypatch.setattr(feedback_load, "postgres_programs", lambda: Path("/bin"))
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert feedback_load.missing_for_postgres() == "Found no psycopg: `pip install 'rlhf-pipeline[postgres]'`"


@pytest.mark.browser
@pytest.mark.timeout(280)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_twenty_people_make_2000_judgements(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = feedback_load.missing_for_postgres() if kind == "postgresql" else ""
    assert not missing, missing  # as with Chromium: whoever asks for these tests shall not take a skip for a pass
    database = request.getfixturevalue("postgres") if kind == "postgresql" else str(tmp_path / "feedback.db")
    found = feedback_load.load(tmp_path, database, people=20, each=100, think=0.5)
    with capsys.disabled():  # milliseconds say more of what else the machine does, and fail nothing
        print(f"\n{feedback_load.table(kind, found)}")
    assert clean(found), found
    assert len(found.sends) == 2000
