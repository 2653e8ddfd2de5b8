"""losses: reward modelling, PPO and DPO."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_core.functional.losses import (
    dpo_loss,
    pairwise_loss,
    plackett_luce_loss,
    policy_loss,
    ranking_loss,
    value_loss,
)

FAST = settings(max_examples=20, deadline=None, derandomize=True, database=None)
NAN = math.nan
RAGGED_BK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
RANKS_BK = torch.tensor([[2, 1, 2, 4], [2, 1, 9, 9], [1, 0, 1, 1], [1, 2, 3, 4], [1, 2, 3, 4]])  # row 3 has only ties
MARGINS_BKK = torch.rand(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
PAIRS_BKK = (RANKS_BK[:, :, None] < RANKS_BK[:, None, :]) & RAGGED_BK[:, :, None] & RAGGED_BK[:, None, :]
MASK_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()


def close(found: Tensor, expected: object, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=rtol, atol=1e-12)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bools(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def slow_nll(x: float) -> float:
    """−log σ(x)."""
    return math.log(1 + math.exp(-x))


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.fixture
def no_nan_on_the_way():
    """Fail where a backward step makes NaN, even one that a later step would hide."""
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        yield


# Pairs


def test_pairwise_loss_by_hand() -> None:
    # leads log 3 and −log 3: σ is 3/4 and 1/4. Their −log, averaged: (log 4/3 + log 4) / 2
    chosen = torch.tensor([math.log(3), 0.0], dtype=torch.float64)
    rejected = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    close(pairwise_loss(chosen, rejected), (math.log(4 / 3) + math.log(4)) / 2)


def test_pairwise_loss_with_margin_and_centring_by_hand() -> None:
    # lead 3 − 1 − margin 2 = 0: log 2. (3 + 1)² = 16, times 1/8 = 2
    chosen, rejected, margin = (torch.tensor([x], dtype=torch.float64) for x in (3.0, 1.0, 2.0))
    close(pairwise_loss(chosen, rejected, margin=margin, center_coef=0.125), math.log(2) + 2)


@pytest.mark.parametrize("center_coef", [0.0, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss_equals_loops(center_coef: float, with_margin: bool) -> None:
    chosen, rejected, margin = numbers(6), numbers(6, seed=1), numbers(6, seed=2).abs()
    terms = [
        slow_nll(c - r - (m if with_margin else 0)) + center_coef * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    ]
    found = pairwise_loss(chosen, rejected, margin=margin if with_margin else None, center_coef=center_coef)
    close(found, sum(terms) / 6)


def test_pairwise_loss_of_equal_scores_is_log_2_and_a_common_shift_changes_nothing() -> None:
    scores = numbers(4)
    close(pairwise_loss(scores, scores), math.log(2))
    close(pairwise_loss(scores + 5, numbers(4, seed=1) + 5), pairwise_loss(scores, numbers(4, seed=1)))


def test_pairwise_loss_of_huge_leads_is_finite() -> None:
    chosen, rejected = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert pairwise_loss(chosen, rejected).item() == 1e4


def test_pairwise_loss_of_no_pair_is_0_with_finite_gradients() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = pairwise_loss(empty, empty, margin=torch.zeros(0), center_coef=1.0)
    assert loss.item() == 0.0
    assert gradients(loss, empty)[0].shape == (0,)


def test_pairwise_loss_gradient() -> None:
    chosen, rejected, margin = (numbers(4, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(
        lambda c, r, m: pairwise_loss(c, r, margin=m, center_coef=0.2), (chosen, rejected, margin)
    )


def test_pairwise_loss_names_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"found chosen \(2,\), rejected \(3,\)$"):
        pairwise_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"found chosen \(2,\), rejected \(2,\), margin \(1,\)"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))


# Rankings


def test_ranking_loss_by_hand() -> None:
    # Row 1: scores 0, −log 2, −log 6. Pairs: leads log 2, log 6, log 3; σ = 2/3, 6/7, 3/4: mean of their −log.
    # Row 2: one pair, lead log 4: log 5/4. Row 3: one response, no pair, left out.
    log = math.log
    scores_BK = torch.tensor([[0.0, -log(2), -log(6)], [log(4), 0.0, NAN], [1.0, NAN, NAN]], dtype=torch.float64)
    mask_BK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    expected = ((log(3 / 2) + log(7 / 6) + log(4 / 3)) / 3 + log(5 / 4)) / 2
    close(ranking_loss(scores_BK, mask_BK), expected)


def test_ranking_loss_with_margins_by_hand() -> None:
    # Leads log 6, log 12, log 2 of pairs 1–2, 1–3, 2–3; less their margins log 2, log 3, 0: log 3, log 4, log 2, of
    # which σ is 3/4, 4/5, 2/3. What stands where there is no pair is not read.
    log = math.log
    scores_BK = torch.tensor([[log(12), log(2), 0.0]], dtype=torch.float64)
    margins_BKK = torch.tensor([[[NAN, log(2), log(3)], [NAN, NAN, 0.0], [9.0, NAN, NAN]]], dtype=torch.float64)
    found = ranking_loss(scores_BK, bools(1, 3), margins_BKK=margins_BKK)
    close(found, (log(4 / 3) + log(5 / 4) + log(3 / 2)) / 3)


def test_ranking_loss_with_smoothed_labels_by_hand() -> None:
    # Leads log 3 and, ranked the other way round, −log 3; ε = 0.1: σ is 3/4 and 1/4.
    scores_BK = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    ranks_BK = torch.tensor([[1, 2], [2, 1]])
    right, wrong = 0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.9 * math.log(4) + 0.1 * math.log(4 / 3)
    found = ranking_loss(scores_BK, bools(2, 2), ranks_BK=ranks_BK, label_smoothing=0.1)
    close(found, (right + wrong) / 2)


def slow_ranking_loss(
    scores_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor, margins_BKK: Tensor | None = None, smoothing: float = 0.0
) -> float:
    """Ouyang et al. 2022, eq. 1, pair by pair, with the margin of Touvron et al. and Mitchell's smoothing."""
    prompts = []
    for b, (scores, mask, ranks) in enumerate(
        zip(scores_BK.tolist(), mask_BK.tolist(), ranks_BK.tolist(), strict=True)
    ):
        kept = [i for i in range(len(scores)) if mask[i]]
        leads = [
            scores[i] - scores[j] - (0.0 if margins_BKK is None else margins_BKK[b, i, j].item())
            for i, j in permutations(kept, 2)
            if ranks[i] < ranks[j]
        ]
        pairs = [(1 - smoothing) * slow_nll(lead) + smoothing * slow_nll(-lead) for lead in leads]
        if pairs:
            prompts.append(sum(pairs) / len(pairs))
    return sum(prompts) / len(prompts)


