"""Which Prefect server a flow run talks to: the one you named, the one `rlhf prefect-ui` runs, or a temporary one.

All servers of a workspace share one database under .rlhf/prefect, so a run made with a temporary server is there when
`rlhf prefect-ui` is opened later. Nothing here imports prefect before the settings stand, which it reads when it is
imported; the server's start, some seconds, overlaps with that.
"""

import atexit
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from flows.listening import require_free
from rlhf_core.errors import ConfigError, ResourceError
from tasks.environment import record_folder

START_SECONDS = 120.0
ADDRESS_FILE = "server.json"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  (to be told from an address that one can call)


def prepare_prefect(root: Path) -> Path:
    """Set what Prefect reads when it is imported; returns its home in this project. Your own settings win."""
    home = Path(os.environ.setdefault("PREFECT_HOME", str(record_folder(root) / "prefect")))
    home.mkdir(parents=True, exist_ok=True)
    # Its pages ask the server they came from; by default they ask port 4200, whatever port they were served on.
    os.environ.setdefault("PREFECT_SERVER_UI_API_URL", "/api")
    for who, run in (("STANDARD_FLOW", "flow"), ("STANDARD_TASK", "task")):  # time, stage, line
        name = "rlhf    " if run == "flow" else "%(task_run_name)-8s"
        os.environ.setdefault(f"PREFECT_LOGGING_FORMATTERS_{who}_RUN_FMT", f"%(asctime)s  {name}  %(message)s")
    return home


def answers(api_url: str, *, timeout: float = 2.0) -> bool:
    """Whether a Prefect server answers there."""
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=timeout) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, http.client.HTTPException, ValueError):
        return False


def running_server(home: Path) -> str | None:
    """The API address of the server that works on this workspace's database, if one answers."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        address = json.loads((home / ADDRESS_FILE).read_text(encoding="utf-8"))["api_url"]
        if answers(address):
            return str(address)
    return None


def use_server(root: Path, *, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Set PREFECT_API_URL to the server to use, and return it; a temporary one ends with this process.

    Args:
        root: the project's folder.
        meanwhile: done while a temporary server starts, in seconds that would be lost otherwise.

    Raises:
        ResourceError: the server named by PREFECT_API_URL does not answer, or the temporary one does not start.
    """
    home = prepare_prefect(root)
    address = _named_or_running(home)
    if address is None:
        port = free_port()
        address = f"http://127.0.0.1:{port}/api"
        command = ["uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1",
                   "--port", str(port), "--log-level", "error", "--lifespan", "on"]  # fmt: skip
        # As Prefect starts its own: without pages, and with those of its services that one flow run needs.
        marks = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        wait = _start(command, marks, address, home)
        # The address that Prefect would print ends with this process, and has no pages.
        logging.getLogger("prefect.flow_runs").addFilter(lambda record: not record.getMessage().startswith("View at"))
        os.environ["PREFECT_API_URL"] = address  # before prefect is imported, which reads it once
        meanwhile()
        wait()
    os.environ["PREFECT_API_URL"] = address
    return address


def use_lasting_server(
    root: Path, command: str, *, port: int, option: str = "--port", meanwhile: Callable[[], None]
) -> str:
    """As `use_server`, but one that keeps schedules and has pages: started on this port if none runs.

    Args:
        command, option: who asks for the port, and by what; named where it is taken.
        meanwhile: may import prefect; done though a server runs already.
    """
    home = prepare_prefect(root)
    address, wait = _named_or_running(home), None
    if address is None:
        # Or another project's server that answers there would be taken for the one that is being started.
        require_free("127.0.0.1", port, command, option=option)
        address = record_address(home, "127.0.0.1", port)
        server = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--log-level", "WARNING"]
        wait = _start(server, {}, address, home)
    os.environ["PREFECT_API_URL"] = address
    meanwhile()
    if wait:
        wait()
    return address


def check_schedule(cron: str | None) -> None:
    """ConfigError where Prefect cannot tell from it when to start. Imports prefect, so its settings have to stand."""
    if cron is None:
        return
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise ConfigError(
            f"Found --cron {cron!r}, expected minute, hour, day, month and weekday, such as every night at three: "
            '--cron "0 3 * * *"'
        ) from error


def _named_or_running(home: Path) -> str | None:
    named = os.environ.get("PREFECT_API_URL")
    if named and not answers(named, timeout=10.0):
        raise ResourceError(
            f"No Prefect server answers at PREFECT_API_URL={named}. Start it, or `unset PREFECT_API_URL` to do without."
        )
    return named or running_server(home)


def _start(command: list[str], env: dict[str, str], address: str, home: Path) -> "Wait":
    """Start a server that ends with this process.

    It is stopped by atexit and not at the end of a block: Prefect sends its last log lines and events when Python
    ends, and would wait a minute and a half for a server that is gone. This has to be registered before prefect is
    imported, since what is registered first runs last.
    """
    log = home / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env={**os.environ, **env}, stdout=output, stderr=output,
            start_new_session=True,  # Ctrl-C in the terminal is for the flow run, which still has things to tell it
        )  # fmt: skip
    atexit.register(stop, process)
    return Wait(process, address, log)


def stop(process: "subprocess.Popen[bytes]", *, seconds: float = 5.0) -> None:
    """End a process that leads a group of its own, and that group: servers start servers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
    process.wait()


class Wait:
    """Waits for a server that was started; raises ResourceError with its last words if it does not come up."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, log: Path) -> None:
        self.process, self.address, self.log = process, address, log

    def __call__(self, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if answers(self.address):
                return
            time.sleep(0.1)
        words = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ResourceError(
            f"The Prefect server did not start within {seconds:.0f} s. Its log, {self.log}, ends with: "
            + (" ".join(words) or "nothing")
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def record_address(home: Path, host: str, port: int) -> str:
    """Leave word where this workspace's server answers, for later `rlhf run`s; returns the API address."""
    address = f"http://{'127.0.0.1' if host in EVERYWHERE else host}:{port}/api"
    (home / ADDRESS_FILE).write_text(json.dumps({"api_url": address}) + "\n", encoding="utf-8")
    return address
