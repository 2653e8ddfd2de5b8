"""A flow run that waits for people: paused on Prefect's pages with the count and a link, and it goes on by itself.

The process stays: it holds no model, and looks into the database of `rlhf feedback` every few seconds. Resume on
Prefect's page goes on with what there is.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Cancelling, Crashed, Paused, Running

from flows.server import free_port, stop
from rlhf_core.errors import ResourceError, RLHFError
from rlhf_core.feedback.rounds import DATABASE_AWAY, Count
from tasks.environment import project_root

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PAUSED = "Waiting for people"
AWAY = (httpx.TransportError, *DATABASE_AWAY)  # a server that is being restarted; httpx is how Prefect asks its own
REVIVAL_SECONDS = 60.0  # between two starts of pages that end at once
T = TypeVar("T")


class StoppedByHand(KeyboardInterrupt):
    """Somebody cancelled the run on Prefect's page. What is under way ends as by Ctrl-C."""

    def state(self) -> Any:
        """What the flow returns: an interrupt that left it would be a crash to Prefect."""
        message = "Cancelled while it waited for people. Nothing that was judged is lost: the same command goes on."
        return Cancelled(message=message, data=RLHFError(message))


def wait_for_people(
    flow_run_id: str,
    look: Callable[[], Count],
    *,
    enough: int,
    deadline: datetime,
    link: str,
    what: str,
    every: float,
    say: Callable[[str], None],
    tend: Callable[[], None] = lambda: None,
) -> Count:
    """Return when enough is judged, nobody can judge any more, the deadline has passed, or somebody pressed Resume.

    Args:
        look: how much is judged now.
        enough: judgements after which to go on.
        link: where people judge.
        what: what for, in a few words, such as "round 3 of online".
        every: seconds between two looks.
        say: told once what is waited for, and once why it goes on.
        tend: called at each look, such as `Pages.look_after`.

    Hours of waiting are not lost for a restart: while Prefect's server or the database is away, it is asked again.
    """
    run = UUID(flow_run_id)

    def again(work: Callable[..., T], *args: Any, **options: Any) -> T:
        told = False
        while True:
            try:
                return work(*args, **options)
            except AWAY as error:
                if not told:
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    say(f"A server is away, and is asked again every {every:g} s; Ctrl-C loses nothing: {reason}")
                told = True
            time.sleep(every)
            tend()

    found, shown, bar, paused = again(look), -1, None, False
    until = f"{deadline:%Y-%m-%d %H:%M} UTC"
    if found.done < enough and found.left and datetime.now(UTC) < deadline:
        say(f"{what} waits for people: {found.done} of {enough} judged. They judge at {link} until {until}.")
        again(create_link_artifact, link, "Judge here", key="judge-here", description=f"Where people judge {what}")
        description = f"Judged so far of {what}: {enough} are wanted"
        bar = again(create_progress_artifact, 0.0, key="judged", description=description)
    while found.done < enough:
        if datetime.now(UTC) >= deadline:
            say(f"The deadline has passed: going on with {found.done} of {enough}.")
            break
        if not found.left:  # such as one person alone who skipped some
            say(f"Nobody has anything left to judge: going on with {found.done} of {enough}.")
            break
        if paused and not again(_still_paused, run):
            say(f"Resumed by hand: going on with {found.done} of {enough}.")
            break
        if found.done != shown:
            message = (
                f"{found.done} of {enough} judged for {what}. Judge at {link} until {until}. Resume: go on with these."
            )
            again(_set_state, run, Paused(name=PAUSED, message=message))
            paused, shown = True, found.done
            if bar is not None:
                again(update_progress_artifact, bar, progress=min(100.0 * found.done / enough, 100.0))
        time.sleep(every)
        tend()
        found = again(look)
    else:
        say(f"{found.done} of {enough} are judged: going on.")
    if bar is not None:
        again(update_progress_artifact, bar, progress=min(100.0 * found.done / enough, 100.0))
    if paused:
        again(_set_state, run, Running(message=f"{found.done} of {enough} judged for {what}"))
    return found


def _set_state(run: UUID, state: Any) -> None:
    # force: a run that is paused may not be paused again by Prefect's rules, and then would show the first count.
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, state, force=True)


def _still_paused(run: UUID) -> bool:
    """False once somebody pressed Resume.

    Raises:
        StoppedByHand: somebody cancelled the run.
    """
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
    if state is not None and (state.is_cancelling() or state.is_cancelled()):
        _set_state(run, Cancelling())  # from which a flow may end as cancelled; one that is so already may not
        raise StoppedByHand
    return state is not None and state.is_paused()


def close_lost_run(flow_run_id: str, *, successor: str) -> None:
    """A flow run whose process was killed would look alive for ever: say that it is gone, and who goes on."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # border: it may be another server's
        state = client.read_flow_run(UUID(flow_run_id)).state
        if state is not None and not state.is_final():
            message = f"Its process was killed. Flow run {successor} goes on where it was."
            client.set_flow_run_state(UUID(flow_run_id), Crashed(message=message), force=True)


class Pages:
    """The pages of `rlhf feedback` in a process of their own."""

    def __init__(self, database: str, *, port: int, guideline: str | None, say: Callable[[str], None]) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.log = Path(project_root(), ".rlhf", "pages.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self._command = [sys.executable, "-m", "flows.cli", "feedback", "--port", str(port)]
        self._command += ["--guideline", guideline] if guideline else []
        self._database, self._say, self._not_before = database, say, 0.0
        self.process = self._start()

    def look_after(self) -> None:
        """Start them again if they have ended."""
        if self.process.poll() is None or time.monotonic() < self._not_before:
            return
        self._say(f"The pages for people ended, and are started again. Their last words are in {self.log}.")
        self._not_before = time.monotonic() + REVIVAL_SECONDS
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        # Not as an option: others on the machine can read a command, and the password of a URL in it.
        env = {**os.environ, "RLHF_FEEDBACK_DATABASE": self._database}
        with self.log.open("a", encoding="utf-8") as output:
            return subprocess.Popen(
                self._command, env=env, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=_die_with_the_flow,
            )  # fmt: skip


@contextlib.contextmanager
def pages(database: str, *, port: int, guideline: str | None = None, say: Callable[[str], None]) -> Iterator[Pages]:
    """Serve the pages of `rlhf feedback` while people judge, by the guideline in a file or the one that ships.

    Raises:
        ResourceError: they do not start.
    """
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            say(f"Port {port} is taken; the pages get another one.")
            port = free_port()
    served = Pages(database, port=port, guideline=guideline, say=say)
    try:
        _wait_until_served(served.address, served.process, served.log)
        yield served
    finally:
        stop(served.process)


def _wait_until_served(address: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float = 60.0) -> None:
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/login", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-2:]
    raise ResourceError(f"The pages for people did not start at {address}: {' '.join(words) or 'no word from them'}")


def _die_with_the_flow() -> None:
    """Pages of a flow that was killed with -9 would hold the port. Linux only; elsewhere another port is taken."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            os._exit(1)
