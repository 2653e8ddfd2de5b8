"""Floating-point operations of a Llama, counted from its shape: what each way of training has to compute.

A product of N rows with an (in, out) matrix is 2·N·in·out. Attention of a token that sees s positions is 4·H·w·s, half
of it for the scores. A backward pass through a matrix costs as much again for the gradient of what came in, and once
more for the weight's own, where it is trained. Norms, activations and softmax are left out, well under 1 %.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Of a Llama."""

    layers: int
    width: int  # D, of the hidden states
    inner: int  # F, of the feed-forward part
    heads: int  # H
    groups: int  # G, of keys and values
    head_width: int  # w
    vocabulary: int  # V
    rank: int = 0  # r, of the adapters

    @classmethod
    def of(cls, config: Any, rank: int = 0) -> "Shape":
        """The shape that a configuration of transformers tells."""
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, head_width, config.vocab_size, rank,
        )  # fmt: skip

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's matrices: queries, keys, values, what follows attention, gate, up, down."""
        inside = self.heads * self.head_width
        shared = self.groups * self.head_width
        return [
            (inside, self.width), (shared, self.width), (shared, self.width), (self.width, inside),
            (self.inner, self.width), (self.inner, self.width), (self.width, self.inner),
        ]  # fmt: skip

    @property
    def joined(self) -> list[tuple[int, int]]:
        """The same where matrices with one input are one: qkv, out, gate and up, down; the head last."""
        (q, d), (k, _), (v, _), out, (gate, _), (up, _), down = self.matrices
        return [(q + k + v, d), out, (gate + up, d), down] * self.layers + [(self.vocabulary, d)]


class Rows(NamedTuple):
    """Rows of one length: a prompt of P tokens and a response of T."""

    count: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        return self.count * (self.prompt + self.response)

    @property
    def answered(self) -> int:
        """Tokens whose probability is asked for."""
        return self.count * self.response

    @property
    def seen(self) -> int:
        """Positions seen, summed over the tokens."""
        return self.count * _up_to(self.prompt + self.response)


class Work(NamedTuple):
    """What texts to learn from come to, padding left out."""

    given: int  # tokens of all texts, which a rate counts
    tokens: int  # those that are computed: what texts begin alike with stands once
    seen: int  # positions seen, summed over those
    answered: int  # tokens whose probability is asked for

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]], answered: int = 0) -> "Work":
        """Of groups of texts: how many tokens those of a group begin alike with, and how long each of them is."""
        given = sum(sum(lengths) for _, lengths in groups)
        twice = sum((len(lengths) - 1) * common for common, lengths in groups)
        seen = sum(sum(map(_up_to, lengths)) - (len(lengths) - 1) * _up_to(common) for common, lengths in groups)
        return cls(given, given - twice, seen, answered)


def _up_to(length: int) -> int:
    """Positions that the tokens of a row see in all."""
    return length * (length + 1) // 2


def forward(shape: Shape, layers: int, tokens: int, seen: int, *, adapter: bool = False) -> int:
    """Some layers, without the head."""
    once = sum(2 * out * inside for out, inside in shape.matrices)
    small = sum(2 * shape.rank * (out + inside) for out, inside in shape.matrices) if adapter else 0
    return layers * (tokens * (once + small) + 4 * shape.heads * shape.head_width * seen)


def learn(shape: Shape, layers: int, tokens: int, seen: int, *, full: bool) -> int:
    """Forward and backward through some layers: trained in full, or by adapters with their weights frozen."""
    frozen = forward(shape, layers, tokens, 0)
    attention = forward(shape, layers, 0, seen)
    adapters = forward(shape, layers, tokens, 0, adapter=True) - frozen
    return 3 * frozen + 3 * attention if full else 2 * frozen + 3 * attention + 3 * adapters


def head(shape: Shape, tokens: int) -> int:
    """Logits of some tokens, forward."""
    return 2 * tokens * shape.width * shape.vocabulary


def training(shape: Shape, work: Work, *, layers: int, full: bool, first: float = 1.0, passes: float = 1.0) -> float:
    """SFT or a reward model: the layers below the lowest adapter once, the others and the logits in every pass.

    Args:
        first: share of the texts that came for the first time; only those cost the lower layers.
        passes: how often the texts came.
    """
    lower = forward(shape, shape.layers - layers, work.tokens, work.seen)
    upper = learn(shape, layers, work.tokens, work.seen, full=full) + (3 if full else 2) * head(shape, work.answered)
    return first * lower + passes * upper


def sampling(shape: Shape, rows: Rows, *, prompts: int) -> int:
    """Each prompt once, each token of a response once, and its logits; adapters are merged."""
    seen = rows.seen - (rows.count - prompts) * _up_to(rows.prompt)
    return forward(shape, shape.layers, prompts * rows.prompt + rows.answered, seen) + head(shape, rows.answered)


def ppo_ours(
    shape: Shape, rows: Rows, *, prompts: int, layers: int, epochs: int, shared: bool = False, watch_every: int = 0
) -> int:
    """One update: roles with adapters in the top `layers`, the layers below kept in sampling.

    Reference, value and reward model look at the rollouts once, the policy while it samples; policy and value learn
    from them. Where the value model is a head on the policy (`shared`), what the policy computes is its own too. The
    gold model looks too, at every `watch_every`th update, so this is the mean over updates; 0 is never.
    """
    roles = 2 if shared else 3
    one = forward(shape, layers, rows.tokens, rows.seen, adapter=True)
    look = roles * one + 2 * head(shape, rows.answered) + (one // watch_every if watch_every else 0)
    policy = learn(shape, layers, rows.tokens, rows.seen, full=False) + 2 * head(shape, rows.answered)
    value = 0 if shared else learn(shape, layers, rows.tokens, rows.seen, full=False)
    return sampling(shape, rows, prompts=prompts) + look + epochs * (policy + value)


def ppo_trl(shape: Shape, rows: Rows, *, epochs: int, lora: bool, checkpointed: bool = False) -> int:
    """One update of TRL's PPOTrainer: four models, logits of every token.

    The old log-probabilities come with sampling; reference, value and reward look at the rollouts once. Checkpointed,
    each layer of policy and value is computed once more for the backward pass, but for the product that it ends with.
    """
    look = 3 * forward(shape, shape.layers, rows.tokens, rows.seen) + head(shape, rows.tokens)
    policy = learn(shape, shape.layers, rows.tokens, rows.seen, full=not lora) + (2 if lora else 3) * head(
        shape, rows.tokens
    )
    value = learn(shape, shape.layers, rows.tokens, rows.seen, full=True)
    again = 0
    if checkpointed:
        out, inside = shape.matrices[-1]
        ends = shape.layers * 2 * rows.tokens * out * inside
        again = 2 * (forward(shape, shape.layers, rows.tokens, rows.seen) - ends)
    return sampling(shape, rows, prompts=rows.count) + look + epochs * (policy + value + again)
