"""The optimiser step: the rate's schedule, and a gradient that is really clipped."""

import math

import pytest
import torch
from torch import nn

from rlhf_core.errors import TrainingDiverged
from rlhf_core.optimisation import adamw, rate_factor, require_finite, set_rate, step_clipped


def test_the_rate_warms_up_from_above_zero_by_hand() -> None:
    factors = [rate_factor(step, steps=8, warmup=3, schedule="linear") for step in range(8)]
    # ¼ ½ ¾, then 1 at step 3 and down by ⅕ a step
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2], rel=1e-12)


def test_the_cosine_by_hand() -> None:
    factors = [rate_factor(step, steps=4, warmup=0, schedule="cosine") for step in range(4)]
    half = math.sqrt(2) / 2
    assert factors == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2], rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5)])
def test_no_step_has_a_rate_of_nothing_or_of_more_than_the_peak(schedule: str, steps: int, warmup: int) -> None:
    for step in range(steps):
        assert 0 < rate_factor(step, steps=steps, warmup=warmup, schedule=schedule) <= 1


@pytest.mark.parametrize(("schedule", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_where_the_schedule_ends(schedule: str, end: float) -> None:
    assert rate_factor(10, steps=10, warmup=2, schedule=schedule) == pytest.approx(end, abs=1e-12)


def test_the_rate_reaches_every_group() -> None:
    optimiser = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=1
    )
    set_rate(optimiser, 0.25)
    assert [group["lr"] for group in optimiser.param_groups] == [0.25, 0.25]


def test_adamw_takes_the_settings_of_the_published_code() -> None:
    (group,) = adamw([nn.Parameter(torch.ones(1))], learning_rate=0.1, weight_decay=0.2).param_groups
    assert (group["lr"], group["weight_decay"], group["eps"], group["betas"]) == (0.1, 0.2, 1e-5, (0.9, 0.999))


@pytest.mark.parametrize(("limit", "moved"), [(1.0, (0.6, 0.8)), (100.0, (3.0, 4.0))])
def test_the_gradient_is_scaled_down_to_the_norm_and_never_up(limit: float, moved: tuple[float, float]) -> None:
    # The norm of (3, 4) is 5: a limit of 1 leaves (0.6, 0.8), and both parameters count as one vector.
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.full((1,), gradient, dtype=torch.float64)
    norm = step_clipped(torch.optim.SGD(parameters, lr=1.0), parameters, max_grad_norm=limit, where="x", batch=dict)
    assert norm == pytest.approx(5.0, rel=1e-9)  # before clipping
    # clip_grad_norm_ adds 1e-6 to the norm
    assert [-parameter.item() for parameter in parameters] == pytest.approx(moved, rel=1e-6)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_the_run_and_moves_nothing(value: float) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, value])
    optimiser, batch = torch.optim.SGD([parameter], lr=1.0), {"ids_BS": torch.ones(2)}
    message = r"The gradient of ppo's policy is (nan|inf), expected a finite number"
    with pytest.raises(TrainingDiverged, match=message) as found:
        step_clipped(optimiser, [parameter], max_grad_norm=1.0, where="ppo's policy", batch=lambda: batch)
    assert parameter.tolist() == [1.0, 1.0]
    assert found.value.batch == batch


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e6])
def test_the_first_quantity_that_went_is_named_and_kept(value: float) -> None:
    fine, gone = torch.tensor([1.0, -999999.0]), torch.tensor([0.0, value, 3.0])
    require_finite({"A value": fine, "The loss": 2.0}, where="sft", batch=dict)
    with pytest.raises(
        TrainingDiverged, match=r"^A score of sft is .*, expected a finite number below 1e\+06"
    ) as found:
        require_finite(
            {"A value": fine, "A score": gone, "The loss": gone.sum()}, where="sft", batch=lambda: {"ids": fine}
        )
    assert {name: tensor is gone for name, tensor in found.value.batch.items()} == {
        "ids": False,
        "A value": False,
        "A score": True,
        "The loss": False,
    }


def test_a_step_says_that_it_wrote() -> None:
    # Decoding lays matrices out anew where the version of a weight has changed, and a fused step leaves it as it was.
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    before = parameter._version
    optimiser = adamw([parameter], learning_rate=0.1, weight_decay=0.0)
    step_clipped(optimiser, [parameter], max_grad_norm=1.0, where="x", batch=dict)
    assert parameter._version > before
    assert not parameter.detach().allclose(torch.ones(3))
