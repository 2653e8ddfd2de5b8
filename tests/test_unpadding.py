"""Rows without their padding: by hand, and against padded rows, in numbers and in gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import perturbed
from torch import Tensor

from rlhf_core import unpadding
from rlhf_core.models import REFERENCE, Roles, pack

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
PROMPTS = [[7, 20, 35, 4, 90, 11, 12, 13, 14]] * 2 + [[60, 61]]
RESPONSES = [[5, 1], [5, 77, 31, 8, 2], [9]]
TOKENS = 9 + 2 + 9 + 5 + 2 + 1  # without padding, each row by itself
FOLDED_TOKENS = 10 + 1 + 4 + 2 + 1  # two responses begin alike too


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# ---- by hand


def test_tokens_are_taken_and_laid_back_by_hand() -> None:
    values_RW = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    places = unpadding.places_of(torch.tensor([[True, True, False], [True, False, False]]))
    assert places.take(values_RW).tolist() == [[1.0, 2.0, 3.0]]
    assert places.lay(places.take(values_RW)).tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]
    deep_RW2 = torch.stack([values_RW, -values_RW], -1)
    assert places.lay(places.take(deep_RW2))[0].tolist() == [[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]


# ---- in a model


def answer(roles: Roles, *, folded: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs, values and the gradients of both."""
    packed = pack(PROMPTS, RESPONSES, 0)
    trunk = roles.trunk(packed, folded=folded)
    assert (trunk.fold is not None) == folded
    logprobs_BT, _ = roles.logprobs(trunk, "reward", packed.ids_BT, packed.mask_BT, temperature=0.7)
    values_BT = roles.values(trunk, "reward", packed.mask_BT)
    weights = torch.arange(1.0, 1 + logprobs_BT.numel()).view_as(logprobs_BT)
    ((logprobs_BT + values_BT) * weights).sum().backward()
    gradients = [parameter.grad for parameter in roles.trainable("reward")]
    return logprobs_BT.detach(), values_BT.detach(), [each for each in gradients if each is not None]


@pytest.mark.parametrize("folded", [False, True], ids=["rows of their own", "folded"])
@pytest.mark.parametrize(("method", "layers"), [("lora", 1), ("lora", 0), ("full", 0)])
def test_numbers_and_gradients_are_those_of_padded_rows(
    family: Path,
    section: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    folded: bool,
    method: str,
    layers: int,
) -> None:
    found = {}
    for unpads in (True, False):
        roles = perturbed(family, section("reward", lora_layers=layers), method=method)
        if not unpads:
            monkeypatch.setattr(Roles, "unpads", False)
        assert roles.unpads is unpads
        found[unpads] = answer(roles, folded=folded)
    for ours, padded in zip(found[True][:2], found[False][:2], strict=True):
        torch.testing.assert_close(ours, padded, rtol=1e-5, atol=1e-5)
    assert len(found[True][2]) == len(found[False][2]) > 4
    for ours, padded in zip(found[True][2], found[False][2], strict=True):
        torch.testing.assert_close(ours, padded, rtol=1e-5, atol=1e-5 * float(padded.abs().max()))


@pytest.mark.parametrize(("folded", "tokens"), [(False, TOKENS), (True, FOLDED_TOKENS)])
def test_no_matrix_sees_padding(llama: Path, section: Callable[..., Any], folded: bool, tokens: int) -> None:
    roles = perturbed(llama, section("reward", lora_layers=1))
    assert roles.unpads
    assert roles.folds
    assert roles.depth
    packed, seen = pack(PROMPTS, RESPONSES, 0), []
    for layer in roles.model.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    roles.hidden(roles.trunk(packed, folded=folded), "reward")
    assert seen == [tokens] * roles.layers


@torch.no_grad()
def test_rows_of_one_length_are_run_as_they_are(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = perturbed(llama, section("reward"))
    assert roles.unpads
    monkeypatch.setattr(unpadding, "run", None)  # would fail when called
    packed = pack([[1, 2], [3, 4]], [[5, 6], [7, 8]], 0)
    assert roles.hidden(roles.trunk(packed), "reward").shape[:2] == (2, 4)


@torch.no_grad()
@pytest.mark.parametrize("why", ["another attention", "places are not passed on", "it sees other rows"])
def test_a_model_that_does_not_bear_it_keeps_its_padding(
    llama: Path, section: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    plain = perturbed(llama, section("reward"))
    packed = pack(PROMPTS, RESPONSES, 0)
    expected_BSD = plain.hidden(plain.trunk(packed), "reward")
    roles = perturbed(llama, section("reward"))
    if why == "another attention":
        roles.model.set_attn_implementation("eager")
    if why == "places are not passed on":
        run = type(roles.model.get_decoder()).forward
        decoder = roles.model.get_decoder()
        decoder.forward = lambda *a, places=None, **k: run(decoder, *a, **k)
    if why == "it sees other rows":
        monkeypatch.setattr(unpadding.Places, "lay", lambda self, values: values.expand(self.rows, -1, -1, -1))
    assert not roles.unpads
    found_BSD = roles.hidden(roles.trunk(packed), "reward")
    torch.testing.assert_close(found_BSD[packed.mask_BS], expected_BSD[packed.mask_BS], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_measuring_it_leaves_the_role_that_was_on(llama: Path, section: Callable[..., Any]) -> None:
    packed = pack(PROMPTS, RESPONSES, 0)
    roles = perturbed(llama, section("reward", lora_layers=0))  # nothing is shared: `hidden` is the first to ask
    first_BSD = roles.hidden(roles.trunk(packed), "reward")
    torch.testing.assert_close(roles.hidden(roles.trunk(packed), "reward"), first_BSD, rtol=0, atol=0)
    reference_BSD = roles.hidden(roles.trunk(packed), REFERENCE)
    assert not torch.allclose(reference_BSD[packed.mask_BS], first_BSD[packed.mask_BS], atol=1e-3)
