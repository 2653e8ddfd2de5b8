"""The pins belong together: left to itself, pip takes packages beside which Prefect runs no flow and no schedule."""

import re
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in pins), "a line that is no plain pin, such as a path or a local version"
    return {normal(name): pinned for name, pinned in (line.split("==") for line in pins)}


def requirements() -> list[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_is_pinned_and_installed_as_pinned(requirement: str) -> None:
    name = re.split(r"[<>=!]", requirement)[0]
    pinned = constraints()[normal(name)]
    assert version(name).partition("+")[0] == pinned
    if "==" in requirement:
        assert requirement == f"{name}=={pinned}"


def test_the_whole_tree_is_pinned() -> None:
    pins = constraints()
    needed: set[str] = set()
    known = {normal(found.name): found for found in distributions()}
    waiting = [normal(re.split(r"[<>=!]", requirement)[0]) for requirement in requirements()]
    while waiting:
        name = waiting.pop()
        if name in needed or name not in known:
            continue
        needed.add(name)
        for line in known[name].requires or []:
            if "extra ==" not in line:
                waiting.append(normal(re.split(r"[ <>=!;\[(~]", line)[0]))
    loose = needed - set(pins) - {"setuptools", "pip", "wheel"}
    assert not {name for name in loose if not name.startswith("nvidia-")}, "run `make lock`"


def test_prefects_trap_is_avoided() -> None:
    assert constraints()["fastapi"] == "0.150.0"  # 0.165: Body() got an unexpected keyword argument 'min_items'
    assert constraints()["sqlalchemy"].startswith("2.0.")  # 2.1: schedules are kept, and no run is ever made of them