def test_ranking_loss_equals_loops() -> None:
    scores_BK = numbers(5, 4)
    best_first_BK = torch.arange(4).expand(5, 4)
    close(ranking_loss(scores_BK, RAGGED_BK), slow_ranking_loss(scores_BK, RAGGED_BK, best_first_BK))
    expected = slow_ranking_loss(scores_BK, RAGGED_BK, RANKS_BK)
    close(ranking_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK), expected)
    close(ranking_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK.double()), expected)
    for margins_BKK, smoothing in ((MARGINS_BKK, 0.0), (None, 0.3), (MARGINS_BKK, 0.2)):
        expected = slow_ranking_loss(scores_BK, RAGGED_BK, RANKS_BK, margins_BKK, smoothing)
        options = {"ranks_BK": RANKS_BK, "margins_BKK": margins_BKK, "label_smoothing": smoothing}
        close(ranking_loss(scores_BK, RAGGED_BK, **options), expected)


def test_ranking_loss_without_margin_and_smoothing_is_the_plain_one() -> None:
    scores_BK = numbers(5, 4)
    plain = ranking_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK)
    nothing = {"margins_BKK": torch.zeros(5, 4, 4, dtype=torch.float64), "label_smoothing": 0.0}
    assert torch.equal(ranking_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK, **nothing), plain)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_smoothing_is_content_with_a_lead_at_which_that_share_of_judges_would_err(margin: float) -> None:
    # σ(d) = 1 − ε: past it, a greater lead costs more.
    leads = torch.tensor([[math.log(0.8 / 0.2) + margin, 0.0]], dtype=torch.float64).requires_grad_()
    margins_BKK = torch.full((1, 2, 2), margin, dtype=torch.float64)
    loss = ranking_loss(leads, bools(1, 2), margins_BKK=margins_BKK, label_smoothing=0.2)
    close(gradients(loss, leads)[0], [[0.0, 0.0]])
    close(loss.detach(), -0.8 * math.log(0.8) - 0.2 * math.log(0.2))  # the entropy of such a judge


