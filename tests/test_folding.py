"""Rows that begin alike, computed as one: by hand, and against rows of their own, in numbers and in gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import perturbed
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from rlhf_core import folding
from rlhf_core.folding import alike, batches, fold_rows
from rlhf_core.models import REFERENCE, Roles, TrunkCache, load_tokenizer, pack, pad_right

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
PROMPT, OTHER = [7, 20, 35, 4, 90, 11, 12, 13, 14], [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70]
# Of one prompt: uneven answers, two that go on alike for a token, and one of nothing; then another prompt, and a loner.
ROWS = [
    *([*PROMPT, *answer] for answer in ([5, 1], [5, 77, 31, 8], [64, 19, 250, 3, 2, 1], [])),
    *([*OTHER, *answer] for answer in ([9, 9], [8])),
    [40, 41, 42],
]


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# ---- by hand


def test_neighbours_that_begin_alike_are_found() -> None:
    assert alike(ROWS) == [(4, 9), (2, 11), (1, 3)]
    assert alike([]) == []
    assert alike([PROMPT, OTHER, PROMPT]) == [(1, 9), (1, 11), (1, 9)]  # only neighbours
    assert alike([PROMPT[:7], PROMPT[:7]]) == [(1, 7), (1, 7)]  # too little to be worth it
    assert alike([PROMPT[:8], PROMPT[:8]]) == [(2, 8)]


def test_a_row_that_would_cost_the_others_more_than_it_saves_begins_anew() -> None:
    long = list(range(100, 130))
    three = [[*long, 1], [*long, 2], [*long, 3]]
    assert alike([*three, [*long[:19], 4]]) == [(3, 30), (1, 20)]  # 3 × 19 is less than 2 × 30
    assert alike([*three, [*long[:20], 4]]) == [(4, 20)]


def test_no_more_rows_than_the_limit_lie_as_one() -> None:
    assert alike([PROMPT] * 19) == [(8, 9), (8, 9), (3, 9)]


def test_batches_keep_together_what_is_alike() -> None:
    assert batches(ROWS, 4) == [[6, 4, 5], [0, 1, 2, 3]]  # folded they have 3, 14 and 21 tokens
    assert batches(ROWS, 2) == [[6], [0, 1], [4, 5], [2, 3]]  # 3, 14, 14 and 15
    assert batches(ROWS, 1) == [[6], [3], [0], [5], [1], [4], [2]]
    assert batches(ROWS, 8) == [[6, 4, 5, 0, 1, 2, 3]]


def test_folding_by_hand() -> None:
    mask_BS = torch.tensor([[True, True, True, False], [True, True, True, True], [True, False, False, False]])
    fold = fold_rows(mask_BS, [(2, 2), (1, 1)])
    ids_BS = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 5], [6, 0, 0, 0]])
    assert fold.fold(ids_BS).tolist() == [[1, 2, 3, 4, 5], [6, 1, 1, 1, 1]]  # padding stands for the first token of all
    assert fold.positions_GF.tolist() == [[0, 1, 2, 2, 3], [0, 0, 0, 0, 0]]
    assert fold.sees_GFF[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],  # not the other row's token
        [1, 1, 0, 1, 1],
    ]
    assert not fold.sees_GFF[1, 0, 1:].any()
    back_BS = fold.unfold(fold.fold(ids_BS))
    assert back_BS[mask_BS].equal(ids_BS[mask_BS])


# ---- in a model


def test_scores_and_gradients_are_those_of_rows_of_their_own(
    family: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[bool, tuple[Tensor, list[Tensor]]] = {}
    for folded in (True, False):
        roles = perturbed(family, section("reward"))
        if not folded:
            monkeypatch.setattr(Roles, "folds", False)
        assert roles.folds is folded
        raw_N = roles.score_rows(ROWS, "reward", 0, size=4)
        (raw_N * torch.arange(1, 1 + len(ROWS))).sum().backward()
        gradients = [parameter.grad for parameter in roles.trainable("reward")]
        found[folded] = raw_N.detach(), [gradient for gradient in gradients if gradient is not None]
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-5, atol=1e-5)
    assert len(found[True][1]) == len(found[False][1]) > 4
    for ours, plain in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 0], ids=["shared layers", "whole model"])
@pytest.mark.parametrize("how", ["plain", "kept states", "cached"])
def test_logprobs_are_those_of_rows_of_their_own(
    llama: Path, section: Callable[..., Any], layers: int, how: str
) -> None:
    roles = perturbed(llama, section("reward", lora_layers=layers))
    assert (roles.depth > 0) == bool(layers)
    prompts = [PROMPT] * 3 + [OTHER] * 2
    packed = pack(prompts, [[5, 1], [5, 77, 31, 8], [64, 19, 250, 3, 2, 1], [9, 9], [8]], 0)
    plain = roles.trunk(packed)
    options: dict[str, Any] = {}
    if how == "kept states":
        options["states"] = [state[mask] for state, mask in zip(plain.states, packed.mask_BS, strict=True)]
    if how == "cached":
        options["cache"] = TrunkCache()
    for _ in range(2):  # the second time, what is cached is found
        folded = roles.trunk(packed, folded=True, **options)
        assert folded.fold is not None
        assert folded.states.shape[:2] == (2, 9 + 2 + 4 + 6)
        for role in (REFERENCE, "reward"):
            ours_BT, _ = roles.logprobs(folded, role, packed.ids_BT, packed.mask_BT, temperature=0.7)
            theirs_BT, _ = roles.logprobs(plain, role, packed.ids_BT, packed.mask_BT, temperature=0.7)
            torch.testing.assert_close(ours_BT, theirs_BT, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_alike_is_computed_once(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, seen = perturbed(llama, section("reward")), []
    assert roles.folds
    lower = Roles._lower

    def counted(self: Roles, ids_BS: Tensor, mask_BS: Tensor, fold: Any) -> Tensor:
        states = lower(self, ids_BS, mask_BS, fold)
        seen.append(tuple(states.shape[:2]))
        return states

    monkeypatch.setattr(Roles, "_lower", counted)
    roles.score_rows(ROWS, "reward", 0, size=4)
    assert seen == [(2, 14), (1, 21)]  # [6] beside [4, 5], then [0, 1, 2, 3]: rows of their own would be 3 and 4 rows
    seen.clear()
    cache = TrunkCache()
    for _ in range(2):
        roles.score_rows(ROWS, "reward", 0, size=4, cache=cache)
    assert seen == [(1, 3), (1, 14), (1, 21)]  # each alone, and once


@torch.no_grad()
def test_equal_rows_are_equal_in_the_last_digit(llama: Path, section: Callable[..., Any]) -> None:
    roles = perturbed(llama, section("reward"))
    rows = [*ROWS, ROWS[1], ROWS[5], ROWS[1]]
    raw_N = roles.score_rows(rows, "reward", 0, size=4)
    assert raw_N[1] == raw_N[len(ROWS)] == raw_N[len(ROWS) + 2]
    assert raw_N[5] == raw_N[len(ROWS) + 1]
    assert raw_N[: len(ROWS)].equal(roles.score_rows(ROWS, "reward", 0, size=4))
    assert len(set(raw_N.tolist())) == len(ROWS)


def test_a_model_with_a_window_keeps_rows_of_their_own(
    llama: Path, section: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=300, num_key_value_heads=2, sliding_window=4, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(llama).save_pretrained(tmp_path)
    roles = perturbed(tmp_path, section("reward", lora_layers=1))
    assert not roles.folds
    with torch.no_grad():
        together_N = roles.score_rows(ROWS, "reward", 0)
        alone_N = torch.cat([roles.score_rows([row], "reward", 0) for row in ROWS])
    torch.testing.assert_close(together_N, alone_N, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_take_the_mask_keeps_rows_of_their_own(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = perturbed(llama, section("reward"))
    known = folding.fold_rows
    everything = lambda *given: known(*given)._replace(sees_GFF=torch.ones_like(known(*given).sees_GFF))  # noqa: E731
    monkeypatch.setattr("rlhf_core.models.fold_rows", everything)
    assert not roles.folds


def test_a_single_token_is_padded_like_any_row() -> None:
    ids_BS, mask_BS = pad_right([[3], [4, 5]], 0)
    assert fold_rows(mask_BS, [(1, 1), (1, 2)]).fold(ids_BS).tolist() == [[3, 3], [4, 5]]
