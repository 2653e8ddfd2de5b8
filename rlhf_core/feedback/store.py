"""What is kept about people, items and judgements, and the database that keeps it.

Nothing is deleted: undoing a judgement marks it as withdrawn, and the next one stands beside it.
"""

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, DateTime, Engine, ForeignKey, Index, String, Text, create_engine, event, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from rlhf_core.errors import ConfigError, ResourceError

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK = 0x726C6866  # PostgreSQL's advisory lock of this application: any number that others do not use
ADVISORY_LOCK, BEGIN = text(f"SELECT pg_advisory_xact_lock({LOCK})"), text("BEGIN IMMEDIATE")
IN_HASTE = text("SELECT set_config('synchronous_commit', 'off', true)")  # of PostgreSQL, until the session ends
QUEUED = "queued"  # in a session that holds its place among those who write
CONNECTIONS = 8  # kept open, and used at once: as many requests as are worked on at once


def now() -> datetime:
    """The time in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy's own form)
        datetime: DateTime(timezone=True), list[Any]: JSON, dict[str, Any]: JSON,
    }  # fmt: skip


class Annotator(Base):
    """A person who judges. Without a password hash it is the one person of a laptop, who needs no login."""

    __tablename__ = "annotators"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(80), unique=True)
    role: Mapped[str] = mapped_column(String(16))  # annotator or admin
    password_hash: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(default=now)


class Item(Base):
    """A prompt and the responses to be judged; `sources` says who wrote them, and no annotator's page shows it.

    An item to write has no response (a demonstration is asked for) or one, which is to be corrected.
    """

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)  # hash of the content: importing twice adds nothing
    # What pages call the item. By number, a judgement that waited on a device could meet another database's item; and
    # from the key one could try out who wrote what.
    ticket: Mapped[str] = mapped_column(String(32), unique=True, default=lambda: secrets.token_hex(16))
    kind: Mapped[str] = mapped_column(String(16), index=True)  # rank, compare or write
    prompt: Mapped[list[Any]]  # [role, content] pairs
    responses: Mapped[list[Any]]
    sources: Mapped[list[Any]]
    category: Mapped[str] = mapped_column(String(80), default="")
    overlap: Mapped[int] = mapped_column(default=1)  # how many people judge it
    axes: Mapped[list[Any]] = mapped_column(default=list)  # what each response is scored on too, 1 to 5
    # A gold question: the ranks that are right, [] where none is acceptable. Everybody gets it, and nobody sees that.
    gold: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    gold_from: Mapped[int | None]  # the judgement that was taken as the answer, which is not measured by itself
    created_at: Mapped[datetime] = mapped_column(default=now)


class Claim(Base):
    """That an item was shown to a person: only then may they judge it, and for a while it is kept for them."""

    __tablename__ = "claims"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"), primary_key=True)
    shown_at: Mapped[datetime] = mapped_column(default=now)


class Guideline(Base):
    """Each text that people judged by, under the version that their judgements carry."""

    __tablename__ = "guidelines"
    version: Mapped[str] = mapped_column(String(12), primary_key=True)
    text: Mapped[str] = mapped_column(Text)


class Judgement(Base):
    """What one person said of one item. `ranks` stand in the item's order of responses, 1 is best."""

    __tablename__ = "judgements"
    id: Mapped[int] = mapped_column(primary_key=True)
    client_id: Mapped[str] = mapped_column(String(64), unique=True)  # made by the page: a repeat is stored once
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"), index=True)
    verdict: Mapped[str] = mapped_column(String(16))  # ranked, none (is acceptable), written, skipped
    ranks: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    scores: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))  # by axis, in the item's order
    written: Mapped[str | None] = mapped_column(Text)  # a demonstration, or the corrected response
    presented: Mapped[list[Any]]  # indexes of responses as they stood on the page
    comment: Mapped[str] = mapped_column(Text, default="")
    seconds: Mapped[float]
    guideline: Mapped[str] = mapped_column(ForeignKey("guidelines.version"))
    created_at: Mapped[datetime] = mapped_column(default=now)
    withdrawn_at: Mapped[datetime | None]
    item: Mapped[Item] = relationship()
    annotator: Mapped[Annotator] = relationship()

    __table_args__ = (
        Index(
            "one_live_judgement", "annotator_id", "item_id", unique=True,
            sqlite_where=text("withdrawn_at IS NULL"), postgresql_where=text("withdrawn_at IS NULL"),
        ),
    )  # fmt: skip


