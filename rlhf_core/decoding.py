"""What samples token by token: Llama models without all that a step of 135M weights can do without, others as they are.

A decode step is bound by reading weights, so the lean way has the policy's adapter merged, matrices that take the same
input joined into one, and each laid out once; keys and values lie in buffers made at the start. A prompt that comes
several times is computed once. The numbers are those of the plain model up to float32's rounding.
"""

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_core.matrices import Matrix, laid_out
from rlhf_core.unpadding import places_of, sees_causally

DROP_SHARE = 0.25  # of a plain batch must have finished for those rows to leave it: copying its cache costs too
PREFILL_TOKENS = 4096  # of prompts computed together, padding included
STATIC_ROPE = ("default", "linear", "llama3")  # angles that do not hang on how long the text is


class Decoder(Protocol):
    """A batch of rows that grow by a token a step. Rows that end may leave it, so the order of rows may change."""

    rows_L: Tensor  # (L,) long, which of the prompts the rows still in the batch belong to

    def start(self) -> Tensor:
        """(L, V) logits of each row's first token."""

    def step(self, tokens_L: Tensor, running_L: Tensor) -> Tensor:
        """(L, V) logits of what follows the tokens, for the new `rows_L`: at least those that were still running."""

    def end(self, tokens_L: Tensor) -> None:
        """Take in the last tokens; nothing will follow."""

    def states(self) -> list[Tensor] | None:
        """(length, D) hidden states below layer `keep_depth` of each prompt with its response, where they were kept."""

    def tops(self) -> Tensor | None:
        """(B, max_tokens, D) last hidden states, final norm included, before each token that came, where kept."""


def decoder(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    pad_id: int,
    keep_depth: int,
    keep_tops: bool = False,
) -> Decoder:
    """The fastest one that fits the model.

    Args:
        model: a causal language model in eval mode; adapters that are on have their say.
        max_tokens: how many tokens a row may grow by.
        keep_depth: below which layer the hidden states are kept, 0 for none.
        keep_tops: whether the last ones are.
    """
    if is_lean(model):
        return Lean(model, prompts, max_tokens=max_tokens, keep_depth=keep_depth, keep_tops=keep_tops)
    return Plain(model, prompts, pad_id=pad_id)