def test_ranking_loss_of_huge_leads_is_finite_when_smoothed() -> None:
    for scores, expected in (([1e4, -1e4], 2e3), ([-1e4, 1e4], 1.8e4)):
        found = ranking_loss(torch.tensor([scores]), bools(1, 2), label_smoothing=0.1)
        close(found, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("label_smoothing", [-0.01, 0.5, NAN])
def test_smoothing_out_of_range_is_refused(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"expected label_smoothing in \[0, 0\.5\); found {label_smoothing}"):
        ranking_loss(torch.zeros(1, 2), bools(1, 2), label_smoothing=label_smoothing)


def test_ranking_loss_of_two_is_the_pairwise_loss() -> None:
    scores_BK = numbers(6, 2)
    close(ranking_loss(scores_BK, bools(6, 2)), pairwise_loss(scores_BK[:, 0], scores_BK[:, 1]))
    reverse_BK = torch.tensor([[2, 1]]).expand(6, 2)
    close(ranking_loss(scores_BK, bools(6, 2), ranks_BK=reverse_BK), pairwise_loss(scores_BK[:, 1], scores_BK[:, 0]))
    margins_BKK = numbers(6, 2, 2, seed=1)
    expected = pairwise_loss(scores_BK[:, 0], scores_BK[:, 1], margin=margins_BKK[:, 0, 1])
    close(ranking_loss(scores_BK, bools(6, 2), margins_BKK=margins_BKK), expected)


def test_ranking_loss_does_not_depend_on_the_order_in_which_responses_stand() -> None:
    scores_BK, order = numbers(5, 4), torch.tensor([2, 0, 3, 1])
    moved = ranking_loss(scores_BK[:, order], RAGGED_BK[:, order], ranks_BK=RANKS_BK[:, order])
    close(moved, ranking_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK))


@pytest.mark.parametrize("function", [ranking_loss, plackett_luce_loss])
def test_ranking_loss_of_ties_alone_is_0_with_finite_gradients(function) -> None:
    scores_BK = numbers(2, 3).requires_grad_()
    loss = function(scores_BK, bools(2, 3), ranks_BK=torch.ones(2, 3, dtype=torch.int64))
    assert loss.item() == 0.0
    assert (gradients(loss, scores_BK)[0] == 0).all()


def test_plackett_luce_loss_by_hand() -> None:
    # weights 3, 2, 1: the ranking has likelihood 3/6 · 2/3 · 1 = 1/3. Weights 1, 4 in row 2: 1/5.
    weights_BK = torch.tensor([[3.0, 2.0, 1.0], [1.0, NAN, 4.0], [NAN, 7.0, NAN]], dtype=torch.float64)
    mask_BK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]]).bool()
    close(plackett_luce_loss(weights_BK.log(), mask_BK), (math.log(3) + math.log(5)) / 2)


def test_plackett_luce_loss_with_ties_by_hand() -> None:
    # Weights 3, 2, 1 as above. Row 1: the first two tie, each drawn from all: 3/6 · 2/6 · 1. Row 2: the last two tie,
    # each drawn from both: 3/6 · 2/3 · 1/3 = 1/9. Row 3: all tie, left out.
    weights_BK = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 3.0, 2.0]], dtype=torch.float64)
    ranks_BK = torch.tensor([[1, 1, 2], [1, 2, 2], [5, 5, 5]])
    found = plackett_luce_loss(weights_BK.log(), bools(3, 3), ranks_BK=ranks_BK)
    close(found, (math.log(6) + math.log(9)) / 2)


def slow_plackett_luce_loss(scores_BK: Tensor, mask_BK: Tensor) -> float:
    prompts = []
    for scores, mask in zip(scores_BK.tolist(), mask_BK.tolist(), strict=True):
        left = [math.exp(s) for s, m in zip(scores, mask, strict=True) if m]
        if len(left) < 2:
            continue
        likelihood = 1.0
        while left:
            likelihood *= left[0] / sum(left)
            left = left[1:]
        prompts.append(-math.log(likelihood))
    return sum(prompts) / len(prompts)


def test_plackett_luce_loss_equals_loops() -> None:
    scores_BK = numbers(5, 4)
    close(plackett_luce_loss(scores_BK, RAGGED_BK), slow_plackett_luce_loss(scores_BK, RAGGED_BK))


def slow_breslow_loss(scores_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor) -> float:
    """Breslow 1974: at each place, the product of the tied weights over a power of the weight of all that are left."""
    prompts = []
    for scores, mask, ranks in zip(scores_BK.tolist(), mask_BK.tolist(), ranks_BK.tolist(), strict=True):
        kept = [(rank, math.exp(score)) for score, there, rank in zip(scores, mask, ranks, strict=True) if there]
        if len({rank for rank, _ in kept}) < 2:
            continue
        likelihood = 1.0
        for place in {rank for rank, _ in kept}:
            tied = [weight for rank, weight in kept if rank == place]
            left = sum(weight for rank, weight in kept if rank >= place)
            likelihood *= math.prod(tied) / left ** len(tied)
        prompts.append(-math.log(likelihood))
    return sum(prompts) / len(prompts)


def test_plackett_luce_loss_with_ties_equals_loops() -> None:
    scores_BK = numbers(5, 4)
    expected = slow_breslow_loss(scores_BK, RAGGED_BK, RANKS_BK)
    close(plackett_luce_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK), expected)
    close(plackett_luce_loss(scores_BK, RAGGED_BK, ranks_BK=RANKS_BK.double()), expected)


