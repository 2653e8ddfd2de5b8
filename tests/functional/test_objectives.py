"""objectives: scores on axes as one number, constrained advantages, and the multiplier that is learned."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.objectives import (
    CostMultiplier,
    constrained_advantages,
    lexicographic_scores,
    weighted_scores,
)
from rlhf_core.functional.returns import gae, shape_rewards

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
LAMBDAS = (0.0, 0.5, 3.0, 40.0)


def close(found: Tensor, expected: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-9, atol=1e-12)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- weights


def test_weighted_scores_by_hand() -> None:
    # 0.5 · 2 − 1 · 3 + 2 · 0.25 = −1.5          0.5 · −4 − 1 · 0 + 2 · 1 = 0
    scores_BA = torch.tensor([[2.0, 3.0, 0.25], [-4.0, 0.0, 1.0]], dtype=torch.float64)
    close(weighted_scores(scores_BA, [0.5, -1.0, 2.0]), [-1.5, 0.0])


def test_weighted_scores_equal_loops_and_keep_the_dtype() -> None:
    scores_BA, weights = numbers(7, 4), (0.1, -2.0, 0.0, 3.0)
    expected = [sum(w * float(s) for w, s in zip(weights, row, strict=True)) for row in scores_BA]
    close(weighted_scores(scores_BA, weights), expected)
    assert weighted_scores(scores_BA.float(), weights).dtype == torch.float32


def test_one_weight_of_1_is_the_axis_itself() -> None:
    scores_BA = numbers(5, 3)
    close(weighted_scores(scores_BA, (0, 1, 0)), scores_BA[:, 1])


def test_weighted_scores_pass_gradients() -> None:
    scores_BA = numbers(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: weighted_scores(scores, (0.3, -0.7)), (scores_BA,))


# ---- lexicographic order


def test_lexicographic_scores_by_hand() -> None:
    # Thresholds 1 and 0.5, floor 2.
    # 0.5 is short of 1: itself, whatever comes after.
    # 1 reaches 1: 1 + (min(−1, 0.5) + 2) = 2; −1 is short of 0.5, so the third does not count.
    # 4 counts as 1, 0.5 reaches: 1 + 2.5 + (3 + 2) = 8.5.
    # 2 counts as 1, −7 counts as −2: 1 + 0 = 1.
    # 1, 9 counts as 0.5, −9 counts as −2: 1 + 2.5 + 0 = 3.5.
    scores_BA = torch.tensor(
        [[0.5, 9.0, 9.0], [1.0, -1.0, 9.0], [4.0, 0.5, 3.0], [2.0, -7.0, 9.0], [1.0, 9.0, -9.0]], dtype=torch.float64
    )
    close(lexicographic_scores(scores_BA, (1.0, 0.5), floor=2.0), [0.5, 2.0, 8.5, 1.0, 3.5])


def slow_lexicographic(row: list[float], thresholds: tuple[float, ...], floor: float) -> float:
    total = 0.0
    for place, score in enumerate(row):
        last = place == len(row) - 1
        value = score if last else min(score, thresholds[place])
        if place > 0:
            value = max(value, -floor) + floor
        total += value
        if not last and score < thresholds[place]:
            break
    return total


def test_lexicographic_scores_equal_loops() -> None:
    scores_BA = numbers(40, 3)
    expected = [slow_lexicographic(row, (0.2, -0.3), 1.5) for row in scores_BA.tolist()]
    close(lexicographic_scores(scores_BA, (0.2, -0.3), floor=1.5), expected)


def test_a_larger_lexicographic_score_is_what_the_order_prefers() -> None:
    def prefers(one: list[float], other: list[float]) -> bool:  # the order itself, by its definition
        for place, threshold in enumerate((0.0, 0.5, math.inf)):
            ours, theirs = min(one[place], threshold), min(other[place], threshold)
            if ours != theirs:
                return ours > theirs
            if ours < threshold < math.inf:
                return False  # both are short of it by as much: what comes after does not count
        return False

    rows = [list(row) for row in itertools.product((-1.0, 0.0, 0.3), (-0.7, 0.5, 1.0), (-1.0, 0.2, 1.9))]
    scores_B = lexicographic_scores(torch.tensor(rows, dtype=torch.float64), (0.0, 0.5), floor=2.0).tolist()
    for (one, ours), (other, theirs) in itertools.permutations(zip(rows, scores_B, strict=True), 2):
        assert (ours > theirs) == prefers(one, other), (one, other)


@FAST
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3), st.integers(0, 2), st.floats(0, 2))
def test_more_on_an_axis_never_lowers_the_lexicographic_score(row: list[float], axis: int, more: float) -> None:
    better = [score + more * (place == axis) for place, score in enumerate(row)]
    low, high = lexicographic_scores(torch.tensor([row, better], dtype=torch.float64), (0.4, -0.2), floor=1.0).tolist()
    assert high >= low


def test_a_single_axis_is_in_no_order() -> None:
    scores_B1 = numbers(6, 1)
    close(lexicographic_scores(scores_B1, (), floor=0.0), scores_B1[:, 0])


def test_a_threshold_that_is_not_above_the_floor_is_refused() -> None:
    lexicographic_scores(numbers(2, 2), (-0.9,), floor=1.0)
    for threshold in (-1.0, -2.0, math.nan):
        with pytest.raises(ValueError, match="expected thresholds above minus the floor 1"):
            lexicographic_scores(numbers(2, 2), (threshold,), floor=1.0)


@pytest.mark.parametrize(
    ("shape", "given"), [((3, 2), 1), ((3, 2), 3), ((3,), 1), ((3, 0), 0), ((2, 3, 2), 2), ((3,), 3)]
)
def test_as_many_numbers_as_axes(shape: tuple[int, ...], given: int) -> None:
    with pytest.raises(ValueError, match=rf"weights as many as axes; found {given} weights, scores_BA"):
        weighted_scores(torch.zeros(shape), [1.0] * given)
    if given:
        with pytest.raises(ValueError, match=rf"one fewer than axes; found {given - 1} thresholds, scores_BA"):
            lexicographic_scores(torch.zeros(shape), [1.0] * (given - 1), floor=2.0)


# ---- a constraint


def test_constrained_advantages_by_hand() -> None:
    # λ = 3: (2 − 3 · 1) / 4 = −0.25          (−1 − 3 · −2) / 4 = 1.25
    found = constrained_advantages(
        torch.tensor([2.0, -1.0], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64), multiplier=3.0
    )
    close(found, [-0.25, 1.25])


def test_constrained_advantages_equal_loops() -> None:
    advantages_BT, cost_advantages_BT = numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    for multiplier in LAMBDAS:
        expected = [
            [(float(r) - multiplier * float(c)) / (1 + multiplier) for r, c in zip(*rows, strict=True)]
            for rows in zip(advantages_BT, cost_advantages_BT, strict=True)
        ]
        close(constrained_advantages(advantages_BT, cost_advantages_BT, multiplier=multiplier), expected)


def test_without_a_multiplier_the_reward_alone_counts_and_with_a_large_one_the_cost() -> None:
    advantages_BT, cost_advantages_BT = numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    close(constrained_advantages(advantages_BT, cost_advantages_BT, multiplier=0.0), advantages_BT)
    found = constrained_advantages(advantages_BT, cost_advantages_BT, multiplier=1e9)
    torch.testing.assert_close(found, -cost_advantages_BT, rtol=1e-6, atol=1e-8)  # a limit, at 1 / λ from it


def constrained_with_kl(in_reward: float, in_cost: float, multiplier: float) -> Tensor:
    """Advantages of a rollout whose KL weighs that much in the reward, and that much against the cost."""
    mask_BT = torch.arange(5) < torch.tensor([[5], [2], [4]])
    pair = (numbers(3, 5, seed=3), numbers(3, 5, seed=4), mask_BT)
    nothing = {"gamma": 1.0, "lam": 0.9}
    rewards_BT = shape_rewards(numbers(3, seed=1), *pair, kl_coef=in_reward)
    costs_BT = shape_rewards(numbers(3, seed=2), *pair, kl_coef=-in_cost)
    of_reward = gae(rewards_BT, numbers(3, 5, seed=5), mask_BT, **nothing).advantages_BT
    of_cost = gae(costs_BT, numbers(3, 5, seed=6), mask_BT, **nothing).advantages_BT
    return constrained_advantages(of_reward, of_cost, multiplier=multiplier)


def test_a_kl_shared_by_reward_and_cost_has_the_same_weight_whatever_the_multiplier() -> None:
    alone = [
        constrained_with_kl(0.7, 0.7, multiplier) - constrained_with_kl(0, 0, multiplier) for multiplier in LAMBDAS
    ]
    for found in alone[1:]:
        close(found, alone[0])
    close(alone[0], constrained_with_kl(0.7, 0, 0) - constrained_with_kl(0, 0, 0))  # that without a constraint
    # Half in each is half of it; all of it in the reward is less and less of it.
    close(2 * (constrained_with_kl(0.35, 0.35, 3.0) - constrained_with_kl(0, 0, 3.0)), alone[0])
    close(4 * (constrained_with_kl(0.7, 0, 3.0) - constrained_with_kl(0, 0, 3.0)), alone[0])


@pytest.mark.parametrize("multiplier", [-1e-9, math.nan])
def test_a_multiplier_below_0_is_refused(multiplier: float) -> None:
    with pytest.raises(ValueError, match="expected a multiplier of 0 or more"):
        constrained_advantages(numbers(2), numbers(2), multiplier=multiplier)


def test_advantages_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cost_advantages"):
        constrained_advantages(numbers(2, 3), numbers(3), multiplier=1.0)


# ---- its multiplier


def multiplier(initial: float = 1.0, **changes: float) -> CostMultiplier:
    settings = {"limit": 0.5, "learning_rate": 0.1, "minimum": 0.05, "maximum": 20.0, "memory": 2, **changes}
    return CostMultiplier(initial, **settings)  # type: ignore[arg-type]


def test_a_multiplier_by_hand() -> None:
    # Limit 0.5, η 0.1, memory 2.          1.5: m = 1.5, log λ = 0 + 0.1 · 1 · 1 = 0.1
    # 0.5: m = 1.5 − 1 / 2 = 1, log λ = 0.1 + 0.1 · e^0.1 · 0.5          −2: m = 1 − 3 / 2 = −0.5, the gap is −1
    found = multiplier()
    assert (found.value, found.mean) == (1.0, 0.0)
    found.update(1.5)
    assert (found.mean, found.log) == pytest.approx((1.5, 0.1), rel=1e-12)
    found.update(0.5)
    second = 0.1 + 0.05 * math.exp(0.1)
    assert (found.mean, found.log) == pytest.approx((1.0, second), rel=1e-12)
    found.update(-2.0)
    assert (found.mean, found.log) == pytest.approx((-0.5, second - 0.1 * math.exp(second)), rel=1e-12)
    assert found.value == pytest.approx(math.exp(found.log), rel=1e-12)


def test_a_multipliers_step_is_the_gradient_of_the_lagrangian() -> None:
    # d/dℓ [e^ℓ (m − d)] by autograd, one step of plain ascent at a time; a memory of 1 makes m the cost itself.
    found, log = multiplier(2.0, memory=1), torch.tensor(math.log(2.0), dtype=torch.float64, requires_grad=True)
    for cost in (3.0, -1.0, 0.5, 0.9):
        (slope,) = torch.autograd.grad(log.exp() * (cost - 0.5), log)
        log = (log + 0.1 * slope).detach().requires_grad_()
        found.update(cost)
        assert found.log == pytest.approx(log.item(), rel=1e-9)


def test_the_mean_is_plain_at_first_and_forgets_later() -> None:
    found, costs = multiplier(memory=4), [4.0, 0.0, 2.0, 6.0]
    for count, cost in enumerate(costs, start=1):
        found.update(cost)
        assert found.mean == pytest.approx(sum(costs[:count]) / count, rel=1e-12)
    found.update(11.0)
    assert found.mean == pytest.approx(3.0 + (11.0 - 3.0) / 4, rel=1e-12)


def test_a_multiplier_stays_between_its_bounds_and_comes_back_from_them() -> None:
    found = multiplier(minimum=0.5, maximum=2.0, memory=1)
    for _ in range(50):
        found.update(9.0)
    assert found.value == pytest.approx(2.0, rel=1e-12)
    for _ in range(50):
        found.update(-9.0)
    assert found.value == pytest.approx(0.5, rel=1e-12)
    found.update(9.0)
    assert found.log == pytest.approx(math.log(0.5) + 0.1 * 0.5 * 8.5, rel=1e-12)


def test_at_its_limit_a_multiplier_rests() -> None:
    found = multiplier(3.0)
    found.update(0.5)
    assert found.value == pytest.approx(3.0, rel=1e-12)


def test_a_multiplier_goes_on_to_the_bit_from_its_state() -> None:
    whole, first = multiplier(), multiplier()
    for cost in (1.0, 0.2, 3.0):
        whole.update(cost)
        first.update(cost)
    second = multiplier(7.0)
    second.restore(first.state())
    for cost in (0.7, -2.0):
        whole.update(cost)
        second.update(cost)
    assert second.state() == whole.state()
    assert second.value == whole.value


@pytest.mark.parametrize(
    "wrong",
    [
        {"minimum": 0.0},
        {"minimum": 1.5},
        {"maximum": 0.5},
        {"learning_rate": 0.0},
        {"memory": 0},
        {"minimum": math.nan},
    ],
)
def test_a_multiplier_that_cannot_move_is_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"found.* {name} {value}"):
        multiplier(**wrong)


def test_a_multiplier_may_begin_at_a_bound_and_remember_one_cost() -> None:
    assert multiplier(0.05).value == pytest.approx(0.05, rel=1e-12)
    assert multiplier(20.0, memory=1).value == pytest.approx(20.0, rel=1e-12)


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_no_number_is_refused(cost: float) -> None:
    found = multiplier()
    with pytest.raises(ValueError, match="expected a finite cost"):
        found.update(cost)
    assert found.state() == multiplier().state()
