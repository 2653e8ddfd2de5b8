"""Laid-out matrices give the numbers and gradients of plain ones."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rlhf_core import matrices
from rlhf_core.matrices import Matrix, quicken

ROWS = 67
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


class Small(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 8, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows).relu())


def adapted(names: tuple[str, ...] = ("one",), *, bias: bool = False, dropout: float = 0.0) -> Any:
    """A small model with adapters that say something, which PEFT multiplies."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], lora_dropout=dropout)
    model = get_peft_model(Small(bias), config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_("lora_" in name)
    return model.eval()


def results(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of the rows and of all that learns."""
    rows = rows.clone().requires_grad_()
    out = model(rows)
    model.zero_grad()
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    learning = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return [out.detach(), *(part for part in (rows.grad, *learning) if part is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, 12), (3, ROWS, 12), (5, 12), (0, 12)])
def test_linear_layers_give_the_numbers_of_pytorch(bias: bool, learns: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = Small(bias).requires_grad_(learns)
    rows, quick = torch.randn(shape), copy.deepcopy(plain)
    quicken(quick)
    same(results(quick, rows), results(plain, rows))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, 12), (3, 5, 12), (0, 12)])
def test_adapters_give_the_numbers_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    plain, rows = adapted(bias=bias), torch.randn(shape)
    quick = adapted(bias=bias)
    quicken(quick)
    same(results(quick, rows), results(plain, rows))


def test_whatever_is_more_than_one_plain_adapter_stays_with_peft() -> None:
    rows = torch.randn(ROWS, 12)

    def both(change: Any, **options: Any) -> Tensor:
        found = []
        for turn in (lambda model: None, quicken):
            model = adapted(("one", "two"), **options)
            turn(model)
            change(model)
            torch.manual_seed(7)
            found.append(model(rows).detach())
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
        return found[1]

    one, two, none, together, merged, dropped = (
        both(lambda model: None),
        both(lambda model: model.set_adapter("two")),
        both(lambda model: model.base_model.disable_adapter_layers()),
        both(lambda model: model.base_model.set_adapter(["one", "two"])),
        both(lambda model: model.merge_adapter(["two"])),
        both(lambda model: model.train(), dropout=0.5),
    )
    torch.testing.assert_close(merged, two, rtol=1e-4, atol=1e-4)
    for other in (two, none, together, dropped):
        assert not torch.allclose(one, other, atol=1e-2)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    rows, weight, bias, down, up = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (6, 5), (6,), (2, 5), (6, 2))
    )
    assert torch.autograd.gradcheck(lambda *parts: matrices._Product.apply(*parts, 0.7), (rows, weight, bias, down, up))


@needs_onednn
def test_every_linear_layer_of_a_quickened_model_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = adapted(), torch.randn(ROWS, 12)
    quicken(model)
    quicken(model)
    made: list[tuple[int, ...]] = []

    class Counted(Matrix):
        def __init__(self, weight: Tensor) -> None:
            super().__init__(weight)
            assert self.packed is not None
            made.append(tuple(weight.shape))

    monkeypatch.setattr(matrices, "Matrix", Counted)
    results(model, rows)
    assert sorted(made) == [(8, 20), (12, 20), (20, 8), (20, 12)]  # for the rows, and for their gradients
    results(model, rows)
    assert len(made) == 4


@needs_onednn
def test_a_weight_that_changes_is_laid_out_again() -> None:
    model, rows = Small(False).requires_grad_(False), torch.randn(ROWS, 12)
    quicken(model)
    model(rows)
    with torch.no_grad():
        model.first.weight.mul_(-1)
    other = copy.deepcopy(model)  # it has weights of its own
    other.second.weight.mul_(3)
    for one in (model, other):
        expected = F.linear(F.linear(rows, one.first.weight).relu(), one.second.weight)
        torch.testing.assert_close(one(rows), expected, rtol=1e-5, atol=1e-5)


def test_other_numbers_than_float32_are_multiplied_as_pytorch_does() -> None:
    model, rows = adapted().double(), torch.randn(ROWS, 12, dtype=torch.float64)
    expected = results(model, rows)
    quicken(model)
    for found, plain in zip(results(model, rows), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=0)
    weight = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(Matrix(weight)(rows), F.linear(rows, weight))