def test_plackett_luce_loss_of_strict_ranks_is_that_of_the_order_they_tell() -> None:
    scores_BK, mask_BK, order = numbers(5, 4), RAGGED_BK, torch.tensor([2, 0, 3, 1])
    best_first_BK = torch.tensor([[1, 2, 5, 9]]).expand(5, 4)
    plain = plackett_luce_loss(scores_BK, mask_BK)
    assert torch.equal(plackett_luce_loss(scores_BK, mask_BK, ranks_BK=best_first_BK), plain)
    moved = plackett_luce_loss(scores_BK[:, order], mask_BK[:, order], ranks_BK=best_first_BK[:, order])
    close(moved, plain)


def test_plackett_luce_likelihoods_of_all_orders_add_up_to_1() -> None:
    scores = numbers(4)
    orders = [plackett_luce_loss(scores[list(order)][None], bools(1, 4)) for order in permutations(range(4))]
    close(torch.stack(orders).neg().exp().sum(), 1.0)
    close(plackett_luce_loss(torch.zeros(1, 4), bools(1, 4)), math.log(24), rtol=1e-6)  # float32


def test_plackett_luce_loss_of_two_is_the_pairwise_loss() -> None:
    scores_BK = numbers(6, 2)
    close(plackett_luce_loss(scores_BK, bools(6, 2)), pairwise_loss(scores_BK[:, 0], scores_BK[:, 1]))


def test_plackett_luce_loss_of_huge_scores_is_finite() -> None:
    assert plackett_luce_loss(torch.tensor([[-1e4, 1e4]]), bools(1, 2)).item() == 2e4


RANKING_LOSSES = [
    pytest.param(ranking_loss, id="best first"),
    pytest.param(lambda s, m: ranking_loss(s, m, ranks_BK=RANKS_BK[: len(s)]), id="by ranks"),
    pytest.param(lambda s, m: ranking_loss(s, m, ranks_BK=torch.where(m, RANKS_BK, NAN)), id="nan ranks"),
    pytest.param(
        lambda s, m: ranking_loss(
            s, m, ranks_BK=RANKS_BK, margins_BKK=torch.where(PAIRS_BKK, MARGINS_BKK, NAN), label_smoothing=0.2
        ),
        id="nan margins, smoothed",
    ),
    pytest.param(plackett_luce_loss, id="plackett-luce"),
    pytest.param(lambda s, m: plackett_luce_loss(s, m, ranks_BK=RANKS_BK[: len(s)]), id="plackett-luce by ranks"),
    pytest.param(lambda s, m: plackett_luce_loss(s, m, ranks_BK=torch.where(m, RANKS_BK, NAN)), id="and nan ranks"),
]


@pytest.mark.usefixtures("no_nan_on_the_way")
@pytest.mark.parametrize("function", RANKING_LOSSES)
def test_nan_among_the_responses_that_are_not_there_changes_nothing(function) -> None:
    found = []
    for fill in (0.7, NAN):
        scores_BK = torch.where(RAGGED_BK, numbers(5, 4), fill).requires_grad_()
        loss = function(scores_BK, RAGGED_BK)
        found.append((loss.detach(), *gradients(loss, scores_BK)))
    close(found[1][0], found[0][0])
    close(found[1][1], found[0][1])
    assert (found[1][1][~RAGGED_BK] == 0).all()


@pytest.mark.parametrize("function", RANKING_LOSSES)
def test_ranking_gradients(function) -> None:
    assert torch.autograd.gradcheck(lambda s: function(s, RAGGED_BK), (numbers(5, 4).requires_grad_(),))


@pytest.mark.parametrize("function", [ranking_loss, plackett_luce_loss])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (2, 1)])
def test_no_response_gives_0_with_finite_gradients(function, shape: tuple[int, int]) -> None:
    scores_BK = torch.full(shape, NAN, requires_grad=True)
    loss = function(scores_BK, torch.zeros(shape, dtype=torch.bool))
    assert loss.item() == 0.0
    assert (gradients(loss, scores_BK)[0] == 0).all()


