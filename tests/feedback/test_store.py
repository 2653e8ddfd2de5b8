"""The database: its tables come from the migrations, and keep what was committed."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, select, text

from rlhf_core.feedback.store import MIGRATIONS, Base, Item, Judgement, Store, located, open_store

PROJECT = Path(__file__).resolve().parents[2]


def test_the_migrations_make_the_tables_of_the_models(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_opening_again_changes_nothing(store: Store, database: Path) -> None:
    again = open_store(database)
    with again.engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0002"
    again.close()


def test_sqlite_writes_ahead_and_waits_for_the_disk(store: Store) -> None:
    with store.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


OLD = """
INSERT INTO annotators VALUES (1, 'kim', 'admin', NULL, '2026-01-01 10:00:00');
INSERT INTO guidelines VALUES ('abc', 'Be kind.');
INSERT INTO items VALUES
  (1, 'key', 'ticket', 'rank', '[["user", "Why?"]]', '["a", "b"]', '["", ""]', 'explain', 1, '2026-01-01 10:00:00');
INSERT INTO claims VALUES (1, 1, '2026-01-01 10:00:00');
INSERT INTO judgements VALUES (1, 'client-1', 1, 1, 'ranked', '[2, 1]', '[1, 0]', 'fine', 2.5, 'abc',
  '2026-01-01 10:00:00', NULL);
"""


def first_version(path: Path) -> None:
    """A database as the first version left it, with something in it."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for statement in OLD.split(";\n"):
            connection.execute(text(statement))
    engine.dispose()


def test_a_database_of_the_first_version_is_taken_over_with_all_that_is_in_it(tmp_path: Path) -> None:
    first_version(tmp_path / "old.db")
    store = open_store(tmp_path / "old.db")
    with store.session() as session:
        judgement = session.scalars(select(Judgement)).one()
        assert (judgement.ranks, judgement.presented, judgement.comment) == ([2, 1], [1, 0], "fine")
        assert (judgement.scores, judgement.written) == (None, None)
        assert (judgement.item.axes, judgement.item.gold, judgement.item.gold_from) == ([], None, None)
        assert session.scalars(select(Item)).one().prompt == [["user", "Why?"]]
    store.close()


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("judge.db", "/project/judge.db"),
        ("/else/judge.db", "/else/judge.db"),
        ("sqlite:///judge.db", "sqlite:////project/judge.db"),
        ("sqlite:////else/judge.db", "sqlite:////else/judge.db"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql+psycopg://kim:word@host/name", "postgresql+psycopg://kim:word@host/name"),
    ],
)
def test_a_file_named_relative_to_a_folder_is_the_same_from_everywhere(named: str, expected: str) -> None:
    assert located(named, Path("/project")) == expected


# ---- brought up to date by several, or cut off


KILLED = """
import os, signal, sys
from sqlalchemy import Engine, event
from rlhf_core.feedback.store import open_store

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *_):
    if sys.argv[2] in statement:
        os.kill(os.getpid(), signal.SIGKILL)

open_store(sys.argv[1])
"""


@pytest.mark.parametrize("statement", ["CREATE TABLE claims", "ADD COLUMN gold_from", "UPDATE alembic_version"])
def test_a_kill_between_two_steps_leaves_the_database_as_it_was(tmp_path: Path, statement: str) -> None:
    old = "CREATE" not in statement
    if old:
        first_version(tmp_path / "feedback.db")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "feedback.db"), statement], cwd=PROJECT)
    assert done.returncode == -signal.SIGKILL
    store = open_store(tmp_path / "feedback.db")
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    with store.session() as session:
        assert len(session.scalars(select(Judgement)).all()) == old
    store.close()


OPENER = """
import sys
from rlhf_core.feedback.store import open_store

for line in sys.stdin:
    open_store(line.strip()).close()
    print("open", flush=True)
"""


def open_at_once(databases: list[str]) -> None:
    """Three processes open one database after the other, each of them at the same moment."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": PROJECT}
    openers = [subprocess.Popen([sys.executable, "-c", OPENER], **pipes) for _ in range(3)]
    try:
        for database in databases:
            for opener in openers:
                print(database, file=opener.stdin, flush=True)
            assert [opener.stdout.readline() for opener in openers] == ["open\n"] * 3, database
    finally:
        for opener in openers:
            opener.stdin.close()
            opener.wait()
            opener.stdout.close()


def test_processes_that_open_a_new_database_at_once_make_it_once(tmp_path: Path) -> None:
    open_at_once([str(tmp_path / f"{number}.db") for number in range(15)])
