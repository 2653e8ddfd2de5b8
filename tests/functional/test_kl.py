"""kl: the three estimators and the two controllers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.kl import AdaptiveKL, FixedKL, kl_estimate
from rlhf_core.functional.masks import masked_mean, zero_masked

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
ESTIMATORS = ("k1", "k2", "k3")


def close(found: Tensor, expected: object, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-12)


def case() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = (3, 4)
    return (
        -torch.rand(shape, dtype=torch.float64, generator=draw) * 4,
        -torch.rand(shape, dtype=torch.float64, generator=draw) * 4,
    )


@pytest.mark.parametrize(("estimator", "expected"), [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2),
                                                     ("k3", 0.5 - 1 + math.log(2))])  # fmt: skip
def test_estimators_by_hand(estimator, expected: float) -> None:
    # π = 1/2, π_ref = 1/4: the log-ratio is log 2, and exp(−log 2) is 1/2
    logprobs, ref_logprobs = torch.tensor([0.5], dtype=torch.float64).log(), torch.tensor([0.25]).double().log()
    close(kl_estimate(logprobs, ref_logprobs, estimator=estimator), [expected])


def slow_estimate(logprob: float, ref_logprob: float, estimator: str) -> float:
    """As in Schulman's note, where r = π_ref / π."""
    ratio = math.exp(ref_logprob) / math.exp(logprob)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": (ratio - 1) - math.log(ratio)}[estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_equal_loops(estimator) -> None:
    logprobs, ref_logprobs = case()
    expected = [
        [slow_estimate(float(p), float(q), estimator) for p, q in zip(*rows, strict=True)]
        for rows in zip(logprobs, ref_logprobs, strict=True)
    ]
    close(kl_estimate(logprobs, ref_logprobs, estimator=estimator), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_kl(estimator) -> None:
    logprobs, _ = case()
    assert (kl_estimate(logprobs, logprobs, estimator=estimator) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator) -> None:
    # The mean over π, summed exactly: Σ π log(π / π_ref)
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    reference = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    close((policy * kl_estimate(policy.log(), reference.log(), estimator=estimator)).sum(), exact)


def test_k3_keeps_its_digits_near_ratio_1() -> None:
    # exp(−x) − 1 + x = x²/2 − x³/6 + …; taken literally it would be 0 or 1e-16 here
    small = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    found = kl_estimate(small, torch.zeros_like(small), estimator="k3")
    torch.testing.assert_close(found, small**2 / 2, rtol=1e-5, atol=0)  # the x³ term is 3e-7 of it


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_stays_where_it_is_and_masking_before_keeps_it_out_of_gradients(estimator) -> None:
    logprobs, ref_logprobs = case()
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    gradients = []
    for fill in (0.3, math.nan):
        leaf = torch.where(mask, logprobs, fill).requires_grad_()
        estimate = kl_estimate(zero_masked(leaf, mask), zero_masked(ref_logprobs, mask), estimator=estimator)
        masked_mean(estimate, mask).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    close(gradients[1], gradients[0])
    spoilt = kl_estimate(torch.where(mask, logprobs, math.nan), ref_logprobs, estimator=estimator)
    assert torch.equal(spoilt.isnan(), ~mask)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_dtype_and_empty_batch(estimator) -> None:
    logprobs, ref_logprobs = case()
    assert torch.autograd.gradcheck(
        lambda x: kl_estimate(x, ref_logprobs, estimator=estimator), (logprobs.requires_grad_(),)
    )
    single = kl_estimate(logprobs.detach().float(), ref_logprobs.float(), estimator=estimator)
    assert single.dtype == torch.float32
    assert kl_estimate(torch.zeros(0, 3), torch.zeros(0, 3), estimator=estimator).shape == (0, 3)


def test_wrong_shapes_and_unknown_estimators_are_named() -> None:
    with pytest.raises(ValueError, match=r"found logprobs \(2, 3\), ref_logprobs \(2, 4\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 4), estimator="k1")
    with pytest.raises(ValueError, match="expected estimator k1, k2 or k3; found 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), estimator="k4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.5 * (1 + 0.1 * 32 / 200)),  # 10 % above the target
        (5.4, 0.5 * (1 - 0.1 * 32 / 200)),  # 10 % below
        (60.0, 0.5 * (1 + 0.2 * 32 / 200)),  # clipped above
        (0.0, 0.5 * (1 - 0.2 * 32 / 200)),  # clipped below
        (6.0, 0.5),  # on it
        (math.inf, 0.5 * (1 + 0.2 * 32 / 200)),
    ],
)
def test_adaptive_kl_by_hand(kl: float, expected: float) -> None:
    controller = AdaptiveKL(0.5, 6.0, 200)
    controller.update(kl, 32)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_equals_loops_over_a_run() -> None:
    controller, coef = AdaptiveKL(initial=0.1, target=3.0, horizon=50), 0.1
    for kl, n in [(1.0, 8), (2.9, 16), (3.3, 4), (9.0, 8), (-1.0, 2)]:
        error = kl / 3.0 - 1
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        coef = coef * (1 + error * n / 50)
        controller.update(kl, n)
        assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_adaptive_kl_may_begin_at_0_and_stays_there() -> None:
    controller = AdaptiveKL(0.0, 0.5, 0.5)
    controller.update(100.0, 1)
    assert controller.coef == 0.0


@pytest.mark.parametrize(
    ("initial", "target", "horizon"),
    [(0.1, 0.0, 10), (0.1, -1.0, 10), (0.1, 6.0, 0), (0.1, 6.0, -5), (-0.1, 6.0, 10), (0.1, math.nan, 10)],
)
def test_adaptive_kl_refuses_what_cannot_be_steered(initial: float, target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match=f"target {target}, horizon {horizon}"):
        AdaptiveKL(initial, target, horizon)


def test_adaptive_kl_refuses_nan() -> None:
    controller = AdaptiveKL(0.1, 6.0, 10)
    with pytest.raises(ValueError, match="found nan"):
        controller.update(math.nan, 4)
    assert controller.coef == 0.1


def test_fixed_kl_stays() -> None:
    controller = FixedKL(0.3)
    controller.update(100.0, 64)
    assert controller.coef == 0.3


@FAST
@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k2_and_k3_are_never_negative_and_k1_changes_sign_with_its_arguments(
    logprob: float, ref_logprob: float
) -> None:
    p, q = torch.tensor([logprob], dtype=torch.float64), torch.tensor([ref_logprob], dtype=torch.float64)
    assert kl_estimate(p, q, estimator="k2") >= 0
    assert kl_estimate(p, q, estimator="k3") >= 0
    close(kl_estimate(p, q, estimator="k1"), -kl_estimate(q, p, estimator="k1"))


@FAST
@given(st.floats(0, 100), st.integers(1, 100))
def test_adaptive_kl_moves_towards_the_target(kl: float, n: int) -> None:
    controller = AdaptiveKL(1.0, 6.0, 1000)
    controller.update(kl, n)
    assert (controller.coef - 1.0) * (kl - 6.0) >= 0
    assert abs(controller.coef - 1.0) <= 0.2 * n / 1000 + 1e-12
