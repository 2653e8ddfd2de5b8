"""returns: shaped rewards and generalised advantage estimation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.returns import RunningMoments, gae, shape_rewards

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
NAN = math.nan
LENGTHS = (5, 2, 0, 1, 4)


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-9, atol=1e-12)


def prefix_mask(lengths: tuple[int, ...], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_shape_rewards_by_hand() -> None:
    # kl_coef 0.5. Row 1: log-ratios 1, −2, 4 → −0.5, 1, −2; score 10 on the last token → −0.5, 1, 8.
    # Row 2 keeps one token: log-ratio 3 → −1.5, and its score −7 → −8.5.
    logprobs_BT = torch.tensor([[-1.0, -3.0, -1.0], [-2.0, NAN, NAN]], dtype=torch.float64)
    ref_logprobs_BT = torch.tensor([[-2.0, -1.0, -5.0], [-5.0, NAN, 0.0]], dtype=torch.float64)
    scores_B = torch.tensor([10.0, -7.0], dtype=torch.float64)
    found = shape_rewards(scores_B, logprobs_BT, ref_logprobs_BT, prefix_mask((3, 1), 3), kl_coef=0.5)
    close(found, [[-0.5, 1.0, 8.0], [-8.5, 0.0, 0.0]])


def slow_rewards(
    scores_B: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, beta: float
) -> Tensor:
    rewards_BT = torch.zeros_like(logprobs_BT)
    for b in range(len(scores_B)):
        kept = [t for t in range(logprobs_BT.shape[1]) if mask_BT[b, t]]
        for t in kept:
            rewards_BT[b, t] = -beta * (logprobs_BT[b, t] - ref_logprobs_BT[b, t])
        if kept:
            rewards_BT[b, kept[-1]] += scores_B[b]
    return rewards_BT


def test_shape_rewards_equals_loops() -> None:
    arguments = numbers(5, seed=1), numbers(5, 6, seed=2), numbers(5, 6, seed=3)
    holes = numbers(5, 6, seed=4) > 0
    for mask_BT in (prefix_mask(LENGTHS, 6), holes):
        close(shape_rewards(*arguments, mask_BT, kl_coef=0.3), slow_rewards(*arguments, mask_BT, 0.3))


def test_shape_rewards_of_equal_policies_is_the_score_alone() -> None:
    scores_B, logprobs_BT, mask_BT = numbers(5), numbers(5, 6), prefix_mask(LENGTHS, 6)
    rewards_BT = shape_rewards(scores_B, logprobs_BT, logprobs_BT, mask_BT, kl_coef=9.0)
    for b, length in enumerate(LENGTHS):
        assert rewards_BT[b].nonzero().flatten().tolist() == ([length - 1] if length else [])
    close(rewards_BT.sum(dim=1), torch.where(mask_BT.any(dim=1), scores_B, 0))


def test_shape_rewards_with_no_coefficient_ignores_the_reference() -> None:
    scores_B, mask_BT = numbers(5), prefix_mask(LENGTHS, 6)
    found = shape_rewards(scores_B, numbers(5, 6, seed=1), numbers(5, 6, seed=2), mask_BT, kl_coef=0.0)
    close(found, shape_rewards(scores_B, torch.zeros(5, 6), torch.zeros(5, 6), mask_BT, kl_coef=1.0))


def test_shape_rewards_with_nan_in_the_padding_changes_neither_values_nor_gradients() -> None:
    mask_BT = prefix_mask(LENGTHS, 6)
    found = []
    for fill in (0.7, NAN):
        scores_B = torch.where(mask_BT.any(dim=1), numbers(5), fill).requires_grad_()
        logprobs_BT = torch.where(mask_BT, numbers(5, 6, seed=1), fill).requires_grad_()
        ref_logprobs_BT = torch.where(mask_BT, numbers(5, 6, seed=2), fill).requires_grad_()
        rewards_BT = shape_rewards(scores_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef=0.3)
        gradients = torch.autograd.grad(rewards_BT.square().sum(), (scores_B, logprobs_BT, ref_logprobs_BT))
        found.append((rewards_BT.detach(), *gradients))
    for clean, spoilt in zip(*found, strict=True):
        close(spoilt, clean)
    assert (found[1][0][~mask_BT] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    values_BT, mask_BT = numbers(5, 6).to(dtype), prefix_mask(LENGTHS, 6)
    assert shape_rewards(values_BT[:, 0], values_BT, values_BT, mask_BT, kl_coef=0.1).dtype == dtype
    assert {x.dtype for x in gae(values_BT, values_BT, mask_BT, gamma=0.9, lam=0.9)} == {dtype}


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_tokens(shape: tuple[int, int]) -> None:
    values_BT, mask_BT = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    assert shape_rewards(torch.zeros(shape[0]), values_BT, values_BT, mask_BT, kl_coef=0.1).shape == shape
    assert [x.shape for x in gae(values_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)] == [shape, shape]


@pytest.mark.parametrize(
    "shapes",
    [
        ((3,), (2, 3), (2, 3), (2, 3)),
        ((2, 3), (2, 3), (2, 3), (2, 3)),
        ((2,), (2, 4), (2, 3), (2, 3)),
        ((2,), (2, 3), (2, 4), (2, 3)),
        ((2,), (2, 3), (2, 3), (2, 4)),
        ((2,), (2,), (2,), (2,)),
        ((2,), (2, 3, 1), (2, 3, 1), (2, 3, 1)),
    ],
)
def test_shape_rewards_names_wrong_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    scores, logprobs, ref_logprobs = (torch.zeros(shape) for shape in shapes[:3])
    with pytest.raises(ValueError, match="scores") as raised:
        shape_rewards(scores, logprobs, ref_logprobs, torch.ones(shapes[3], dtype=torch.bool), kl_coef=0.1)
    names = ("scores_B", "logprobs_BT", "ref_logprobs_BT", "mask_BT")
    assert ", ".join(f"{n} {s}" for n, s in zip(names, shapes, strict=True)) in str(raised.value)


def test_gae_by_hand() -> None:
    # γ = 1/2, λ = 1/2, so γλ = 1/4. Row 1, two tokens: r = 1, 2 and V = 4, 6.
    #   δ_2 = 2 + 0 − 6 = −4, A_2 = −4, G_2 = 2;   δ_1 = 1 + 3 − 4 = 0, A_1 = 0 − 4/4 = −1, G_1 = 3
    # Row 2, three tokens: r = 0, 0, 8 and V = 2, 4, 0.
    #   A_3 = 8 − 0 = 8, G_3 = 8;   A_2 = 0 + 0 − 4 + 8/4 = −2, G_2 = 2;   A_1 = 0 + 2 − 2 − 2/4 = −1/2, G_1 = 3/2
    rewards_BT = torch.tensor([[1.0, 2.0, 50.0], [0.0, 0.0, 8.0]], dtype=torch.float64)
    values_BT = torch.tensor([[4.0, 6.0, 70.0], [2.0, 4.0, 0.0]], dtype=torch.float64)
    found = gae(rewards_BT, values_BT, prefix_mask((2, 3), 3), gamma=0.5, lam=0.5)
    close(found.advantages_BT, [[-1.0, -4.0, 0.0], [-0.5, -2.0, 8.0]])
    close(found.returns_BT, [[3.0, 2.0, 0.0], [1.5, 2.0, 8.0]])


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Eq. 16 as it is written: A_t = Σ_l (γλ)^l δ_{t+l}, over a row without padding."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** later * deltas[t + later] for later in range(len(rewards) - t))
        for t in range(len(rewards))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0), (0.0, 0.5)])
def test_gae_equals_the_sum_in_the_paper(gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = numbers(5, 6, seed=1), numbers(5, 6, seed=2), prefix_mask(LENGTHS, 6)
    found = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for b, length in enumerate(LENGTHS):
        expected = slow_gae(rewards_BT[b, :length].tolist(), values_BT[b, :length].tolist(), gamma, lam)
        close(found.advantages_BT[b], expected + [0.0] * (6 - length))
        returns = [a + float(v) for a, v in zip(expected, values_BT[b], strict=False)]
        close(found.returns_BT[b], returns + [0.0] * (6 - length))


def test_gae_with_lambda_1_returns_the_discounted_rewards_to_go() -> None:
    rewards_BT, mask_BT = numbers(5, 6, seed=1), prefix_mask(LENGTHS, 6)
    found = gae(rewards_BT, numbers(5, 6, seed=2), mask_BT, gamma=0.9, lam=1.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            close(found.returns_BT[b, t], sum(0.9 ** (u - t) * float(rewards_BT[b, u]) for u in range(t, length)))


def test_gae_with_lambda_0_is_the_one_step_error() -> None:
    rewards_BT, values_BT, mask_BT = numbers(2, 3, seed=1), numbers(2, 3, seed=2), torch.ones(2, 3, dtype=torch.bool)
    found = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.0)
    next_BT = torch.cat([values_BT[:, 1:], torch.zeros(2, 1)], dim=1)
    close(found.advantages_BT, rewards_BT + 0.9 * next_BT - values_BT)


def test_gae_of_values_that_are_right_is_0() -> None:
    rewards_BT, mask_BT = numbers(1, 4), torch.ones(1, 4, dtype=torch.bool)
    exact_BT = rewards_BT.flip(1).cumsum(dim=1).flip(1)
    close(gae(rewards_BT, exact_BT, mask_BT, gamma=1.0, lam=0.5).advantages_BT, torch.zeros(1, 4))


def test_gae_skips_entries_between_kept_tokens() -> None:
    rewards_BT, values_BT = numbers(3, 6, seed=1), numbers(3, 6, seed=2)
    mask_BT = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    found = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8)
    for b in range(3):
        kept = mask_BT[b]
        expected = slow_gae(rewards_BT[b, kept].tolist(), values_BT[b, kept].tolist(), 0.9, 0.8)
        close(found.advantages_BT[b, kept], expected)
        assert (found.advantages_BT[b, ~kept] == 0).all()
        assert (found.returns_BT[b, ~kept] == 0).all()


@pytest.mark.parametrize(
    "mask_BT", [prefix_mask(LENGTHS, 6), numbers(5, 6, seed=4) > 0, torch.zeros(5, 6, dtype=torch.bool)]
)
def test_gae_with_nan_in_the_padding_changes_neither_values_nor_gradients(mask_BT: Tensor) -> None:
    found = []
    for fill in (0.7, NAN):
        rewards_BT = torch.where(mask_BT, numbers(5, 6, seed=1), fill).requires_grad_()
        values_BT = torch.where(mask_BT, numbers(5, 6, seed=2), fill).requires_grad_()
        result = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8)
        loss = result.advantages_BT.square().sum() + result.returns_BT.pow(3).sum()
        found.append((*(x.detach() for x in result), *torch.autograd.grad(loss, (rewards_BT, values_BT))))
    for clean, spoilt in zip(*found, strict=True):
        close(spoilt, clean)
        assert (spoilt[~mask_BT] == 0).all()


def test_gae_names_wrong_shapes() -> None:
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rewards_BT \(2, 4\), values_BT \(2, 3\), mask_BT \(2, 3\)"):
        gae(torch.zeros(2, 4), torch.zeros(2, 3), mask_BT, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="2 dimensions"):
        gae(torch.zeros(3), torch.zeros(3), mask_BT[0], gamma=1.0, lam=1.0)


@FAST
@given(st.integers(1, 6), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_gae_depends_on_nothing_to_the_right_or_in_other_rows(length: int, seed: int, gamma: float, lam: float) -> None:
    rewards_BT, values_BT = numbers(2, length, seed=seed), numbers(2, length, seed=seed + 1)
    alone = gae(rewards_BT[:1], values_BT[:1], torch.ones(1, length, dtype=torch.bool), gamma=gamma, lam=lam)
    wide_rewards_BT = torch.cat([rewards_BT, torch.full((2, 3), 9.9)], dim=1)
    wide_values_BT = torch.cat([values_BT, torch.full((2, 3), -9.9)], dim=1)
    mask_BT = prefix_mask((length, max(length - 1, 0)), length + 3)
    wide = gae(wide_rewards_BT, wide_values_BT, mask_BT, gamma=gamma, lam=lam)
    close(wide.advantages_BT[:1, :length], alone.advantages_BT)
    close(wide.returns_BT[:1, :length], alone.returns_BT)


@FAST
@given(st.integers(0, 1000), st.floats(0, 2))
def test_rewards_add_up_to_the_score_less_the_kl_of_the_response(seed: int, kl_coef: float) -> None:
    scores_B, logprobs_BT, ref_logprobs_BT = (
        numbers(5, seed=seed),
        numbers(5, 6, seed=seed),
        numbers(5, 6, seed=seed + 1),
    )
    mask_BT = prefix_mask((1, 2, 3, 6, 6), 6)
    rewards_BT = shape_rewards(scores_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef=kl_coef)
    kl_B = torch.where(mask_BT, logprobs_BT - ref_logprobs_BT, 0).sum(dim=1)
    torch.testing.assert_close(rewards_BT.sum(dim=1), scores_B - kl_coef * kl_B, rtol=1e-9, atol=1e-11)


def test_running_moments_by_hand() -> None:
    # 1, 3 → mean 2, M 2. Then 8: δ = 6, n = 3 → mean 2 + 6/3 = 4, M 2 + 0 + 36·2·1/3 = 26, std √(26/3).
    moments = RunningMoments()
    assert (moments.count, moments.mean, moments.squares) == (0, 0.0, 0.0)
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.squares) == (2, 2.0, 2.0)
    moments.update(torch.tensor([8.0]))
    assert (moments.count, moments.mean, moments.squares) == (3, 4.0, 26.0)
    assert moments.std == pytest.approx(math.sqrt(26 / 3), rel=1e-12)
    assert [type(value) for value in vars(moments).values()] == [int, float, float]  # a checkpoint keeps them as JSON


@FAST
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_running_moments_do_not_hang_on_how_the_numbers_came(sizes: list[int], seed: int) -> None:
    values_N = (1e3 + numbers(sum(sizes), seed=seed)).float()  # far from 0: sums of squares would lose digits
    moments = RunningMoments()
    for part in values_N.split(sizes):
        moments.update(part)
    values_N = values_N.double()
    assert moments.count == len(values_N)
    if len(values_N) > 1:
        assert moments.mean == pytest.approx(values_N.mean().item(), rel=1e-12)
        assert moments.std == pytest.approx(values_N.std(correction=0).item(), rel=1e-9)


def test_running_moments_divide_by_1_while_nothing_varies() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([0.25, 0.25]))
    assert (moments.mean, moments.std) == (0.25, 1.0)
    moments.update(torch.tensor([0.75, 0.75]))  # M = 0.25
    assert (moments.mean, moments.std) == (0.5, 0.25)


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_running_moments_refuse_what_is_no_number_and_stay_as_they_were(value: float) -> None:
    moments = RunningMoments(2, 2.0, 2.0)
    with pytest.raises(ValueError, match=f"expected finite numbers; found {value}"):
        moments.update(torch.tensor([1.0, value]))
    assert moments == RunningMoments(2, 2.0, 2.0)