def test_rankings_of_wrong_shape_are_named() -> None:
    for function in (ranking_loss, plackett_luce_loss):
        with pytest.raises(ValueError, match=r"found scores_BK \(2, 3\), mask_BK \(2, 4\)$"):
            function(torch.zeros(2, 3), bools(2, 4))
        with pytest.raises(ValueError, match="2 dimensions"):
            function(torch.zeros(3), bools(3))
        with pytest.raises(ValueError, match=r"found scores_BK \(2, 3\), mask_BK \(2, 3\), ranks_BK \(1, 3\)"):
            function(torch.zeros(2, 3), bools(2, 3), ranks_BK=torch.zeros(1, 3))
        with pytest.raises(ValueError, match="2 dimensions"):
            function(torch.zeros(3), bools(3), ranks_BK=torch.zeros(3))
    for shape in ((2, 3), (2, 3, 4), (1, 3, 3)):
        margins = {"margins_BKK": torch.zeros(shape)}
        with pytest.raises(ValueError, match=r"\(B, K, K\) for margins; found") as raised:
            ranking_loss(torch.zeros(2, 3), bools(2, 3), **margins)
        assert str(raised.value).endswith(f"found scores_BK (2, 3), mask_BK (2, 3), margins_BKK {shape}")
    with pytest.raises(ValueError, match=r"mask_BK \(2, 4\), ranks_BK \(2, 3\), margins_BKK \(2, 3, 3\)$"):
        ranking_loss(torch.zeros(2, 3), bools(2, 4), ranks_BK=torch.zeros(2, 3), margins_BKK=torch.zeros(2, 3, 3))


# PPO's policy


def ratio_case(ratios: list[float], advantages: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = torch.tensor(ratios, dtype=torch.float64).log() - 1
    return logprobs, torch.full_like(logprobs, -1.0), torch.tensor(advantages, dtype=torch.float64), bools(len(ratios))


def test_policy_loss_by_hand() -> None:
    # clip 0.2. ρ = 1.5, A = 2: max(−3, −2.4) = −2.4, clipped.     ρ = 0.5, A = −2: max(1, 1.6) = 1.6, clipped.
    #           ρ = 1.5, A = −2: max(3, 2.4) = 3.                   ρ = 0.5, A = 2: max(−1, −1.6) = −1.
    #           ρ = 1.1, A = 2: −2.2 both ways.                     Sum −2.4 + 1.6 + 3 − 1 − 2.2 = −1, over 5
    found = policy_loss(*ratio_case([1.5, 0.5, 1.5, 0.5, 1.1], [2.0, -2.0, -2.0, 2.0, 2.0]), clip_range=0.2)
    close(found.loss, -1 / 5)
    close(found.clip_fraction, 2 / 5)
    close(found.ratio_mean, (1.5 + 0.5 + 1.5 + 0.5 + 1.1) / 5)
    close(found.approx_kl, (2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5)) + 0.1 - math.log(1.1)) / 5)


def test_dual_clip_by_hand() -> None:
    # c = 3. ρ = 8, A = −2: max(16, 2.4) = 16, bounded by 2 · 3 = 6. ρ = 2, A = −2: 4, below 6. A = 2: −2.4 stays.
    case = ratio_case([8.0, 2.0, 8.0], [-2.0, -2.0, 2.0])
    close(policy_loss(*case, clip_range=0.2, dual_clip=3.0).loss, (6 + 4 - 2.4) / 3)
    close(policy_loss(*case, clip_range=0.2).loss, (16 + 4 - 2.4) / 3)


