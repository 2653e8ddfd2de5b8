"""A store in a temporary folder, some items, and people who are logged in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from people import ANSWERS, PASSWORD, RANKINGS, SECRET, Person, log_in

from rlhf_core.feedback import exchange
from rlhf_core.feedback.accounts import add_user
from rlhf_core.feedback.app import create_app
from rlhf_core.feedback.store import Store, open_store


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "state" / "feedback.db"


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    opened = open_store(database)
    yield opened
    opened.close()


@pytest.fixture
def items(store: Store) -> None:
    rows = list(enumerate(RANKINGS, start=1))
    answers = list(enumerate(ANSWERS, start=1))
    with store.session() as session:
        for part in (rows, answers):
            found = exchange.find_items("rows", part, kind=None, policies=("ppo", "sft"), how="sampled")
            exchange.add_items(session, found, overlap=2)


@pytest.fixture
def browser(store: Store) -> Callable[..., Person]:
    """A browser on this machine; with a name, an account is made and logged in."""

    def open_browser(name: str | None = None, *, admin: bool = False, host: str = "127.0.0.1") -> Person:
        if name:
            add_user(store, name, PASSWORD, admin=admin)
        client = Person(create_app(store, secret=SECRET), base_url=f"http://{host}", client=(host, 50000))
        if name:
            done = log_in(client, name, PASSWORD)
            assert done.status_code == 303
        return client

    return open_browser
