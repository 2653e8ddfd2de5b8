"""masks: means, whitening and truncation over the entries that count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.masks import (
    describe_shapes,
    first_true_index,
    masked_mean,
    masked_var,
    require_same_shape,
    truncate_at_stop,
    whiten,
    zero_masked,
)

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
NAN = math.nan


def close(found: Tensor, expected: object, rtol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12 if found.dtype == torch.float64 else 1e-6)


def ragged(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, dtype=torch.float64, generator=draw) * 3 + 1
    mask = torch.rand(4, 5, generator=draw) < 0.6
    mask[0, 0] = mask[1, 1] = True
    mask[2] = False
    return values, mask


def kept(values: Tensor, mask: Tensor) -> list[float]:
    """The True entries, by loops."""
    return [
        float(x) for row, row_mask in zip(values, mask, strict=True) for x, m in zip(row, row_mask, strict=True) if m
    ]


def slow_var(numbers: list[float], divisor: int) -> float:
    mean = sum(numbers) / len(numbers)
    return sum((x - mean) ** 2 for x in numbers) / divisor


def gradient(function, values: Tensor) -> Tensor:
    leaf = values.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def test_zero_masked_keeps_what_counts() -> None:
    values = torch.tensor([1.0, NAN, -2.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    close(zero_masked(values, mask), [1.0, 0.0, -2.0])


def test_masked_mean_by_hand() -> None:
    # (1 + 4 + 10) / 3 = 5
    values = torch.tensor([[1.0, 4.0], [100.0, 10.0]], dtype=torch.float64)
    close(masked_mean(values, torch.tensor([[True, True], [False, True]])), 5.0)


def test_masked_mean_of_one_entry_is_that_entry() -> None:
    close(masked_mean(torch.tensor([3.0, 8.0]), torch.tensor([True, False])), 3.0)


def test_masked_mean_equals_loops_and_plain_mean() -> None:
    values, mask = ragged()
    numbers = kept(values, mask)
    close(masked_mean(values, mask), sum(numbers) / len(numbers))
    close(masked_mean(values, torch.ones_like(mask)), values.mean())


@pytest.mark.parametrize(("unbiased", "expected"), [(False, 2 / 3), (True, 1.0)])
def test_masked_var_by_hand(unbiased: bool, expected: float) -> None:
    # 1, 2, 3: mean 2, squares 1 + 0 + 1 = 2; over 3, or over 2
    values = torch.tensor([1.0, NAN, 2.0, 3.0], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    close(masked_var(values, mask, unbiased=unbiased), expected)


def test_masked_var_equals_loops_and_divides_by_the_count_unless_told() -> None:
    values, mask = ragged()
    numbers = kept(values, mask)
    close(masked_var(values, mask), slow_var(numbers, len(numbers)))
    close(masked_var(values, mask, unbiased=True), slow_var(numbers, len(numbers) - 1))
    close(masked_var(values, torch.ones_like(mask), unbiased=True), values.var())


def test_masked_var_of_two_entries() -> None:
    # 1 and 5: mean 3, squares 4 + 4 = 8; over 2 is 4, over 1 is 8
    values, mask = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64), torch.tensor([True, True, False])
    close(masked_var(values, mask), 4.0)
    close(masked_var(values, mask, unbiased=True), 8.0)


@pytest.mark.parametrize("unbiased", [False, True])
def test_masked_var_of_one_entry_is_0(unbiased: bool) -> None:
    close(masked_var(torch.tensor([3.0, 8.0]), torch.tensor([True, False]), unbiased=unbiased), 0.0)


def test_whiten_by_hand() -> None:
    # 1 and 5: mean 3, std 2
    values = torch.tensor([[1.0, 5.0, 40.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    close(whiten(values, mask), [[-1.0, 1.0, 0.0]])
    close(whiten(values, mask, shift_mean=False), [[2.0, 4.0, 0.0]])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_equals_loops(shift_mean: bool) -> None:
    values, mask = ragged()
    numbers = kept(values, mask)
    mean, std = sum(numbers) / len(numbers), math.sqrt(slow_var(numbers, len(numbers)))
    expected = torch.zeros_like(values)
    for i in range(4):
        for j in range(5):
            if mask[i, j]:
                expected[i, j] = (values[i, j] - mean) / std + (0 if shift_mean else mean)
    close(whiten(values, mask, shift_mean=shift_mean), expected)


def test_whitened_entries_have_mean_0_and_variance_1_at_any_scale() -> None:
    values, mask = ragged()
    for scale in (1e-3, 1.0, 1e6):
        whitened = whiten(values * scale, mask)
        close(masked_mean(whitened, mask), 0.0)
        close(masked_var(whitened, mask), 1.0)
        close(masked_mean(whiten(values * scale, mask, shift_mean=False), mask), masked_mean(values * scale, mask))


def test_whiten_of_what_hardly_varies_shrinks_it() -> None:
    # 1 ± 1e-6 has variance 1e-12, below the floor of 1e-8: the deviations of 1e-6 are divided by 1e-4
    values = torch.tensor([1 + 1e-6, 1 - 1e-6], dtype=torch.float64)
    close(whiten(values, torch.tensor([True, True])), [1e-2, -1e-2], rtol=1e-8)  # 1 + 1e-6 is rounded to 1e-16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whiten_of_a_constant_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    values, mask = torch.full((3, 3), 0.1, dtype=dtype), torch.ones(3, 3, dtype=torch.bool)
    assert whiten(values, mask).abs().max() < 1e-2
    assert torch.isfinite(gradient(lambda x: whiten(x, mask).square().sum(), values)).all()


@pytest.mark.parametrize(
    "function",
    [
        masked_mean,
        masked_var,
        lambda x, m: masked_var(x, m, unbiased=True),
        lambda x, m: whiten(x, m).pow(3).sum(),
        lambda x, m: whiten(x, m, shift_mean=False).pow(3).sum(),
    ],
)
def test_padding_full_of_nan_changes_neither_values_nor_gradients(function) -> None:
    values, mask = ragged()
    spoilt = torch.where(mask, values, NAN)
    close(function(spoilt, mask), function(values, mask))
    expected = gradient(lambda x: function(x, mask), values)
    close(gradient(lambda x: function(x, mask), spoilt), expected)
    assert (expected[~mask] == 0).all()
    assert (expected[mask] != 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_puts_0_under_nan(shift_mean: bool) -> None:
    values, mask = ragged()
    whitened = whiten(torch.where(mask, values, NAN), mask, shift_mean=shift_mean)
    assert (whitened[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0,)])
def test_no_true_entry_gives_0_with_finite_gradients(shape: tuple[int, ...]) -> None:
    values, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    for function in (masked_mean, masked_var, lambda x, m: whiten(x, m).sum(), lambda x, m: whiten(x, m).exp().mean()):
        assert torch.isfinite(gradient(lambda x, f=function: f(x, mask), values)).all()
    close(masked_mean(values, mask), 0.0)
    close(masked_var(values, mask), 0.0)
    close(masked_var(values, mask, unbiased=True), 0.0)
    close(whiten(values, mask, shift_mean=False), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    values, mask = torch.randn(2, 3).to(dtype), torch.ones(2, 3, dtype=torch.bool)
    results = [masked_mean(values, mask), masked_var(values, mask, unbiased=True), whiten(values, mask)]
    assert {x.dtype for x in [*results, whiten(values, mask, shift_mean=False)]} == {dtype}


@pytest.mark.parametrize("function", [masked_mean, masked_var, whiten])
def test_wrong_shapes_are_named(function) -> None:
    with pytest.raises(ValueError, match=r"found values \(2, 3\), mask \(3,\)"):
        function(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_require_same_shape_checks_the_rank_when_given() -> None:
    require_same_shape(a=torch.zeros(2), b=torch.zeros(2))
    require_same_shape(rank=1, a=torch.zeros(2), b=torch.zeros(2))
    with pytest.raises(ValueError, match=r"one shape of 2 dimensions for all; found a \(2,\), b \(2,\)"):
        require_same_shape(rank=2, a=torch.zeros(2), b=torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected one shape for all; found a \(2,\), b \(3,\)"):
        require_same_shape(a=torch.zeros(2), b=torch.zeros(3))
    with pytest.raises(ValueError, match="one shape of 1 dimensions"):
        require_same_shape(rank=1, a=torch.zeros(2), b=torch.zeros(3))
    assert describe_shapes(a=torch.zeros(2), b=torch.zeros(1, 3)) == "a (2,), b (1, 3)"


def test_first_true_index_by_hand() -> None:
    mask_BT = torch.tensor([[False, True, True], [False, False, False], [True, False, True], [False, False, True]])
    found = first_true_index(mask_BT)
    assert found.tolist() == [1, 3, 0, 2]
    assert found.dtype == torch.int64


def test_first_true_index_equals_loops() -> None:
    mask_BT = torch.rand(30, 7, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = [next((t for t, here in enumerate(row) if here), 7) for row in mask_BT.tolist()]
    assert first_true_index(mask_BT).tolist() == expected


@pytest.mark.parametrize(("shape", "expected"), [((2, 0), [0, 0]), ((0, 3), [])])
def test_first_true_index_of_nothing(shape: tuple[int, int], expected: list[int]) -> None:
    assert first_true_index(torch.zeros(shape, dtype=torch.bool)).tolist() == expected


def test_rows_and_ids_must_have_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"2 dimensions for all; found mask_BT \(3,\)"):
        first_true_index(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"2 dimensions for all; found ids_BT \(1, 2, 3\)"):
        truncate_at_stop(torch.zeros(1, 2, 3, dtype=torch.int64), [1], 0)


def test_truncate_at_stop_by_hand() -> None:
    # Stops are 2 and 9, pad is 0: the stop is kept, what follows is pad; a 0 before the stop is a token; a stop in the
    # last place did stop; a row without one is kept whole.
    ids_BT = torch.tensor([[5, 2, 7, 2], [0, 5, 9, 0], [5, 6, 7, 2], [5, 0, 7, 0], [2, 2, 2, 2]])
    cut_BT, mask_BT = truncate_at_stop(ids_BT, [2, 9], 0)
    assert cut_BT.tolist() == [[5, 2, 0, 0], [0, 5, 9, 0], [5, 6, 7, 2], [5, 0, 7, 0], [2, 0, 0, 0]]
    assert mask_BT.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert cut_BT.dtype == torch.int64
    assert mask_BT.dtype == torch.bool


@pytest.mark.parametrize("stop_ids", [[2], (2,), {2}, torch.tensor([2])])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_truncate_at_stop_takes_any_ids(stop_ids, dtype: torch.dtype) -> None:
    cut_BT, _ = truncate_at_stop(torch.tensor([[1, 2, 3]], dtype=dtype), stop_ids, 7)
    assert cut_BT.tolist() == [[1, 2, 7]]
    assert cut_BT.dtype == dtype


def test_truncate_at_stop_without_stops_keeps_all() -> None:
    cut_BT, mask_BT = truncate_at_stop(torch.tensor([[1, 2, 3]]), [], 0)
    assert cut_BT.tolist() == [[1, 2, 3]]
    assert mask_BT.all()


def test_truncate_at_stop_is_idempotent_and_what_follows_the_stop_is_irrelevant() -> None:
    ids_BT = torch.randint(0, 6, (20, 8), generator=torch.Generator().manual_seed(2))
    cut_BT, mask_BT = truncate_at_stop(ids_BT, [4], 0)
    again_BT, again_mask_BT = truncate_at_stop(cut_BT, [4], 0)
    assert torch.equal(cut_BT, again_BT)
    assert torch.equal(mask_BT, again_mask_BT)
    other_BT, _ = truncate_at_stop(torch.where(mask_BT, ids_BT, 4), [4], 0)
    assert torch.equal(cut_BT, other_BT)


@FAST
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4), st.sets(st.integers(0, 5))
)
def test_truncate_at_stop_equals_loops(rows: list[list[int]], stops: set[int]) -> None:
    expected_ids, expected_mask = [], []
    for row in rows:
        stopped, ids, mask = False, [], []
        for token in row:
            ids.append(0 if stopped else token)
            mask.append(not stopped)
            stopped = stopped or token in stops
        expected_ids.append(ids)
        expected_mask.append(mask)
    cut_BT, mask_BT = truncate_at_stop(torch.tensor(rows), stops, 0)
    assert cut_BT.tolist() == expected_ids
    assert mask_BT.tolist() == expected_mask


@FAST
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=8),
    st.floats(-10, 10),
    st.floats(0.5, 10),
)
def test_mean_and_variance_follow_a_change_of_unit(
    entries: list[tuple[float, bool]], shift: float, scale: float
) -> None:
    values = torch.tensor([x for x, _ in entries], dtype=torch.float64)
    mask = torch.tensor([m for _, m in entries])
    if not mask.any():
        return
    moved = values * scale + shift
    torch.testing.assert_close(
        masked_mean(moved, mask), masked_mean(values, mask) * scale + shift, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(masked_var(moved, mask), masked_var(values, mask) * scale**2, rtol=1e-9, atol=1e-7)
