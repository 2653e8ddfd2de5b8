"""Mends what a DVC leaves that was killed in the middle of a write, so that a run after a crash simply goes on.

DVC writes two small files in place, and starts no more while either is cut off: its list of the files in use, and
dvc.lock. Data, artifacts, checkpoints and DVC's cache are written under a temporary name and renamed; there is nothing
to mend in them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
import zc.lockfile

TMP = Path(".dvc/tmp")


class InPlace(NamedTuple):
    """A file that DVC writes in place."""

    path: Path
    meaning: str
    read: Callable[[str], Any]
    guard: Path  # what DVC holds while it writes


WRITTEN_IN_PLACE = (
    InPlace(TMP / "rwlock", "DVC's list of files in use", json.loads, TMP / "rwlock.lock"),
    InPlace(Path("dvc.lock"), "dvc.lock", yaml.safe_load, TMP / "lock"),
)


def mend(root: Path) -> list[str]:
    """Put aside, as .dvc/tmp/NAME.cut-off, what is cut off of DVC's two files; DVC makes them anew.

    Without the list nothing is lost: the DVC that it told of is dead. Without dvc.lock, DVC finds what was computed in
    its cache, by what went into it.

    Returns:
        A line for each file put aside.
    """
    return [
        f"{file.meaning} was cut off when DVC was killed; it is made anew"
        for file in WRITTEN_IN_PLACE
        if _cut_off(root, file) and _put_aside(root, file)
    ]


def _cut_off(root: Path, file: InPlace) -> bool:
    try:
        text = (root / file.path).read_text(encoding="utf-8")
        return "<<<<<<<" not in text and not isinstance(file.read(text), dict)  # git's conflict is its owner's to solve
    except FileNotFoundError:
        return False
    except (ValueError, yaml.YAMLError):
        return True


def _put_aside(root: Path, file: InPlace) -> bool:
    """Whether it was cut off still, with no DVC at work on it."""
    with _held(root / file.guard) as ours:
        if not ours or not _cut_off(root, file):
            return False
        (root / file.path).replace(root / TMP / f"{file.path.name}.cut-off")
        return True


@contextlib.contextmanager
def _held(guard: Path) -> Iterator[bool]:
    try:
        lock = zc.lockfile.LockFile(str(guard))
    except zc.lockfile.LockError:
        yield False
        return
    try:
        yield True
    finally:
        lock.close()
