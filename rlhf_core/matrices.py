"""Matrix products on a CPU, and a low-rank adapter in one step with the matrix that it stands on.

On a CPU a matrix product is most of the work. oneDNN is faster at it than what PyTorch takes by itself where a matrix
was laid out for it beforehand, which a frozen one can be once for all. The numbers are those of PyTorch and PEFT up to
float32's rounding; elsewhere than on a CPU in float32 they are theirs to the bit.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Matrix:
    """A matrix (out, in) that multiplies rows from the right, laid out for it where oneDNN is there to do so."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.packed = weight, None
        if packs(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
            self.weight = torch.empty(0)  # the other is not needed beside it

    def __call__(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., out) of (..., in); no gradient passes."""
        if self.packed is None:
            return F.linear(rows, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, bias, "none", [], "")


def packs(weight: Tensor) -> bool:
    """Whether oneDNN lays such a matrix out."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def quicken(model: nn.Module) -> None:
    """Let every linear layer of a model, adapters included, multiply in this module's way. Twice is as once."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ".lora_" not in name:  # an adapter's own are far too thin
            module.forward = MethodType(_linear, module)  # type: ignore[method-assign]
        elif type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_adapted, module)  # type: ignore[method-assign]


def _linear(self: nn.Linear, rows: Tensor) -> Tensor:
    if not packs(self.weight):
        return F.linear(rows, self.weight, self.bias)
    return _Product.apply(rows, self.weight, self.bias, None, None, 0.0)


def _adapted(self: Any, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    on = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
    plain = not (args or kwargs or self.merged or self.lora_variant) and packs(self.base_layer.weight)
    if len(on) != 1 or not plain or not isinstance(self.lora_dropout[on[0]], nn.Identity):
        return type(self).forward(self, rows, *args, **kwargs)
    down, up = self.lora_A[on[0]].weight, self.lora_B[on[0]].weight
    base = self.base_layer
    return _Product.apply(rows, base.weight, base.bias, down, up, self.scaling[on[0]])


class _Product(torch.autograd.Function):
    """rows @ (weight + scaling × up @ down).T + bias, the adapter's part without making the sum."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None,
        scaling: float,
    ) -> Tensor:  # fmt: skip
        flat_ND = rows.reshape(-1, rows.shape[-1])
        found_NE = laid_out(weight)(flat_ND, bias)
        low_NR = None
        if down is not None and up is not None:
            low_NR = flat_ND @ down.t()
            found_NE.addmm_(low_NR, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, low_NR)
        ctx.scaling = scaling
        return found_NE.view(*rows.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low_NR = ctx.saved_tensors
        flat_ND, of_NE = rows.reshape(-1, rows.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        wanted = ctx.needs_input_grad
        to_rows = to_weight = to_bias = to_down = to_up = of_low_NR = None
        if up is not None:
            of_low_NR = (of_NE @ up).mul_(ctx.scaling)
            to_down = of_low_NR.t() @ flat_ND if wanted[3] else None
            to_up = (of_NE.t() @ low_NR).mul_(ctx.scaling) if wanted[4] else None
        if wanted[0]:
            to_rows = _times(of_NE, weight)
            if of_low_NR is not None:
                to_rows.addmm_(of_low_NR, down)
            to_rows = to_rows.view_as(rows)
        if wanted[1]:
            to_weight = _outer(of_NE, flat_ND, weight)
        if wanted[2]:
            to_bias = of_NE.sum(0)
        return to_rows, to_weight, to_bias, to_down, to_up, None


def _times(of_NE: Tensor, weight: Tensor) -> Tensor:
    """(N, D) gradients of rows from those of their products with a weight."""
    if not weight.requires_grad or not packs(weight):
        return laid_out(weight, turned=True)(of_NE)
    size = (len(of_NE), weight.shape[1])
    return torch.ops.aten.mkldnn_linear_backward_input(size, of_NE.to_mkldnn(), weight).to_dense()


def _outer(of_NE: Tensor, rows_ND: Tensor, weight: Tensor) -> Tensor:
    """(E, D) the gradient of a weight."""
    if not packs(weight):
        return of_NE.t() @ rows_ND
    ours, theirs = of_NE.to_mkldnn(), rows_ND.to_mkldnn()
    found, _ = torch.ops.aten.mkldnn_linear_backward_weights(ours, theirs, weight, False)
    return found


def laid_out(weight: Tensor, *, turned: bool = False) -> Matrix:
    """The matrix that multiplies by `weight.T`, or turned, by `weight`; that of a frozen weight is kept."""
    # Weights that learn change in every step. They are laid out for each product all the same, lest what is computed
    # hang on whether a weight learns. What is kept, as an attribute of the weight, is not copied with it.
    kept = {} if weight.requires_grad else weight.__dict__.setdefault("_laid_out", {})
    version, made = kept.get(turned, (None, None))
    if made is None or version != weight._version:
        made = Matrix(weight.t() if turned else weight)
        kept[turned] = (weight._version, made)
    return made
