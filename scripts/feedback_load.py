"""Many annotators at once on a real server: `python scripts/feedback_load.py`, about a minute; prints the table of
docs/feedback.md. With --postgres the same on PostgreSQL, in a cluster of its own that is gone afterwards.

Each annotator is a thread with a connection of its own that logs in, loads the page, thinks, and sends a ranking, as a
browser does; an admin has Results open meanwhile, which asks every five seconds. At the end the database is counted:
what was answered for has to be there, once.
"""

import argparse
import importlib
import json
import os
import pwd
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select

from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import add_user
from rlhf_core.feedback.store import Item, Judgement, open_store

PROJECT = Path(__file__).resolve().parents[1]
PASSWORD = secrets.token_hex(8)
OVERLAP = 4
EVERY = 5  # seconds between two looks of static/results.js
SPARE = 1.25  # items beyond what is judged, so that nobody runs out of those that they have not judged yet


class Load(NamedTuple):
    """What came of it: seconds of each request, and what was found in the database."""

    pages: list[float]
    sends: list[float]
    looks: list[float]  # at Results
    took: float
    lost: int
    doubled: int
    too_often: int  # items that more people judged than were wanted


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


RLHF = "from flows.cli import main; main()"


def start(folder: Path, port: int, *options: str, code: str = RLHF) -> subprocess.Popen[bytes]:
    """`rlhf feedback` as its own process, in a folder that is a project; returns when it answers."""
    (folder / "dvc.yaml").touch()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    environment.pop("DVC_ROOT", None)
    command = [sys.executable, "-c", code, "feedback", "--port", str(port), *options]
    server = subprocess.Popen(command, cwd=folder, env=environment)
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)
    server.kill()
    server.wait()
    raise RuntimeError("`rlhf feedback` did not answer within a minute")


@contextmanager
def served(folder: Path, *options: str) -> Iterator[int]:
    """The same as long as the block runs; its port."""
    port = free_port()
    server = start(folder, port, *options)
    try:
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)


def postgres_programs() -> Path | None:
    """Where PostgreSQL's server lies; Debian keeps it off the path."""
    folders = [Path(found).parent for found in [shutil.which("initdb")] if found]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


