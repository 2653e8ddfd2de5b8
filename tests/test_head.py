"""Log-probabilities and entropies of a head, and the gradients found beside them, are those of autograd over logits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_core import head as module
from rlhf_core.head import said
from rlhf_core.matrices import quicken

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS, WIDTH, WORDS = 11, 8, 40


def parts(*, learns: bool = False, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=bias).requires_grad_(learns)
    quicken(nn.Sequential(head))
    return head, torch.randn(TOKENS, WIDTH) * 3, torch.randint(WORDS, (TOKENS,))


def by_hand(head: nn.Linear, hidden_ND: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_NV = hidden_ND @ head.weight.t() + (0 if head.bias is None else head.bias)
    log_NV = (logits_NV / temperature).log_softmax(-1)
    return log_NV[torch.arange(len(ids_N)), ids_N], -(log_NV.exp() * log_NV).sum(-1)


def gradients(found_N: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((found_N * torch.linspace(-1, 2, len(found_N))).sum(), of)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("size", [100, 4])  # in one piece, and in several
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_and_gradients_are_those_of_whole_logits(
    temperature: float, size: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIT_TOKENS", size)
    head, hidden_ND, ids_N = parts(bias=bias)
    hidden_ND.requires_grad_()
    expected_N, spread_N = by_hand(head, hidden_ND, ids_N, temperature)
    found_N, none = said(head, hidden_ND, ids_N, temperature=temperature)
    assert none is None
    torch.testing.assert_close(found_N, expected_N, **CLOSE)
    torch.testing.assert_close(gradients(found_N, hidden_ND), gradients(expected_N, hidden_ND), **CLOSE)
    with torch.no_grad():
        again_N, entropy_N = said(head, hidden_ND, ids_N, temperature=temperature, entropy=True)
    torch.testing.assert_close(entropy_N, spread_N, **CLOSE)
    assert torch.equal(again_N, found_N)  # or a ratio of PPO's would not begin at 1


def test_an_entropy_that_is_learned_from_has_its_gradient() -> None:
    head, hidden_ND, ids_N = parts()
    hidden_ND.requires_grad_()
    _, entropy_N = said(head, hidden_ND, ids_N, temperature=0.7, entropy=True)
    assert entropy_N is not None
    expected_N = by_hand(head, hidden_ND, ids_N, 0.7)[1]
    torch.testing.assert_close(gradients(entropy_N, hidden_ND), gradients(expected_N, hidden_ND), **CLOSE)


def test_a_head_that_learns_has_its_gradient() -> None:
    head, hidden_ND, ids_N = parts(learns=True)
    of = (head.weight, hidden_ND.requires_grad_())
    found_N, _ = said(head, hidden_ND, ids_N, temperature=0.7)
    torch.testing.assert_close(
        gradients(found_N, *of), gradients(by_hand(head, hidden_ND, ids_N, 0.7)[0], *of), **CLOSE
    )


def test_the_gradient_is_that_of_differences() -> None:
    head, hidden_ND, ids_N = parts()
    inputs = (hidden_ND.double().requires_grad_(), ids_N, head.weight.double(), 0.7, False)
    assert torch.autograd.gradcheck(lambda *inputs: module._Frozen.apply(*inputs)[0], inputs)


@pytest.mark.parametrize("size", [100, 4])
def test_no_logits_are_kept_or_computed_again(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_TOKENS", size)
    head, hidden_ND, ids_N = parts()
    kept: list[tuple[int, ...]] = []
    products: list[int] = []

    def counted(weight: Tensor, **turned: bool) -> Any:
        products.append(weight.shape[0])
        return laid_out(weight, **turned)

    laid_out = module.laid_out
    monkeypatch.setattr(module, "laid_out", counted)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.shape) or value, lambda value: value):
        found_N, _ = said(head, hidden_ND.requires_grad_(), ids_N, temperature=1.0)
    assert kept == [(TOKENS, WIDTH)]
    before = len(products)
    found_N.sum().backward()
    assert len(products) == before == 2 * -(-TOKENS // size)  # a piece's logits, and their gradient


def test_nothing_said_of_no_tokens() -> None:
    head, hidden_ND, ids_N = parts()
    found_N, entropy_N = said(head, hidden_ND[:0].requires_grad_(), ids_N[:0], temperature=1.0)
    assert found_N.shape == (0,)
    assert entropy_N is None


def test_sixteen_bit_logits_are_summed_in_float32() -> None:
    head, hidden_ND, ids_N = parts()
    head, hidden_ND = head.bfloat16(), hidden_ND.bfloat16()
    log_NV = (hidden_ND @ head.weight.t()).float().log_softmax(-1)
    found_N, entropy_N = said(head, hidden_ND, ids_N, temperature=1.0, entropy=True)
    assert entropy_N is not None
    assert found_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(found_N, log_NV.gather(1, ids_N[:, None])[:, 0], **CLOSE)
    torch.testing.assert_close(entropy_N, -(log_NV.exp() * log_NV).sum(-1), **CLOSE)
