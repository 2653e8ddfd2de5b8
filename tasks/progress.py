"""The live line that says how far a stage is."""

import time

from rlhf_core.tracking import NullTracker


class ProgressLine:
    """One line at most every five seconds, and the first and last of a phase; the same with and without a terminal."""

    def __init__(self, stage: str, *, every: float = 5.0) -> None:
        self.stage = stage
        self.latest: dict[str, float] = {}
        self._every = every
        self._phase: tuple[str, int] | None = None
        self._opened = self._began = self._printed = time.monotonic()
        self._first = self._tokens = 0
        self._last = -1

    def update(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        """Count, and print where it is time."""
        now = time.monotonic()
        new = self._phase != (unit, total) or done < self._last
        if new:
            # A phase that reports only after its first unit began when the one before it ended.
            self._began = now if done == 0 else self._opened
            self._phase, self._first, self._tokens = (unit, total), max(done - 1, 0), 0
        self._tokens += tokens
        finished = done >= total and self._last != done
        self._last = done
        if new or finished or now - self._printed >= self._every:
            self._printed = now
            print(self._line(done, total, unit, now - self._began, note), flush=True)
        if done >= total:
            self._opened = now

    def _line(self, done: int, total: int, unit: str, seconds: float, note: str) -> str:
        parts = [f"{self.stage:<8} {done}/{total} {unit}", f"{100 * done // max(total, 1)} %"]
        if self._tokens and seconds > 0:
            parts.append(f"{self._tokens / seconds:.0f} tokens/s")
        worked = done - self._first
        if worked > 0 and seconds > 0:
            parts.append(f"{_clock((total - done) * seconds / worked)} left" if done < total else _clock(seconds))
        shown = ("reward", "kl", "loss", "accuracy")
        if not note:
            names = ((name, f"{self.stage}/{name}") for name in shown)
            note = "  ".join(f"{name} {self.latest[key]:.3g}" for name, key in names if key in self.latest)
        return "  ".join([*parts, note]).rstrip()


class ProgressTracker(NullTracker):
    """A tracker for commands that are no stage: it prints how far they are, and records nothing."""

    def __init__(self, name: str) -> None:
        self._line = ProgressLine(name)

    def progress(self, done: int, total: int, *, unit: str, tokens: int = 0, note: str = "") -> None:
        """Say how far the command is."""
        self._line.update(done, total, unit=unit, tokens=tokens, note=note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
