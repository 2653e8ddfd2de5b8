"""What crosses modules: the records of the data formats, and the rollouts of one PPO update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and what reads data alone does without
    from torch import Tensor

Message = tuple[str, str]  # (role, content)


class Demonstration(NamedTuple):
    """A prompt and how it should be answered."""

    prompt: tuple[Message, ...]
    response: str
    category: str = ""


class Ranking(NamedTuple):
    """A prompt and K ≥ 2 responses with their ranks: 1 is best, ties allowed. Pairs are K = 2."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    scores: dict[str, list[float]] | None = None
    source: str = ""
    annotator: str = ""
    category: str = ""


class Prompt(NamedTuple):
    """Something to answer."""

    prompt: tuple[Message, ...]
    category: str = ""


class Sampled(NamedTuple):
    """Responses sampled for a batch of prompts."""

    prompts: list[list[int]]  # B rows of token ids
    ids_BT: Tensor  # (B, T) long; the stop token is kept, what follows is PAD
    mask_BT: Tensor  # (B, T) bool, a prefix of each row
    stopped_B: Tensor  # (B,) bool, True where a stop token came
    # Of each row of this process (S, D) hidden states of prompt and response, where they were kept while sampling.
    states: list[Tensor] | None = None
    logprobs_BT: Tensor | None = None  # nats, of the tokens as they were sampled, where asked for; 0 past a response
    # Of each row of this process (T, D) last hidden states that the response's tokens were drawn from, where kept.
    tops: list[Tensor] | None = None

    def responses(self) -> list[list[int]]:
        """Token ids of each response, by its mask: a PAD that was sampled is a token like any other."""
        return [ids_T[mask_T].tolist() for ids_T, mask_T in zip(self.ids_BT, self.mask_BT, strict=True)]


class Rollouts(NamedTuple):
    """A rollout batch with all that learning needs; no gradient hangs on it."""

    trunk: Any  # models.Trunk of prompt and response
    ids_BT: Tensor
    mask_BT: Tensor
    old_logprobs_BT: Tensor  # nats
    ref_logprobs_BT: Tensor  # nats
    old_values_BT: Tensor  # reward units
    advantages_BT: Tensor
    returns_BT: Tensor
    old_cost_values_BT: Tensor | None = None  # reward units of the cost's axis; these two where a cost is limited
    cost_returns_BT: Tensor | None = None

    def rows(self, index: Tensor | Sequence[int]) -> Rollouts:
        """Some of the rows, trimmed to the longest response among them."""
        length = int(self.mask_BT[index].sum(1).max()) if len(index) else 0
        parts: Any = (None if part is None else part[index, :length] for part in self[1:])
        return Rollouts(self.trunk.rows(index), *parts)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name but the trunk's hidden states, which follow from its ids."""
        own = {name: part for name, part in self._asdict().items() if part is not None}
        trunk = own.pop("trunk")
        return {"prompt_and_response_ids_BS": trunk.ids_BS, "prompt_and_response_mask_BS": trunk.mask_BS, **own}
