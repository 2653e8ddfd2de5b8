"""Uneven rows without computing their padding.

All of a transformer but its attention treats a token by itself. So the tokens of a batch go through its matrices as one
row, padding left out, and only attention lays them out in rows, where a score costs little. The function is the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "sdpa_unpadded"


class Places(NamedTuple):
    """Where in (R, W) rows each of N tokens stands that is no padding."""

    of_N: Tensor  # (N,) long, into the rows one after the other
    rows: int
    width: int

    def take(self, values_RW: Tensor) -> Tensor:
        """(1, N, ...) of (R, W, ...)."""
        return values_RW.flatten(0, 1).index_select(0, self.of_N)[None]

    def lay(self, values_1N: Tensor) -> Tensor:
        """(R, W, ...) of (1, N, ...), padding 0."""
        whole = values_1N.new_zeros((self.rows * self.width, *values_1N.shape[2:]))
        return whole.index_copy(0, self.of_N, values_1N[0]).view(self.rows, self.width, *values_1N.shape[2:])


def places_of(mask_RW: Tensor) -> Places:
    """Of the tokens under a mask."""
    return Places(mask_RW.flatten().nonzero().squeeze(1), *mask_RW.shape)


def sees_causally(mask_RW: Tensor) -> Tensor:
    """(R, W, W) bool, True where the first place attends to the second: a token to itself and to those before it.

    Padding sees itself, lest its softmax be empty; nothing else sees it.
    """
    itself_WW = torch.eye(mask_RW.shape[1], dtype=torch.bool, device=mask_RW.device)
    return torch.ones_like(itself_WW).tril() & mask_RW[:, None] | itself_WW


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    places: Places | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention by SDPA; with `places`, of a row of tokens that the mask (R, 1, W, W) sees as rows."""
    if places is not None:
        query, key, value = (places.lay(part.transpose(1, 2)).transpose(1, 2) for part in (query, key, value))
    found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return found if places is None else places.take(found), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def prepare(model: PreTrainedModel) -> None:
    """Let a model that attends by SDPA take `places`; any other stays as it is."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def run(body: Any, mask_RW: Tensor, positions_RW: Tensor, sees_RWW: Tensor, **inputs: Tensor) -> Tensor:
    """(R, W, D) last hidden states, 0 at padding.

    Args:
        body: of a model that is prepared.
        mask_RW: bool, False at padding.
        sees_RWW: bool, True where the first place attends to the second; a place of padding sees one at least.
        inputs: (R, W) input_ids or (R, W, D) inputs_embeds.
    """
    places = places_of(mask_RW)
    out = body(
        attention_mask=torch.where(sees_RWW, 0.0, torch.finfo(torch.float32).min)[:, None],
        position_ids=places.take(positions_RW),
        use_cache=False,
        places=places,
        **{name: places.take(part) for name, part in inputs.items()},
    )
    return places.lay(out.last_hidden_state)