def policy_case(seed: int = 0, scale: float = 0.6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old_logprobs = -numbers(3, 4, seed=seed).abs()
    return old_logprobs + scale * numbers(3, 4, seed=seed + 1), old_logprobs, numbers(3, 4, seed=seed + 2), MASK_BT


def slow_policy_loss(case: tuple[Tensor, ...], clip: float, dual: float | None) -> tuple[float, float, float, float]:
    losses, clipped, kl, ratios = [], [], [], []
    for new, old, advantage, kept in zip(*(x.flatten().tolist() for x in case), strict=True):
        if not kept:
            continue
        ratio = math.exp(new) / math.exp(old)
        limited = min(max(ratio, 1 - clip), 1 + clip)
        surrogate = min(ratio * advantage, limited * advantage)
        if dual is not None and advantage < 0:
            surrogate = max(surrogate, dual * advantage)
        losses.append(-surrogate)
        clipped.append(float(limited * advantage < ratio * advantage))
        kl.append(ratio - 1 - math.log(ratio))
        ratios.append(ratio)
    return tuple(sum(x) / len(x) for x in (losses, clipped, kl, ratios))  # type: ignore[return-value]


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("clip_range", [0.1, 0.3])
def test_policy_loss_equals_loops(clip_range: float, dual_clip: float | None) -> None:
    for seed in range(4):
        found = policy_loss(*policy_case(seed), clip_range=clip_range, dual_clip=dual_clip)
        for value, expected in zip(found, slow_policy_loss(policy_case(seed), clip_range, dual_clip), strict=True):
            close(value, expected)


def test_policy_loss_at_ratio_1_is_the_mean_advantage_with_the_policy_gradient() -> None:
    logprobs, _, advantages, mask = policy_case()
    leaf = logprobs.clone().requires_grad_()
    found = policy_loss(leaf, logprobs, advantages, mask, clip_range=0.2, dual_clip=3.0)
    close(found.loss.detach(), -advantages[mask].mean())
    assert [x.item() for x in found[1:]] == [0.0, 0.0, 1.0]
    close(gradients(found.loss, leaf)[0], torch.where(mask, -advantages / mask.sum(), 0))


def test_a_clipped_token_has_no_gradient() -> None:
    logprobs, old_logprobs, advantages, mask = ratio_case([1.5, 0.5, 1.5], [2.0, -2.0, -2.0])
    leaf = logprobs.requires_grad_()
    loss = policy_loss(leaf, old_logprobs, advantages, mask, clip_range=0.2).loss
    close(gradients(loss, leaf)[0], [0.0, 0.0, 1.0])


def test_only_the_policy_loss_carries_a_gradient() -> None:
    logprobs, *others = policy_case()
    found = policy_loss(logprobs.requires_grad_(), *others, clip_range=0.2)
    assert [x.requires_grad for x in found] == [True, False, False, False]


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_beyond_all_bounds_gives_finite_numbers(dtype: torch.dtype, advantage: float) -> None:
    leaf = torch.tensor([2000.0, -2000.0], dtype=dtype, requires_grad=True)
    advantages = torch.full_like(leaf, advantage)
    found = policy_loss(leaf, torch.zeros_like(leaf), advantages, bools(2), clip_range=0.2)
    assert all(torch.isfinite(x) for x in found)
    assert torch.isfinite(gradients(found.loss, leaf)[0]).all()
    # exp(log(largest) / 2) is the largest ratio, the other is 0
    close(found.ratio_mean, math.sqrt(torch.finfo(dtype).max) / 2, rtol=1e-4)  # exp(44) of a rounded 44 in float32


def test_dual_clip_must_be_above_1() -> None:
    for dual_clip in (1.0, 0.5, NAN):
        with pytest.raises(ValueError, match="dual_clip above 1"):
            policy_loss(*policy_case(), clip_range=0.2, dual_clip=dual_clip)


# PPO's value


def test_value_loss_by_hand() -> None:
    # clip 1. V = 5, old 2, G = 6: squares 1 and (3 − 6)² = 9: 9, clipped.  V = 5, old 2, G = 2: 9 and 1: 9.
    #         V = 2.5, old 2, G = 0: 6.25 both ways.                        Half of 9 + 9 + 6.25, over 3
    #         V = −1, old 2, G = −3 would be 4 and 16: checked below.
    values, old_values, returns = (
        torch.tensor(x, dtype=torch.float64) for x in ([5.0, 5.0, 2.5], [2.0, 2.0, 2.0], [6.0, 2.0, 0.0])
    )
    found = value_loss(values, old_values, returns, bools(3), clip_range=1.0)
    close(found.loss, (9 + 9 + 6.25) / 2 / 3)
    close(found.clip_fraction, 1 / 3)
    below = value_loss(*(torch.tensor([x]) for x in (-1.0, 2.0, -3.0)), bools(1), clip_range=1.0)
    assert (below.loss.item(), below.clip_fraction.item()) == (8.0, 1.0)


def value_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return numbers(3, 4, seed=seed), numbers(3, 4, seed=seed + 1), numbers(3, 4, seed=seed + 2), MASK_BT


@pytest.mark.parametrize("clip_range", [0.2, 0.5])
def test_value_loss_equals_loops(clip_range: float) -> None:
    for seed in range(4):
        losses, clipped = [], []
        for value, old, target, kept in zip(*(x.flatten().tolist() for x in value_case(seed)), strict=True):
            if kept:
                limited = min(max(value, old - clip_range), old + clip_range)
                losses.append(max((value - target) ** 2, (limited - target) ** 2) / 2)
                clipped.append(float((limited - target) ** 2 > (value - target) ** 2))
        found = value_loss(*value_case(seed), clip_range=clip_range)
        close(found.loss, sum(losses) / len(losses))
        close(found.clip_fraction, sum(clipped) / len(clipped))


def test_value_loss_with_a_wide_clip_is_half_the_mean_square() -> None:
    values, old_values, returns, mask = value_case()
    found = value_loss(values, old_values, returns, mask, clip_range=1e9)
    close(found.loss, torch.nn.functional.mse_loss(values[mask], returns[mask]) / 2)
    assert found.clip_fraction.item() == 0.0
    close(value_loss(returns, returns, returns, mask, clip_range=0.1).loss, 0.0)


def test_only_the_value_loss_carries_a_gradient() -> None:
    values, *others = value_case()
    assert [x.requires_grad for x in value_loss(values.requires_grad_(), *others, clip_range=0.2)] == [True, False]


# Both of PPO's


def policy(*arguments: Tensor, **options: float) -> tuple[Tensor, ...]:
    return policy_loss(*arguments, clip_range=0.2, **options)


def dual(*arguments: Tensor, **options: float) -> tuple[Tensor, ...]:
    return policy_loss(*arguments, clip_range=0.2, dual_clip=1.5, **options)


def value(*arguments: Tensor, **options: float) -> tuple[Tensor, ...]:
    return value_loss(*arguments, clip_range=0.2, **options)


PPO_LOSSES = [(policy, policy_case()), (dual, policy_case()), (value, value_case())]


@pytest.mark.usefixtures("no_nan_on_the_way")
@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
@pytest.mark.parametrize("options", [{}, {"token_count": 9}])
def test_padding_full_of_nan_changes_neither_losses_nor_gradients(function, case, options) -> None:
    *tensors, mask = case
    found = []
    for fill in (0.7, NAN):
        leaves = [torch.where(mask, x, fill).requires_grad_() for x in tensors]
        result = function(*leaves, mask, **options)
        found.append((*(x.detach() for x in result), *gradients(result[0], *leaves)))
    for clean, spoilt in zip(*found, strict=True):
        close(spoilt, clean)
    for gradient in found[1][-3:]:
        assert (gradient[~mask] == 0).all()


@pytest.mark.usefixtures("no_nan_on_the_way")
@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
def test_nan_in_the_padding_of_one_argument_stays_out_of_every_gradient(function, case, spoilt: int) -> None:
    *tensors, mask = case
    leaves = [torch.where(mask, x, NAN if i == spoilt else 0.7).requires_grad_() for i, x in enumerate(tensors)]
    for gradient in gradients(function(*leaves, mask)[0], *leaves):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("options", [{}, {"token_count": 5}, {"token_count": 0}])
def test_no_true_entry_gives_0_with_gradients_of_0(function, case, shape: tuple[int, int], options) -> None:
    leaves = [torch.full(shape, NAN, requires_grad=True) for _ in range(3)]
    result = function(*leaves, torch.zeros(shape, dtype=torch.bool), **options)
    assert all(x.item() == 0.0 for x in result)
    assert all((gradient == 0).all() for gradient in gradients(result[0], *leaves))


@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
def test_parts_with_a_token_count_add_up_to_the_whole(function, case) -> None:
    whole = function(*case)
    count = int(case[-1].sum())
    parts = [function(*(x[rows] for x in case), token_count=count) for rows in (slice(0, 1), slice(1, 3))]
    close(parts[0][0] + parts[1][0], whole[0])
    close(function(*case, token_count=torch.tensor(count))[0], whole[0])
    for statistic, expected in zip(function(*case, token_count=3 * count)[1:], whole[1:], strict=True):
        close(statistic, expected)  # statistics stay means


@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
def test_a_token_count_of_1_leaves_the_sum(function, case) -> None:
    close(function(*case, token_count=1)[0], function(*case)[0] * 6)


@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
def test_ppo_gradients(function, case) -> None:
    first, *others = case
    assert torch.autograd.gradcheck(lambda x: function(x, *others)[0], (first.clone().requires_grad_(),))


@pytest.mark.parametrize(("function", "case"), PPO_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_whatever_the_token_count(function, case, dtype: torch.dtype) -> None:
    *tensors, mask = case
    for options in ({}, {"token_count": 7}, {"token_count": 7.0}, {"token_count": torch.tensor(7)}):
        assert {x.dtype for x in function(*(x.to(dtype) for x in tensors), mask, **options)} == {dtype}


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize(
    ("function", "names"),
    [
        (policy, ("logprobs", "old_logprobs", "advantages", "mask")),
        (value, ("values", "old_values", "returns", "mask")),
    ],
)
def test_ppo_losses_name_wrong_shapes(function, names: tuple[str, ...], wrong: int) -> None:
    shapes = [(2, 4) if i == wrong else (2, 3) for i in range(4)]
    tensors = [torch.zeros(shape) for shape in shapes[:3]]
    with pytest.raises(ValueError, match="expected one shape") as raised:
        function(*tensors, bools(*shapes[3]))
    assert ", ".join(f"{n} {s}" for n, s in zip(names, shapes, strict=True)) in str(raised.value)


# DPO


def test_dpo_loss_by_hand() -> None:
    # log-ratios: chosen −1 − (−3) = 2, rejected −4 − (−3) = −1; β (2 + 1) = 3 β; β = log(3) / 3: σ(log 3) = 3/4
    arguments = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -3.0))
    close(dpo_loss(*arguments, beta=math.log(3) / 3), math.log(4 / 3))


