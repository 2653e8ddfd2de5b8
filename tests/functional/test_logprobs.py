"""logprobs: from logits to log-probabilities of tokens and entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.logprobs import entropy, token_logprobs

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-9, atol=1e-12)


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits_BTV = torch.randn(2, 3, 5, dtype=torch.float64, generator=draw) * 3
    return logits_BTV, torch.randint(0, 5, (2, 3), generator=draw)


def slow_probabilities(logits: Tensor, temperature: float) -> list[float]:
    weights = [math.exp(float(z) / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def test_token_logprobs_by_hand() -> None:
    # logits log 1, log 2, log 5 are probabilities 1/8, 2/8, 5/8
    logits_BTV = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]], dtype=torch.float64).log()
    found = token_logprobs(logits_BTV, torch.tensor([[1, 2]]), temperature=1.0)
    close(found, [[math.log(2 / 8), math.log(5 / 8)]])


def test_temperature_by_hand() -> None:
    # temperature 1/2 squares the weights: 1, 4, 25 of 30
    logits_BTV = torch.tensor([[[1.0, 2.0, 5.0]]], dtype=torch.float64).log()
    close(token_logprobs(logits_BTV, torch.tensor([[1]]), temperature=0.5), [[math.log(4 / 30)]])
    expected = -sum(p * math.log(p) for p in (1 / 30, 4 / 30, 25 / 30))
    close(entropy(logits_BTV, temperature=0.5), [[expected]])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_both_equal_loops(temperature: float) -> None:
    logits_BTV, ids_BT = case()
    logprobs_BT, entropy_BT = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for b in range(2):
        for t in range(3):
            probabilities = slow_probabilities(logits_BTV[b, t], temperature)
            logprobs_BT[b, t] = math.log(probabilities[ids_BT[b, t]])
            entropy_BT[b, t] = -sum(p * math.log(p) for p in probabilities)
    close(token_logprobs(logits_BTV, ids_BT, temperature=temperature), logprobs_BT)
    close(entropy(logits_BTV, temperature=temperature), entropy_BT)


def test_equal_logits_give_log_v() -> None:
    logits_BTV = torch.full((1, 2, 8), 1234.5, dtype=torch.float64)
    close(entropy(logits_BTV, temperature=3.0), [[math.log(8)] * 2])
    close(token_logprobs(logits_BTV, torch.tensor([[0, 7]]), temperature=3.0), [[-math.log(8)] * 2])


def test_huge_logits_overflow_nothing() -> None:
    logits_BTV = torch.tensor([[[1e4, 0.0, -1e4]]])
    assert token_logprobs(logits_BTV, torch.tensor([[0]]), temperature=1.0).tolist() == [[0.0]]
    assert token_logprobs(logits_BTV, torch.tensor([[2]]), temperature=1.0).tolist() == [[-2e4]]
    assert entropy(logits_BTV, temperature=1.0).tolist() == [[0.0]]


def test_a_token_ruled_out_counts_for_nothing_in_value_and_gradient() -> None:
    logits_BTV = torch.tensor([[[0.3, -1.0, -math.inf]]], dtype=torch.float64, requires_grad=True)
    two_BTV = torch.tensor([[[0.3, -1.0]]], dtype=torch.float64, requires_grad=True)
    found, expected = entropy(logits_BTV, temperature=1.5), entropy(two_BTV, temperature=1.5)
    close(found, expected.detach())
    found.sum().backward()
    expected.sum().backward()
    assert logits_BTV.grad is not None
    assert two_BTV.grad is not None
    close(logits_BTV.grad[:, :, :2], two_BTV.grad)
    assert logits_BTV.grad[0, 0, 2] == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_low_precision_logits_give_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    logits_BTV = case()[0].to(dtype)
    found = token_logprobs(logits_BTV, case()[1], temperature=0.7)
    assert found.dtype == entropy(logits_BTV, temperature=0.7).dtype == expected
    assert torch.equal(found, token_logprobs(logits_BTV.to(expected), case()[1], temperature=0.7))


def test_nan_at_a_position_stays_at_that_position() -> None:
    logits_BTV, ids_BT = case()
    spoilt_BTV = logits_BTV.clone()
    spoilt_BTV[0, 1] = math.nan
    others = torch.tensor([[True, False, True], [True, True, True]])
    for function in (lambda x: token_logprobs(x, ids_BT, temperature=1.0), lambda x: entropy(x, temperature=1.0)):
        close(function(spoilt_BTV)[others], function(logits_BTV)[others])


def test_gradients() -> None:
    logits_BTV, ids_BT = case()
    leaf = logits_BTV.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids_BT, temperature=0.7), (leaf,))
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=0.7), (leaf,))


def test_no_rows_and_no_tokens() -> None:
    for shape in ((0, 3), (2, 0)):
        assert token_logprobs(torch.zeros(*shape, 5), torch.zeros(shape, dtype=torch.int64), temperature=1.0).shape == (
            shape
        )
        assert entropy(torch.zeros(*shape, 5), temperature=1.0).shape == shape


@pytest.mark.parametrize(
    ("logits_shape", "ids_shape"), [((2, 3, 5), (2, 4)), ((2, 3, 5), (2,)), ((2, 3), (2, 3)), ((2, 3, 5, 1), (2, 3))]
)
def test_wrong_shapes_are_named(logits_shape: tuple[int, ...], ids_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits_BTV") as raised:
        token_logprobs(torch.zeros(logits_shape), torch.zeros(ids_shape, dtype=torch.int64), temperature=1.0)
    assert f"found logits_BTV {logits_shape}, ids_BT {ids_shape}" in str(raised.value)


def test_entropy_wants_three_dimensions() -> None:
    with pytest.raises(ValueError, match=r"3 dimensions for all; found logits_BTV \(2, 3\)"):
        entropy(torch.zeros(2, 3), temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_above_0(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature above 0"):
        entropy(case()[0], temperature=temperature)
    with pytest.raises(ValueError, match="temperature above 0"):
        token_logprobs(*case(), temperature=temperature)


@FAST
@given(st.integers(0, 1000), st.floats(0.2, 5), st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing_and_probabilities_add_up(
    seed: int, temperature: float, shift: float
) -> None:
    logits_BTV, ids_BT = case(seed)
    shifted = token_logprobs(logits_BTV + shift, ids_BT, temperature=temperature)
    torch.testing.assert_close(
        token_logprobs(logits_BTV, ids_BT, temperature=temperature), shifted, rtol=1e-9, atol=1e-10
    )
    total = sum(token_logprobs(logits_BTV, torch.full_like(ids_BT, v), temperature=temperature).exp() for v in range(5))
    close(total, torch.ones(2, 3))
