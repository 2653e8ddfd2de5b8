"""Several processes that train one model: each computes on rows of its own, and all take the same step.

Whatever is drawn at random is drawn alike in all of them, and sums weigh each row as one process would, so results
hang on the number of processes by rounding only. `torchrun` (CPU) or `accelerate launch` (GPUs) starts them, and
accelerate connects them. One process has all rows, and waits for nobody.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

T = TypeVar("T")


def state() -> PartialState:
    """accelerate's view of this process, connected with the others when first asked for; it names the device."""
    return PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    """How many processes there are."""
    return int(state().num_processes)


def own(rows: Sequence[T]) -> list[T]:
    """This process's share: every n-th row, so that rows sorted by length are shared evenly."""
    return list(rows[state().process_index :: count()])


def places_of(rows: Tensor) -> Tensor:
    """Where in this process's share those of the given rows stand that are its own; row numbers in, places out."""
    return rows[rows % count() == state().process_index] // count()


def gather(parts: Sequence[T]) -> list[T]:
    """The parts of all processes, one for each row that `own` shared out, in the order of the rows."""
    if count() == 1:
        return list(parts)
    shares: list[list[T]] = gather_object([list(parts)])
    together: list[Any] = [None] * sum(map(len, shares))
    for index, share in enumerate(shares):
        together[index :: len(shares)] = share
    return together


def add_up(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all processes; a name may be missing in some."""
    if count() == 1:
        return dict(values)
    total: dict[str, float] = {}
    for part in gather_object([dict(values)]):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter the sum of its gradients in all processes; one that has none counts as 0."""
    if count() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together)
    parts = together.split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def place(values: Tensor, rows: Sequence[int], size: int) -> Tensor:
    """All rows of a tensor of which each process has some.

    Args:
        values: (N, …) the rows that this process has.
        rows: their N numbers; each number is one process's.
        size: how many rows there are.

    Returns:
        (size, …), the same in every process.
    """
    whole = values.new_zeros((size, *values.shape[1:]))
    whole[list(rows)] = values
    if count() > 1:
        summed = whole.to(state().device, torch.long if whole.dtype == torch.bool else whole.dtype)
        torch.distributed.all_reduce(summed)
        whole = summed.to(whole)
    return whole


def wait() -> None:
    """Until all processes have come here."""
    state().wait_for_everyone()


def close() -> None:
    """Leave the others, if there was a connection."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