def test_dpo_loss_smoothed_by_hand() -> None:
    # As above, σ = 3/4. A tenth of the pairs is judged the wrong way round: −0.9 log 3/4 − 0.1 log 1/4
    arguments = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -3.0))
    expected = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)
    close(dpo_loss(*arguments, beta=math.log(3) / 3, label_smoothing=0.1), expected)


def dpo_case() -> tuple[Tensor, ...]:
    return tuple(numbers(5, seed=seed) * 3 - 5 for seed in range(4))


def test_dpo_loss_equals_loops() -> None:
    terms = []
    for policy_c, policy_r, ref_c, ref_r in zip(*(x.tolist() for x in dpo_case()), strict=True):
        ratio = (math.exp(policy_c) / math.exp(ref_c)) / (math.exp(policy_r) / math.exp(ref_r))
        terms.append(-math.log(1 / (1 + ratio**-0.3)))  # σ(β log x) = 1 / (1 + x^−β)
    close(dpo_loss(*dpo_case(), beta=0.3), sum(terms) / 5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_loss_of_the_reference_itself_is_log_2(smoothing: float) -> None:
    chosen, rejected, *_ = dpo_case()
    close(dpo_loss(chosen, rejected, chosen, rejected, beta=0.3, label_smoothing=smoothing), math.log(2))


def test_a_smoothed_dpo_loss_mixes_both_ways_to_judge() -> None:
    policy_c, policy_r, ref_c, ref_r = dpo_case()
    right, wrong = dpo_loss(*dpo_case(), beta=0.3), dpo_loss(policy_r, policy_c, ref_r, ref_c, beta=0.3)
    close(dpo_loss(*dpo_case(), beta=0.3, label_smoothing=0.2), 0.8 * right + 0.2 * wrong)
    for outside in (-0.01, 0.5):
        with pytest.raises(ValueError, match=r"expected label_smoothing in \[0, 0.5\); found"):
            dpo_loss(*dpo_case(), beta=0.3, label_smoothing=outside)


def test_dpo_loss_is_the_pairwise_loss_of_implicit_rewards() -> None:
    policy_c, policy_r, ref_c, ref_r = dpo_case()
    expected = pairwise_loss(0.3 * (policy_c - ref_c), 0.3 * (policy_r - ref_r))
    close(dpo_loss(policy_c, policy_r, ref_c, ref_r, beta=0.3), expected)


def test_dpo_loss_gradient_and_huge_leads() -> None:
    leaves = tuple(x.requires_grad_() for x in dpo_case())
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.3), leaves)
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.3, label_smoothing=0.2), leaves)
    zero = torch.zeros(1)
    assert dpo_loss(torch.tensor([-1e4]), zero, zero, zero, beta=1.0).item() == 1e4


