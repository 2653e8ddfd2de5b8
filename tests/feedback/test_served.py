"""The judge's client with a real server: `transformers serve` on this machine, and SmolLM2-135M behind it.

A model so small seldom writes the JSON that it is asked for. So what is held here is that its server takes what we
send, that an answer is valid or counted as none, and that nothing is asked twice.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from flows.server import free_port
from rlhf_core.base import fetch_base
from rlhf_core.config import load_params
from rlhf_core.errors import JudgeStopped
from rlhf_core.feedback.chat import ChatEndpoint
from rlhf_core.feedback.endpoint import EndpointComparer
from rlhf_core.feedback.pairs import Look

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900)]
PROJECT = Path(__file__).resolve().parents[2]
PROMPT = (("user", "Name a fruit."),)
LOOKS = [Look(PROMPT, "A banana.", "A spider has eight legs."), Look(PROMPT, "I don't know.", "A banana.")]
CHAT = [{"role": "user", "content": "Name a fruit."}]


class Served(NamedTuple):
    """A server that is up."""

    url: str
    model: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    fetch_base(load_params(PROJECT / "params.yaml").prepare.base, folder / "base")
    port, model = free_port(), str(folder / "base")
    command = [Path(sys.executable).with_name("transformers"), "serve", model, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        _await(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield Served(f"http://127.0.0.1:{port}/v1", model, process)
    finally:
        process.kill()
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"It did not come up:\n{log.read_text()}")


@pytest.fixture
def config(served: Served, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Section judge, for that server."""
    monkeypatch.delenv("RLHF_JUDGE_KEY", raising=False)
    return lambda **changes: section("judge", url=served.url, model=served.model, timeout=300.0, **changes)


def test_the_same_question_has_the_same_answer_and_its_tokens_are_counted(config: Callable[..., Any]) -> None:
    said, spent = [], []
    for _ in range(2):
        with ChatEndpoint(config(answer_tokens=16)) as chat:
            said.append(chat.complete(CHAT, {"type": "object"}))
            spent.append(chat.budget.spent)
            assert chat.retries == 0
    assert said[0] == said[1] != ""
    # In millionths: a prompt of some 30 tokens at 1, and an answer of 16 at most at 2.
    assert 10e-6 < spent[0] == spent[1] < 100e-6


def test_what_a_judge_says_is_valid_or_counted_and_asked_once(config: Callable[..., Any], tmp_path: Path) -> None:
    judge = EndpointComparer(config(answer_tokens=60), tmp_path / "judge.db")
    opinions = judge.compare(LOOKS)
    assert all(opinion is None or 0 <= opinion.first <= 1 for opinion in opinions)
    assert judge.costs()["retries"] == 0
    assert len(LOOKS) <= judge.costs()["requests"] <= 2 * len(LOOKS)
    again = EndpointComparer(config(answer_tokens=60), tmp_path / "judge.db")
    assert again.compare(LOOKS) == opinions
    assert again.costs()["remembered"] == sum(opinion is not None for opinion in opinions)


def test_a_server_that_goes_away_stops_the_run(served: Served, config: Callable[..., Any], tmp_path: Path) -> None:
    served.process.kill()
    served.process.wait()
    looks = [Look(PROMPT, f"Fruit {number}.", "A banana.") for number in range(4)]
    with pytest.raises(JudgeStopped, match=r"stopped at 0 of 4 looks: the endpoint failed at 3 looks in a row"):
        EndpointComparer(config(), tmp_path / "judge.db", backoff=0.001).compare(looks)
