"""Means, whitening and truncation over the entries that count.

A mask is boolean and True where an entry counts. What stands under a False, NaN included, never reaches a value
or a gradient. Nothing here knows of pad ids: masks come from positions.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8  # a spread below 1e-4 is shrunk, not blown up: constant rewards differ by rounding only


def require_same_shape(*, rank: int | None = None, **tensors: Tensor) -> None:
    """Raise ValueError, naming every argument's shape, unless all have one shape (of `rank` dimensions, if given)."""
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1 or any(rank not in (None, len(shape)) for shape in shapes):
        wanted = "one shape" if rank is None else f"one shape of {rank} dimensions"
        raise ValueError(f"expected {wanted} for all; found {describe_shapes(**tensors)}")


def describe_shapes(**tensors: Tensor | None) -> str:
    """Every argument that is given with its shape, as error messages give them."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """The entries that count, and 0 in place of the others; comes before any arithmetic that NaN would go through."""
    return torch.where(mask, values, 0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the entries that count.

        mean = Σ m_i x_i / Σ m_i          0 where no entry counts

    Args:
        values: any shape, float.
        mask: the same shape, bool.

    Returns:
        A scalar of the values' dtype.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    return zero_masked(values, mask).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of the entries that count.

        var = Σ m_i (x_i − mean)² / n          n = Σ m_i, or Σ m_i − 1 if unbiased

    0 where no entry counts, and where only one does.

    Args:
        values: any shape, float.
        mask: the same shape, bool.
        unbiased: divide by one less than the count (Bessel's correction).

    Returns:
        A scalar of the values' dtype.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    mean = masked_mean(values, mask)
    squares = (torch.where(mask, values, mean) - mean).square()
    count = mask.sum() - int(unbiased)
    return squares.sum() / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale the entries that count to population variance 1 and, unless told otherwise, shift them to mean 0.

        y_i = (x_i − mean) / √max(var, 10⁻⁸) (+ mean, if not shift_mean)

    Args:
        values: any shape, float.
        mask: the same shape, bool. The statistics are those of all its True entries together.
        shift_mean: False puts the mean back afterwards, as is done with rewards.

    Returns:
        The same shape and dtype, 0 where the mask is False.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    mean = masked_mean(values, mask)
    floor = max(VARIANCE_FLOOR, torch.finfo(values.dtype).tiny)
    scale = masked_var(values, mask).clamp(min=floor).rsqrt()
    whitened = (torch.where(mask, values, mean) - mean) * scale
    return whitened if shift_mean else zero_masked(whitened + mean, mask)


def first_true_index(mask_BT: Tensor) -> Tensor:
    """Position of each row's first True: the count of entries before it.

    Args:
        mask_BT: (B, T) bool.

    Returns:
        (B,) int64, T where the row has no True.

    Raises:
        ValueError: the mask is not of two dimensions.
    """
    require_same_shape(rank=2, mask_BT=mask_BT)
    return (mask_BT.cumsum(dim=1) == 0).sum(dim=1)


def truncate_at_stop(ids_BT: Tensor, stop_ids: Iterable[int], pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut each response after its first stop token, which is kept.

    A pad id that stands before the first stop token is an ordinary token, and stays.

    Args:
        ids_BT: (B, T) int. Sampled response tokens.
        stop_ids: ids that end a response; where none occurs, the whole row is kept.
        pad_id: what is written behind the stop token.

    Returns:
        `(ids_BT, mask_BT)`: the cut ids, and a bool mask that is True up to the stop token and with it.

    Raises:
        ValueError: the ids are not of two dimensions.
    """
    require_same_shape(rank=2, ids_BT=ids_BT)
    stops = torch.tensor([int(stop) for stop in stop_ids], dtype=ids_BT.dtype, device=ids_BT.device)
    last_B = first_true_index(torch.isin(ids_BT, stops))
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    mask_BT = positions_T <= last_B[:, None]
    return torch.where(mask_BT, ids_BT, pad_id), mask_BT
