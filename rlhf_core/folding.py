"""Rows that begin alike, laid out as one: what they share is computed once.

The answers to one prompt repeat it, and a transformer computes it for each of them anew. Folded, the prompt stands once
and the answers after it, each seeing the prompt and itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SHARED_TOKENS = 8  # rows that begin alike in fewer are not worth folding
FOLDED_ROWS = 8  # rows that lie as one at most: attention within them grows with the square


class Fold(NamedTuple):
    """Where each token of (B, S) rows lies in (G, F) folded ones.

    A token sees what it sees in a row of its own, and stands at the same position, so that what is computed of it is
    the same function.
    """

    of_GF: Tensor  # (G, F) long, the place in (B, S) that each folded place stands for; padding stands for the first
    positions_GF: Tensor  # (G, F) long, in a row of its own
    sees_GFF: Tensor  # (G, F, F) bool, True where the first place attends to the second
    mask_GF: Tensor  # (G, F) bool, False at padding
    to_BS: Tensor  # (B, S) long, where among the folded places each place is found; padding at a group's first
    groups: Sequence[tuple[int, int]]  # of each of G, as `alike` says them

    def fold(self, values_BS: Tensor) -> Tensor:
        """(G, F, ...) of (B, S, ...)."""
        return _gather(values_BS, self.of_GF)

    def unfold(self, values_GF: Tensor) -> Tensor:
        """(B, S, ...) of (G, F, ...); whatever is past a row's end means nothing."""
        return _gather(values_GF, self.to_BS)


def alike(rows: Sequence[Sequence[int]], most: int = FOLDED_ROWS) -> list[tuple[int, int]]:
    """Neighbouring rows that begin alike, as (how many, how many tokens they share), in their order.

    A row joins its neighbours if no fewer tokens are saved with it than without, and at least SHARED_TOKENS are common.

    Args:
        most: rows that may be neighbours; no more than FOLDED_ROWS are.
    """
    found: list[tuple[int, int]] = []
    first: Sequence[int] = ()
    most = min(most, FOLDED_ROWS)
    for row in rows:
        count, common = found[-1] if found else (most, 0)
        both = _common(first, row, common)
        if count < most and both >= SHARED_TOKENS and both * count >= common * (count - 1):
            found[-1] = (count + 1, both)
        else:
            first = row
            found.append((1, len(row)))
    return found


def batches(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Numbers of rows in pieces of up to `size`, the short ones first; what is alike stays together if it fits."""
    groups, start = [], 0
    for count, common in alike(rows, size):
        numbers = list(range(start, start + count))
        groups.append((common + sum(len(rows[row]) - common for row in numbers), numbers))
        start += count
    found: list[list[int]] = []
    for _, numbers in sorted(groups, key=lambda group: group[0]):
        if not found or len(found[-1]) + len(numbers) > size:
            found.append([])
        found[-1] += numbers
    return found


def fold_rows(mask_BS: Tensor, groups: Sequence[tuple[int, int]]) -> Fold:
    """How rows, padded on the right to the longest, are folded, of which neighbours share what `alike` says."""
    lengths, width = mask_BS.sum(1).tolist(), mask_BS.shape[1]
    # Of each group: places of (B, S), whose they are (-1 is everybody's), positions. Of each row: its places in these.
    of: list[list[int]] = []
    owner: list[list[int]] = []
    position: list[list[int]] = []
    to: list[list[int]] = []
    group_of: list[int] = []
    for group, (count, common) in enumerate(groups):
        shared = list(range(common))
        of.append([len(to) * width + place for place in shared])
        owner.append([-1] * common)
        position.append(list(shared))
        for row in range(len(to), len(to) + count):
            own = range(common, lengths[row])
            to.append([*shared, *range(len(of[-1]), len(of[-1]) + len(own))])
            group_of.append(group)
            of[-1] += [row * width + place for place in own]
            owner[-1] += [row] * len(own)
            position[-1] += own
    of_GF, owner_GF, positions_GF = _padded(of, 0), _padded(owner, -2), _padded(position, 0)
    places_F = torch.arange(of_GF.shape[1])
    theirs_GFF = (owner_GF[:, None, :] == -1) | (owner_GF[:, :, None] == owner_GF[:, None, :])
    sees_GFF = theirs_GFF & (places_F[:, None] >= places_F)
    to_BS = _padded(to, 0) + torch.tensor(group_of)[:, None] * len(places_F)
    parts = (of_GF, positions_GF, sees_GFF, owner_GF != -2, to_BS)
    of_GF, positions_GF, sees_GFF, mask_GF, to_BS = (part.to(mask_BS.device) for part in parts)
    return Fold(of_GF, positions_GF, sees_GFF, mask_GF, to_BS, groups)


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    most = min(most, len(one), len(other))
    return next((place for place in range(most) if one[place] != other[place]), most)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _gather(values: Tensor, places: Tensor) -> Tensor:
    # index_select, since its gradient is summed in a fixed order.
    return values.flatten(0, 1).index_select(0, places.flatten()).reshape(*places.shape, *values.shape[2:])