def is_lean(model: Any) -> bool:
    """Whether `Lean` computes what the model does."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        type(model).__name__ == "LlamaForCausalLM"
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and rope.get("rope_type", "default") in STATIC_ROPE
    )


class Plain:
    """transformers' own forward pass with its cache, prompts padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], *, pad_id: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.rows_L = torch.arange(len(prompts))
        self.cache = DynamicCache(config=model.config)
        self.ids, mask = pad_left(prompts, pad_id)
        self.mask = mask.long()

    def start(self) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        return self.model(
            input_ids=self.ids.to(self.device),
            attention_mask=self.mask.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def step(self, tokens_L: Tensor, running_L: Tensor) -> Tensor:
        self.ids, self.mask = tokens_L[:, None], torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        if (~running_L).float().mean() >= DROP_SHARE:
            keep = running_L.nonzero().squeeze(1)
            self.cache.batch_select_indices(keep.to(self.device))
            self.ids, self.mask, self.rows_L = self.ids[keep], self.mask[keep], self.rows_L[keep]
        return self.start()

    def end(self, tokens_L: Tensor) -> None:
        pass

    def states(self) -> list[Tensor] | None:
        return None

    def tops(self) -> Tensor | None:
        return None


class Lean:
    """A Llama, cut down to what sampling needs.

    Prompts are aligned at their last token, in column P − 1 of the buffers, and row b begins in column `starts[b]`.
    Rows that have finished leave at once: one of the last ones moves into the gap, so that those left lie together.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        keep_depth: int,
        keep_tops: bool = False,
    ) -> None:
        self.model, self.config, self.prompts = model, model.config, [list(prompt) for prompt in prompts]
        self.weights, self.depth = _weights_of(model), keep_depth
        weight: Tensor = model.get_input_embeddings().weight
        self.device, count = weight.device, len(prompts)
        self.heads, self.groups = self.config.num_attention_heads, self.config.num_key_value_heads
        self.width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.rows_L = torch.arange(count)
        self.first = self.column = max(map(len, prompts))  # where responses begin, and the next token will stand
        self.starts_L = torch.tensor([self.column - len(prompt) for prompt in prompts], device=self.device)
        columns = self.column + max_tokens
        shape = (len(self.weights.layers), count, self.groups, columns, self.width)
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.kept = weight.new_zeros((count, columns, weight.shape[1])) if keep_depth else None
        self.last = weight.new_zeros((count, max_tokens, weight.shape[1])) if keep_tops else None
        self.ends = [self.column] * count
        positions = torch.arange(columns, device=self.device)
        cos, sin = (angles[0] for angles in model.base_model.rotary_emb(weight, positions[None]))
        sin[:, : self.width // 2].neg_()  # since the first half of a head takes the second half's negative
        self.turns = torch.stack([cos, sin])[:, :, None]  # (2, columns, 1, width)

    @torch.no_grad()
    def start(self) -> Tensor:
        # Each prompt that differs once, those of like length together.
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            rows_of.setdefault(tuple(prompt), []).append(row)
        last_LD = self.keys.new_zeros((len(self.prompts), self.config.hidden_size))
        for part in _pieces(sorted(rows_of, key=len)):
            for hidden_D, key in zip(self._prefill(part, [rows_of[key] for key in part]), part, strict=True):
                last_LD[rows_of[key]] = hidden_D
        if self.last is not None:
            self.last[:, 0] = last_LD
        return self.weights.head(last_LD)

    @torch.no_grad()
    def step(self, tokens_L: Tensor, running_L: Tensor) -> Tensor:
        # The layers below `depth` see the last tokens too, since their states are kept.
        hidden_LD = self._drop(self._lower(tokens_L), running_L)
        hidden_LD = self._layers(range(self.depth, len(self.weights.layers)), hidden_LD)
        self.column += 1
        hidden_LD = self._norm(hidden_LD, self.weights.norm)
        if self.last is not None:
            self.last[self.rows_L.to(self.device), self.column - self.first] = hidden_LD
        return self.weights.head(hidden_LD)

    @torch.no_grad()
    def end(self, tokens_L: Tensor) -> None:
        if self.depth:
            self._lower(tokens_L)

    def states(self) -> list[Tensor] | None:
        if self.kept is None:
            return None
        begins = (self.first - len(prompt) for prompt in self.prompts)
        places = enumerate(zip(begins, self.ends, strict=True))
        return [self.kept[row, begin:end].clone() for row, (begin, end) in places]

    def tops(self) -> Tensor | None:
        return self.last

    # ---- inside

    def _prefill(self, prompts: Sequence[tuple[int, ...]], rows: Sequence[Sequence[int]]) -> Tensor:
        """(U, D) the last hidden states of U prompts, whose keys and values go to the rows that begin with them."""
        first = self.column - max(map(len, prompts))
        ids_UP, mask_UP = (part.to(self.device) for part in pad_left(prompts, 0))
        places = places_of(mask_UP)  # N tokens without padding, as the matrices see them
        positions_N = places.take(mask_UP.long().cumsum(1) - 1)[0]
        seen_UPP = sees_causally(mask_UP)
        owner_R = torch.tensor([u for u, of_one in enumerate(rows) for _ in of_one], device=self.device)
        rows_R = torch.tensor([row for of_one in rows for row in of_one], device=self.device)

        def padded(flat_ND: Tensor) -> Tensor:
            """(U, heads, P, width) from (N, heads, width)."""
            return places.lay(flat_ND[None]).transpose(1, 2)

        hidden_ND = self.model.get_input_embeddings()(places.take(ids_UP)[0])
        for index, layer in enumerate(self.weights.layers):
            if self.kept is not None and index == self.depth:
                self.kept[rows_R, first : self.column] = places.lay(hidden_ND[None])[owner_R]
            query, key, value = self._project(layer, hidden_ND, self.turns[:, positions_N])
            query, key, value = padded(query), padded(key), padded(value)
            self.keys[index, rows_R, :, first : self.column] = key[owner_R]
            self.values[index, rows_R, :, first : self.column] = value[owner_R]
            found = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen_UPP[:, None], enable_gqa=self.groups < self.heads
            )
            mixed_ND = places.take(found.transpose(1, 2).flatten(2))[0]
            hidden_ND = self._mix(layer, hidden_ND, mixed_ND)
        last_U = mask_UP.sum(1).cumsum(0) - 1
        return self._norm(hidden_ND[last_U], self.weights.norm)

    def _lower(self, tokens_L: Tensor) -> Tensor:
        """(L, D) the tokens' hidden states below `depth`, which are kept."""
        hidden_LD = self.model.get_input_embeddings()(tokens_L.to(self.device))
        hidden_LD = self._layers(range(self.depth), hidden_LD)
        if self.kept is not None:
            self.kept[self.rows_L.to(self.device), self.column] = hidden_LD
        for row in self.rows_L.tolist():
            self.ends[row] = self.column + 1
        return hidden_LD

    def _layers(self, span: range, hidden_LD: Tensor) -> Tensor:
        """(L, D) hidden states after some layers. What these share is made once: small operations cost much."""
        count, column = len(hidden_LD), self.column
        turns = self.turns[:, column - self.starts_L]
        hides = self._hides()
        here = slice(span.start, span.stop)
        seen = [part[here, :count, :, : column + 1].flatten(1, 2).unbind() for part in (self.keys, self.values)]
        newest = [part[here, :count, :, column].unbind() for part in (self.keys, self.values)]
        for index, keys, values, new_key, new_value in zip(span, *seen, *newest, strict=True):
            layer = self.weights.layers[index]
            query, key, value = self._project(layer, hidden_LD, turns)
            new_key.copy_(key)
            new_value.copy_(value)
            # Query heads that share keys are so many queries of one head. Plain products, as SDPA is for long queries.
            scores = torch.baddbmm(hides, query.reshape(len(keys), -1, self.width), keys.mT, alpha=self.width**-0.5)
            hidden_LD = self._mix(layer, hidden_LD, torch.bmm(scores.softmax(-1), values).view(count, -1))
        return hidden_LD

    def _hides(self) -> Tensor:
        """(L × groups, 1, S) what is added to the scores of the columns up to the newest: a row begins late."""
        columns_S = torch.arange(self.column + 1, device=self.device)
        hides_LS = torch.where(columns_S >= self.starts_L[:, None], 0.0, torch.finfo(self.keys.dtype).min)
        return hides_LS.repeat_interleave(self.groups, 0)[:, None]

    def _project(self, layer: "_Layer", hidden_ND: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, heads, width) queries, and (N, groups, width) keys and values; `turns` (2, N, 1, width) as in `turns`."""
        whole = layer.qkv(self._norm(hidden_ND, layer.attention_norm)).view(len(hidden_ND), -1, self.width)
        turned, value = whole.split((self.heads + self.groups, self.groups), 1)
        other = turned.roll(self.width // 2, -1)
        turned.mul_(turns[0]).addcmul_(other, turns[1])
        query, key = turned.split((self.heads, self.groups), 1)
        return query, key, value

    def _mix(self, layer: "_Layer", hidden_ND: Tensor, mixed_ND: Tensor) -> Tensor:
        """What follows attention: its output matrix and the feed-forward part."""
        hidden_ND = hidden_ND + layer.out(mixed_ND)
        gate, up = layer.gate_up(self._norm(hidden_ND, layer.feed_norm)).chunk(2, dim=-1)
        return hidden_ND + layer.down(F.silu(gate).mul_(up))

    def _norm(self, hidden_ND: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(hidden_ND, weight_D.shape, weight_D, self.config.rms_norm_eps)

    def _drop(self, hidden_LD: Tensor, running_L: Tensor) -> Tensor:
        """Let rows that have finished leave, and give back the hidden states of those that stay."""
        left = int(running_L.sum())
        gaps = (~running_L[:left]).nonzero().squeeze(1)
        movers = running_L[left:].nonzero().squeeze(1) + left
        place_L = torch.arange(left)
        place_L[gaps] = movers
        if len(gaps):
            upto = self.column
            for buffer in (self.keys, self.values):
                for layer in buffer:  # one by one: a copy of one layer's rows at a time
                    layer[gaps.to(self.device), :, : upto + 1] = layer[movers.to(self.device), :, : upto + 1]
        self.rows_L, here_L = self.rows_L[place_L], place_L.to(self.device)
        self.starts_L = self.starts_L[here_L]
        return hidden_LD[here_L]


def _pieces(prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prompts, sorted by length, in pieces of at most `PREFILL_TOKENS`, padding included, or of one prompt."""
    pieces: list[list[tuple[int, ...]]] = [[]]
    for prompt in prompts:
        if pieces[-1] and len(prompt) * (len(pieces[-1]) + 1) > PREFILL_TOKENS:
            pieces.append([])
        pieces[-1].append(prompt)
    return pieces


def _joined(parts: Sequence[Tensor]) -> Matrix:
    """One matrix of those that take the same input."""
    return Matrix(torch.cat(list(parts)) if len(parts) > 1 else parts[0])


class _Layer:
    """The matrices and norms of one layer, adapters merged."""

    def __init__(self, layer: Any) -> None:
        attention, feed = layer.self_attn, layer.mlp
        self.qkv = _joined([_merged(attention.q_proj), _merged(attention.k_proj), _merged(attention.v_proj)])
        self.out = _joined([_merged(attention.o_proj)])
        self.gate_up = _joined([_merged(feed.gate_proj), _merged(feed.up_proj)])
        self.down = _joined([_merged(feed.down_proj)])
        self.attention_norm: Tensor = layer.input_layernorm.weight
        self.feed_norm: Tensor = layer.post_attention_layernorm.weight


class _Weights:
    """All layers, the last norm and the head."""

    def __init__(self, layers: list[_Layer], norm: Tensor, head: Matrix) -> None:
        self.layers, self.norm, self.head = layers, norm, head


# model -> part of it -> (what it was made from, as it was then; what was made). Laying out costs as much as a few
# steps, and most layers never change.
_made: "WeakKeyDictionary[nn.Module, dict[Any, tuple[list[tuple[Tensor, int]], Any]]]" = WeakKeyDictionary()


def _weights_of(model: Any) -> _Weights:
    body = model.base_model
    layers = [_kept(model, index, layer, lambda layer=layer: _Layer(layer)) for index, layer in enumerate(body.layers)]
    return _Weights(layers, body.norm.weight, laid_out(model.get_output_embeddings().weight))


def _kept(model: nn.Module, name: Any, module: nn.Module, make: Any) -> Any:
    """What `make` gives, made again only when a weight that has a say in it has changed."""
    sources = [(weight, weight._version) for weight in _sources(module)]
    of_model = _made.setdefault(model, {})
    before, made = of_model.get(name, (None, None))
    same = before is not None and len(before) == len(sources)
    if not same or any(a is not b or v != w for (a, v), (b, w) in zip(before or [], sources, strict=True)):
        of_model.pop(name, None)
        made = make()
        of_model[name] = (sources, made)
    return made


def _sources(module: nn.Module) -> list[Tensor]:
    """The weights that `_merged` reads, and all others that are no adapter's."""
    found: list[Tensor] = [weight for name, weight in module.named_parameters() if ".lora_" not in name]
    for linear in module.modules():
        for adapter in _active(linear):
            found += [linear.lora_A[adapter].weight, linear.lora_B[adapter].weight]  # type: ignore[index,union-attr]
    return found


def _active(linear: Any) -> list[str]:
    if not hasattr(linear, "lora_A") or linear.disable_adapters:
        return []
    return [adapter for adapter in linear.active_adapters if adapter in linear.lora_A]


@torch.no_grad()
def _merged(linear: Any) -> Tensor:
    """(out, in) a linear layer's weight with its active adapters added."""
    weight: Tensor = getattr(linear, "base_layer", linear).weight
    for adapter in _active(linear):
        weight = weight + linear.get_delta_weight(adapter)
    return weight


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, P) ids and their mask from prompts of uneven length, padding on the left."""
    width = max(len(row) for row in rows)
    ids_BP = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BP, torch.arange(width) >= width - lengths_B[:, None]
