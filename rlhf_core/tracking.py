"""The small protocol through which a loop reports, and two trackers that need nothing.

What records to MLflow lives in tasks/tracking.py; nothing here knows of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tracker(Protocol):
    """Where a stage's numbers go."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values named `stage/quantity` at a step; one batched call a step."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Record rows of text and numbers, such as sample responses."""

    def remark(self, name: str, text: str) -> None:
        """Say something that a reader must not miss, such as an alarm; the run keeps what was said last by the name."""

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        """Say how far the stage is: done of total units, tokens worked on since the last call."""


class NullTracker:
    """Records nothing."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None: ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None: ...

    def remark(self, name: str, text: str) -> None: ...

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None: ...


class MemoryTracker(NullTracker):
    """Keeps what it is told, for tests and notebooks."""

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[int, str, list[dict[str, Any]]]] = []
        self.remarks: list[tuple[str, str]] = []

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        self.history.append((step, dict(values)))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        self.tables.append((step, name, [dict(row) for row in rows]))

    def remark(self, name: str, text: str) -> None:
        self.remarks.append((name, text))