def missing_for_postgres() -> str:
    """What is not installed that a cluster needs, and how to get it; empty where all is there."""
    if postgres_programs() is None:
        return "Found no initdb. On Debian: `apt-get install postgresql`"
    try:
        importlib.import_module("psycopg")
    except ImportError:  # of its library too
        return "Found no psycopg: `pip install 'rlhf-pipeline[postgres]'`"
    return ""


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a database in a cluster of its own, below /tmp and reached by a socket in it."""
    programs = postgres_programs()
    if (missing := missing_for_postgres()) or programs is None:
        raise RuntimeError(missing)
    root = os.geteuid() == 0
    user = "postgres" if root else pwd.getpwuid(os.getuid()).pw_name  # it refuses to run as root
    as_user = {"user": user, "group": user, "extra_groups": []} if root else {}
    folder = Path(tempfile.mkdtemp(prefix="feedback-", dir="/tmp"))
    if root:
        shutil.chown(folder, user)
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": "/"}
    data, log = folder / "data", folder / "log"
    try:
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "people", "-A", "trust", "-E", "UTF8"], **quiet, **as_user
        )
        options = f"-k {folder} -c listen_addresses="
        control = [programs / "pg_ctl", "-D", data, "-w"]
        subprocess.run([*control, "-l", log, "-o", options, "start"], **quiet, **as_user)
        try:
            yield f"postgresql+psycopg://people@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **quiet, **as_user)
    finally:
        shutil.rmtree(folder)


class Annotator:
    """A person with a browser."""

    def __init__(self, port: int, name: str) -> None:
        self.connection = HTTPConnection("127.0.0.1", port, timeout=60)
        self.cookie = ""
        self.name = name
        self.pages: list[float] = []
        self.sends: list[float] = []
        self.sent: list[str] = []

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
        """One request; its status and text."""
        self.connection.request(method, path, body or None, {"Cookie": self.cookie, **headers})
        answer = self.connection.getresponse()
        text = answer.read().decode()
        if cookie := answer.getheader("set-cookie"):
            self.cookie = cookie.partition(";")[0]
        return answer.status, text

    def log_in(self) -> None:
        """Through the form."""
        _, page = self.ask("GET", "/login")
        form = {"name": self.name, "password": PASSWORD, "csrf": between(page, 'name="csrf" content="')}
        status, _ = self.ask(
            "POST", "/login", urllib.parse.urlencode(form), **{"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert status == 303, f"login said {status}"

    def judge(self, number: int, think: float) -> None:
        """Load the page, think, send."""
        since = time.perf_counter()
        status, page = self.ask("GET", "/rank", Accept="text/html")
        self.pages.append(time.perf_counter() - since)
        assert status == 200, f"page said {status}: {page[:200]}"
        item, token = between(page, 'data-item="'), between(page, 'name="csrf" content="')
        assert item, f"{self.name} has nothing left after {number}"
        time.sleep(random.uniform(0, 2 * think))
        client_id = f"{self.name}-judgement-{number}"
        body = {"client_id": client_id, "item": item, "verdict": "ranked", "ranks": [2, 1, 3, 3], "seconds": think}
        since = time.perf_counter()
        status, told = self.ask(
            "POST", "/judgements", json.dumps(body), **{"Content-Type": "application/json", "X-CSRF-Token": token}
        )
        self.sends.append(time.perf_counter() - since)
        assert status == 200, f"judgement said {status}: {told}"
        self.sent.append(client_id)


class Admin(Annotator):
    """Who has Results open."""

    def watch(self, over: threading.Event) -> None:
        """Look until it is over."""
        while True:
            since = time.perf_counter()
            status, page = self.ask("GET", "/results/live", Accept="text/html")
            self.pages.append(time.perf_counter() - since)
            self.connection.close()  # which the server does not keep for five seconds; the next look opens another
            assert status == 200, f"results said {status}: {page[:200]}"
            if over.wait(EVERY):
                return


def between(page: str, start: str) -> str:
    """What stands between a text and the next quote."""
    found = re.search(re.escape(start) + r'([^"]*)"', page)
    assert found, f"found no {start}"
    return found[1]


def load(folder: Path, database: str, *, people: int, each: int, think: float) -> Load:
    """Let people judge at once, and count what is in the database afterwards."""
    store = open_store(database)
    rows = [
        (
            n,
            {
                "prompt": f"Prompt {n}: what would you say?",
                "responses": [f"Answer {k} to {n}. " * 12 for k in range(4)],
            },
        )
        for n in range(int(people * each * SPARE / OVERLAP))
    ]
    with store.session() as session:
        items = exchange.find_items("rows", rows, kind="rank", policies=("a", "b"), how="")
        exchange.add_items(session, items, overlap=OVERLAP)
    for number in range(people):
        add_user(store, f"person-{number}", PASSWORD, admin=False)
    add_user(store, "admin", PASSWORD, admin=True)
    with served(folder, "--database", database) as port:
        annotators = [Annotator(port, f"person-{number}") for number in range(people)]
        admin, over = Admin(port, "admin"), threading.Event()
        with ThreadPoolExecutor(people + 1) as pool:
            list(pool.map(Annotator.log_in, [*annotators, admin]))
            watching = pool.submit(admin.watch, over)
            since = time.perf_counter()

            def work(annotator: Annotator) -> None:
                time.sleep(random.uniform(0, 2 * think))  # people do not start in one and the same instant
                for number in range(each):
                    annotator.judge(number, think)

            try:
                list(pool.map(work, annotators))
                took = time.perf_counter() - since
            finally:
                over.set()
            watching.result()
        for annotator in [*annotators, admin]:
            annotator.connection.close()
    with store.session() as session:
        judged = session.execute(select(Judgement.client_id, Judgement.annotator_id, Judgement.item_id)).all()
        wanted = dict(session.execute(select(Item.id, Item.overlap)).tuples().all())
    store.close()
    sent = {client_id for annotator in annotators for client_id in annotator.sent}
    by_item = Counter(item for _, _, item in judged)
    return Load(
        pages=[seconds for annotator in annotators for seconds in annotator.pages],
        sends=[seconds for annotator in annotators for seconds in annotator.sends],
        looks=admin.pages,
        took=took,
        lost=len(sent - {client_id for client_id, _, _ in judged}),
        doubled=len(judged) - len({(who, item) for _, who, item in judged}),
        too_often=sum(number > wanted[item] for item, number in by_item.items()),
    )


def quantile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def table(name: str, found: Load) -> str:
    """What docs/feedback.md shows."""
    lines = [
        f"{name}: {len(found.sends)} judgements in {found.took:.0f} s, {len(found.sends) / found.took:.0f} a second"
    ]
    lines += [f"  {found.lost} lost, {found.doubled} doubled, {found.too_often} items judged too often"]
    lines += [f"  {'milliseconds':<16}{'median':>8}{'95 %':>8}{'99 %':>8}{'most':>8}"]
    for what, seconds in (("next page", found.pages), ("judgement", found.sends), ("results", found.looks)):
        lines.append(f"  {what:<16}" + "".join(f"{quantile(seconds, q):>8.0f}" for q in (0.5, 0.95, 0.99, 1)))
    return "\n".join(lines)


def main() -> None:
    """Run it on SQLite or PostgreSQL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--each", type=int, default=100, help="judgements of each person")
    parser.add_argument("--think", type=float, default=0.5, help="mean seconds between page and judgement")
    parser.add_argument("--postgres", action="store_true", help="on PostgreSQL in place of SQLite")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = {"people": asked.people, "each": asked.each, "think": asked.think}
        title = f"{asked.people} people, {asked.think} s of thought"
        if asked.postgres:
            with postgres() as url:
                print(table(f"PostgreSQL, {title}", load(folder, url, **options)))
        else:
            print(table(f"SQLite, {title}", load(folder, str(folder / "feedback.db"), **options)))


if __name__ == "__main__":
    main()
