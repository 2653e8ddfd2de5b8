"""`rlhf feedback` on the command line."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from people import ANSWERS, PASSWORD, Person
from typer.testing import CliRunner

from flows import cli, feedback, listening
from rlhf_core.data import parse_ranking
from rlhf_core.errors import ConfigError, DataError, MissingArtifact, ResourceError
from rlhf_core.feedback.store import open_store


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return tmp_path


def run(*arguments: str, password: str = "") -> str:
    done = CliRunner().invoke(cli.app, ["feedback", *arguments], input=password, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", [[], ["add-user"], ["import"], ["export"]])
def test_every_command_explains_itself(command: list[str]) -> None:
    assert len(run(*command, "--help").split()) > 20


def test_import_add_user_and_export(project: Path) -> None:
    assert run("import", "answers.jsonl", "--policies", "ppo,base") == "Added 6 to compare.\n"
    assert run("import", "answers.jsonl", "--policies", "ppo,base") == "Added nothing. 6 were there already.\n"
    assert run("add-user", "kim", "--admin", password=f"{PASSWORD}\n") == "kim can log in as an admin.\n"
    assert run("export", "out.jsonl") == "out.jsonl: 0 rankings.\n"
    assert (project / ".rlhf" / "feedback.db").is_file()


@pytest.mark.parametrize("place", ["before", "after"])
def test_another_database_can_be_named_before_or_after_the_command(project: Path, place: str) -> None:
    named = ["--database", "other.db"]
    run(*(named if place == "before" else []), "import", "answers.jsonl", *(named if place == "after" else []))
    assert (project / "other.db").is_file()
    assert not (project / ".rlhf" / "feedback.db").exists()


def served(monkeypatch: pytest.MonkeyPatch, *, with_options: bool = False) -> list[Any]:
    import uvicorn

    hosts: list[Any] = []
    monkeypatch.setattr(
        uvicorn, "run", lambda app, *, host, **options: hosts.append((host, options) if with_options else host)
    )
    monkeypatch.setattr(feedback, "require_free", lambda *_: None)
    return hosts


def test_a_person_on_a_laptop_starts_in_one_command(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = served(monkeypatch)
    said = run()
    assert hosts == ["127.0.0.1"]
    assert "http://127.0.0.1:8000" in said
    assert "whoever sits at this machine is its admin, without login" in said


def test_the_days_number_reaches_the_pages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    apps: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: apps.append(app))
    monkeypatch.setattr(feedback, "require_free", lambda *_: None)
    run("import", "answers.jsonl")
    run("--daily", "4")
    page = Person(apps[0], base_url="http://127.0.0.1", client=("127.0.0.1", 50000)).get("/compare").text
    assert "left for you today 4" in page
    apps[0].state.desk.store.close()


def test_other_machines_only_with_a_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = served(monkeypatch)
    with pytest.raises(ConfigError, match="nobody has a password"):
        run("--host", "0.0.0.0")
    assert hosts == []
    run("add-user", "kim", password=f"{PASSWORD}\n")
    run("--host", "0.0.0.0")
    assert hosts == ["0.0.0.0"]


def test_behind_a_proxy_only_with_a_password(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = served(monkeypatch)
    with pytest.raises(ConfigError, match=r"^--https is for a proxy, .* nobody has a password\."):
        run("--https")
    assert hosts == []
    run("add-user", "kim", password=f"{PASSWORD}\n")
    run("--https")
    assert hosts == ["127.0.0.1"]


def test_only_behind_a_proxy_is_it_believed_who_asks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = served(monkeypatch, with_options=True)
    run("add-user", "kim", password=f"{PASSWORD}\n")
    run()
    run("--https")
    assert [options["proxy_headers"] for _, options in found] == [False, True]


def test_another_tools_export_becomes_rankings(project: Path) -> None:
    export = Path(__file__).parent / "exports" / "label_studio.json"
    said = run("convert", str(export), "out.jsonl", "--buckets", "good, bad")
    assert said == "out.jsonl: 3 rankings.\n"
    assert [parse_ranking(json.loads(line)).ranks for line in Path("out.jsonl").read_text().splitlines()] == [
        (1, 2, 3), (1, 2, 2), (1, 2),
    ]  # fmt: skip
    Path("table.csv").write_text("prompt,response")
    with pytest.raises(ConfigError, match="Export JSON, not CSV"):
        run("convert", "table.csv", "other.jsonl")
    with pytest.raises(MissingArtifact, match=r"Found no export none\.json"):
        run("convert", "none.json", "other.jsonl")
    assert not Path("other.jsonl").exists()


@pytest.mark.parametrize("host", ["::1", "::", "127.0.0.1", "0.0.0.0", "localhost"])
def test_a_host_of_either_family_can_be_listened_on_unless_its_port_is_taken(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        port = taken.getsockname()[1]
        taken.listen()
        shown = re.escape(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        with pytest.raises(ResourceError, match=rf"^Cannot listen on {shown}: Address already in use\."):
            listening.require_free(host, port, "rlhf feedback")
    listening.require_free(host, port, "rlhf feedback")


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ResourceError, match=r"^Cannot listen on 192\.0\.2\.7:8000: Cannot assign requested address"):
        listening.require_free("192.0.2.7", 8000, "rlhf feedback")


def test_the_address_of_ipv6_can_be_followed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(monkeypatch) == []
    assert "http://[::1]:8000 " in run("--host", "::1")


def test_mistakes_are_named(project: Path) -> None:
    (project / "bad.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1, row"):
        run("import", "bad.jsonl")
    for wrong in (["--kind", "guess"], ["--policies", "ppo"]):
        done = CliRunner().invoke(cli.app, ["feedback", "import", "answers.jsonl", *wrong])
        assert done.exit_code == 2
    with pytest.raises(ConfigError, match=r"Found --database 'nosuch://x'"):
        open_store("nosuch://x")
    with pytest.raises(ResourceError, match="cannot be opened"):
        open_store("sqlite:////proc/none/feedback.db")


def test_the_hosts_that_need_no_password_are_those_of_the_app() -> None:
    from rlhf_core.feedback.app import LOOPBACK

    assert feedback.LOOPBACK == LOOPBACK