class Store:
    """An open database with its tables up to date."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writing = threading.Lock()
        self._has_login = False

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that is committed at the end, or rolled back on an error."""
        session = Session(self.engine)
        try:
            with session, session.begin():
                yield session
        finally:
            if session.info.pop(QUEUED, False):
                self._writing.release()

    def queue(self, session: Session) -> None:
        """On SQLite, which has one writer: write after the others of this process, in the order of asking, until the
        session ends. SQLite itself has those who wait look again now and then, up to a tenth of a second late.

        Call it before the session has written anything.
        """
        if self.engine.dialect.name == "sqlite" and QUEUED not in session.info:
            self._writing.acquire()
            session.info[QUEUED] = True
            session.execute(BEGIN)

    def lock(self, session: Session) -> None:
        """Until this session ends, others that ask for the lock wait: who looks and then takes a place is not outrun.

        PostgreSQL does not wait for the disk when such a session ends, or all others would. What a crash of its machine
        may lose within a second is a place taken, never a judgement: those are stored by sessions without the lock.
        """
        self.queue(session)
        if self.engine.dialect.name != "sqlite":
            session.execute(IN_HASTE)
            session.execute(ADVISORY_LOCK)

    def has_login(self) -> bool:
        """Whether anyone can log in with a password; once somebody can, somebody always can."""
        if not self._has_login:
            with self.session() as session:
                found = session.scalar(select(Annotator.id).where(Annotator.password_hash.is_not(None)).limit(1))
            self._has_login = found is not None
        return self._has_login

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()


def open_store(database: str | Path) -> Store:
    """Open a database, made if missing, and bring its tables up to date.

    Args:
        database: a file for SQLite, or any URL of SQLAlchemy, such as postgresql+psycopg://user@host/name.

    Raises:
        ConfigError: no such URL.
        ResourceError: the database or its driver is not there.
    """
    url = str(database)
    if "://" not in url:
        _make_private(Path(url))
        url = f"sqlite:///{Path(url).resolve()}"
    try:
        # Kept open: with PostgreSQL each new one is a process, with SQLite a file to open and settings to make.
        pool = {} if url.startswith("sqlite") and ":memory:" in url else {"pool_size": CONNECTIONS, "max_overflow": 32}
        engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"), **pool)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _set_up_sqlite)
        with engine.begin() as connection:
            # One process at a time, and all steps or none: SQLite's driver would commit each statement by itself, and
            # a kill between two would leave tables that are of no version.
            connection.execute(BEGIN if engine.dialect.name == "sqlite" else ADVISORY_LOCK)
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"Found --database {url!r}, expected a file or a URL such as sqlite:///FILE.") from error
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"Found no module {error.name}, which this database needs: `pip install {error.name}`"
        ) from error
    except OperationalError as error:
        raise ResourceError(f"The database cannot be opened: {error.orig}") from error
    return Store(engine)


def located(database: str, folder: Path) -> str:
    """The same database from wherever it is opened: a file that is named relative to a folder is named in full."""
    if "://" not in database:
        return str(folder / database)
    if not database.startswith("sqlite"):
        return database
    url = make_url(database)
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return database
    return url.set(database=str(folder / url.database)).render_as_string(hide_password=False)


def _make_private(path: Path) -> None:
    """An empty file that only its owner can read: SQLite gives its side files the same mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _set_up_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    # FULL: a judgement that was answered for is on the disk, also if the power fails. 30 s: SQLite lets no one queue,
    # so that one among many may be unlucky for seconds, and shall wait on rather than be refused.
    for setting in ("synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {setting}")
    _write_ahead(connection)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """SQLite refuses this, and does not wait, where another process does it to the same new file just then."""
    until = time.monotonic() + 30
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)
