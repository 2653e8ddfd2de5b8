"""Checkpoints: all that decides how a training loop goes on, on disk whole or not at all.

A loop says what it changes (`LoopState`) and offers a checkpoint after each step. Killed at any moment and started
again, it restores the newest one and computes the same bytes as if nothing had happened. Curves are the tracker's
business and final weights the stage's.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core import processes

KEPT = 2  # newest checkpoints that stay, beside the best: a disk error in one leaves another
LARGEST_SHARE = 0.05  # of a loop's time that writing checkpoints may take


class LoopState(NamedTuple):
    """What a loop changes as it goes, by names of its own; `restore` writes into the same objects."""

    tensors: Mapping[str, Sequence[Tensor]]  # parameters, and copies of them that are kept
    optimisers: Mapping[str, torch.optim.Optimizer]
    generator: torch.Generator | None = None


class Unsaved:
    """Whether a stage has done steps that no checkpoint holds, and what shall be done once one does."""

    def __init__(self) -> None:
        self.steps = False
        self.then: Callable[[], None] | None = None


class Checkpoints:
    """The checkpoints of one loop in a folder of its own.

    Args:
        folder: where they lie; None keeps none.
        writes: False in all processes of a loop but one; they only go on from what that one wrote.
        unsaved: shared by the loops of a stage. With `then` set, the next checkpoint offered is written however long
            that takes, and `then` called.
    """

    def __init__(self, folder: Path | None = None, *, writes: bool = True, unsaved: Unsaved | None = None) -> None:
        self.folder = folder
        self.writes = writes
        self.unsaved = unsaved or Unsaved()
        self._allowed_from = 0.0  # when the next one may be written

    def below(self, name: str) -> "Checkpoints":
        """Those of another loop of the same stage."""
        return Checkpoints(self.folder and self.folder / name, writes=self.writes, unsaved=self.unsaved)

    def offer(self, step: int, state: LoopState, values: Mapping[str, Any], *, score: float | None = None) -> bool:
        """Write a checkpoint, unless writing would take more of the loop's time than it may.

        Args:
            step: how many steps are done; above every earlier one.
            values: counters and numbers as JSON, floats exactly.
            score: the higher, the better; the best checkpoint is kept beside the newest.

        Returns:
            Whether it was written.
        """
        began = time.monotonic()
        if self.folder is None or not self.writes:
            return False
        then = self.unsaved.then
        if began < self._allowed_from and then is None:
            self.unsaved.steps = True
            return False
        tensors = {f"{name}.{i}": tensor for name, group in state.tensors.items() for i, tensor in enumerate(group)}
        for name, optimiser in state.optimisers.items():
            for i, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{i}.{moment}": value for moment, value in moments.items()}
        if state.generator is not None:
            tensors["generator"] = state.generator.get_state()
        partial = self.folder / f".{_name(step)}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors"
        )
        content = {"step": step, "score": score, "values": values}
        (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        os.replace(partial, self.folder / _name(step))
        _flush(self.folder)
        self._drop_old()
        ended = time.monotonic()
        self._allowed_from = ended + (ended - began) * (1 / LARGEST_SHARE - 1)
        self.unsaved.steps = False
        if then is not None:
            then()
        return True

    def restore(self, state: LoopState) -> dict[str, Any] | None:
        """Bring the state to the newest checkpoint that can be read, and return its values; None if there is none."""
        processes.wait()  # what the first process has to clear away is cleared
        values = self._restore(state)
        found = set(processes.gather([None if values is None else json.dumps(values)]))
        assert len(found) == 1, "the processes went on from different checkpoints"
        return values

    def _restore(self, state: LoopState) -> dict[str, Any] | None:
        # What a write or a removal that was cut short has left.
        for leftover in self.folder.glob(".step-*") if self.folder and self.writes else ():
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in reversed(self._all()):
            try:
                content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                tensors = load_file(folder / "state.safetensors")
            except (OSError, ValueError, SafetensorError) as error:
                print(f"Checkpoint {folder.name} cannot be read ({error}); taking the one before it.", flush=True)
                if self.writes:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            _load(state, tensors)
            if self.writes:
                print(f"Going on after step {content['step']}, from a checkpoint.", flush=True)
            values: dict[str, Any] = content["values"]
            return values
        return None

    def _all(self) -> list[Path]:
        """Oldest first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(folder for folder in self.folder.iterdir() if folder.name.startswith("step-"))

    def _drop_old(self) -> None:
        scores = {folder: _read_score(folder) for folder in self._all()}
        readable = [folder for folder, (found, _) in scores.items() if found]  # what cannot be read goes first
        known = [folder for folder in readable if scores[folder][1] is not None]
        best = max(known, key=lambda folder: scores[folder][1], default=None)
        for folder in scores:
            if folder not in (*readable[-KEPT:], best):
                # Renamed first: a folder half removed must not pass for a checkpoint.
                gone = folder.with_name(f".{folder.name}.old")
                os.replace(folder, gone)
                shutil.rmtree(gone, ignore_errors=True)


NO_CHECKPOINTS = Checkpoints()  # a loop that nobody will go on with


def _load(state: LoopState, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, group in state.tensors.items():
            for i, tensor in enumerate(group):
                tensor.copy_(tensors[f"{name}.{i}"])
    for name, optimiser in state.optimisers.items():
        whole = optimiser.state_dict()
        whole["state"] = {}
        for key, value in tensors.items():
            owner, _, moment = key.rpartition(".")
            prefix, _, index = owner.rpartition(".")
            if prefix == name and index.isdigit():
                whole["state"].setdefault(int(index), {})[moment] = value
        optimiser.load_state_dict(whole)
    if state.generator is not None:
        state.generator.set_state(tensors["generator"])


def _read_score(folder: Path) -> tuple[bool, Any]:
    """Whether a checkpoint's numbers can be read, and its score where it has one."""
    try:
        return True, json.loads((folder / "state.json").read_text(encoding="utf-8"))["score"]
    except (OSError, ValueError):
        return False, None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _flush(path: Path) -> None:
    """To the disk itself: a rename that outlives a power cut must not point at data that did not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