def test_dpo_loss_of_no_pair_is_0_and_wrong_shapes_are_named() -> None:
    assert dpo_loss(*(torch.zeros(0) for _ in range(4)), beta=0.1).item() == 0.0
    with pytest.raises(ValueError, match="expected one shape") as raised:
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3), beta=0.1)
    assert "policy_chosen (2,), policy_rejected (2,), ref_chosen (2,), ref_rejected (3,)" in str(raised.value)


# Properties


@FAST
@given(st.integers(0, 1000), st.floats(0.05, 0.5), st.floats(1.1, 5.0))
def test_clipping_only_raises_the_loss_and_dual_clipping_only_lowers_it(seed: int, clip: float, bound: float) -> None:
    case = policy_case(seed, scale=1.5)
    loss = policy_loss(*case, clip_range=clip).loss
    assert loss >= policy_loss(*case, clip_range=1e9).loss - 1e-12
    assert policy_loss(*case, clip_range=clip, dual_clip=bound).loss <= loss + 1e-12
    close(policy_loss(*case, clip_range=clip, dual_clip=1e9).loss, loss)


@FAST
@given(st.integers(0, 1000), st.floats(-5, 5))
def test_rankings_do_not_see_a_shift_of_all_scores_of_a_prompt(seed: int, shift: float) -> None:
    scores_BK = numbers(5, 4, seed=seed)
    for function in (ranking_loss, plackett_luce_loss):
        torch.testing.assert_close(
            function(scores_BK + shift, RAGGED_BK), function(scores_BK, RAGGED_BK), rtol=1e-9, atol=1e-10
        )


@FAST
@given(st.integers(0, 1000), st.floats(0, 3))
def test_a_greater_lead_never_costs_more(seed: int, lead: float) -> None:
    chosen, rejected = numbers(5, seed=seed), numbers(5, seed=seed + 1)
    assert pairwise_loss(chosen + lead, rejected) <= pairwise_loss(chosen, rejected) + 1e-12
    close(pairwise_loss(chosen + lead, rejected, margin=torch.full_like(chosen, lead)), pairwise_loss(chosen, rejected))
