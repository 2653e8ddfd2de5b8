"""The errors that a user can cause. Each says what was found, what was expected and the command that helps.

Each class is also the builtin that a caller would expect to catch.
"""

from collections.abc import Mapping
from typing import Any


class RLHFError(Exception):
    """Base of every error that is the user's to mend; the doors print its message without a traceback."""


class ConfigError(RLHFError, ValueError):
    """A key or a value of params.yaml is wrong."""


class DataError(RLHFError, ValueError):
    """A data file has rows that cannot be used, or a split is empty."""


class MissingArtifact(RLHFError, FileNotFoundError):
    """A file that an earlier stage writes, or a base model, is not there."""


class ResourceError(RLHFError, RuntimeError):
    """The machine cannot do it: disk, memory, a lock held by another run, a Python that is too old."""


class JudgeStopped(RLHFError, RuntimeError):
    """A judge had to stop before its last item; what it said is kept, and the same call goes on from there."""


class JudgeRefused(RLHFError, ValueError):
    """A judge agrees too little with rankings that are known to be trusted with others."""


class TrainingDiverged(RLHFError, ArithmeticError):
    """A loss or a gradient is not a number any more.

    Args:
        message: which quantity went first, and what helps.
        batch: the tensors that it was computed from, by name.
    """

    def __init__(self, message: str, batch: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.batch = dict(batch)
