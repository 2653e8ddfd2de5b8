"""What the machine can do at most: its matrix products and its memory."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from rlhf_core.matrices import Matrix

GEMM = 2048  # rows, columns and depth of the product that is taken for the peak
COPY_BYTES = 1 << 28
REPEATS = 9


def timed(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of several calls, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return median(found)


def product_gflops(size: int = GEMM) -> dict[str, float]:
    """GFLOP/s of one large square product in float32: PyTorch's own, and the peak, of it or of one laid out."""
    one, two = torch.randn(size, size), torch.randn(size, size)
    laid_out = Matrix(two)
    plain, packed = (2 * size**3 / timed(work) / 1e9 for work in (lambda: one @ two, lambda: laid_out(one)))
    return {"plain_gflops": plain, "peak_gflops": max(plain, packed)}


def bandwidth_gb_s(size: int = COPY_BYTES) -> float:
    """GB/s of a copy, bytes read and bytes written both counted."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source)) / 1e9


def products_seconds(shapes: list[tuple[int, int]], rows: int) -> dict[str, float]:
    """Seconds that the products of a decode step take alone, by how the matrices lie in memory.

    Args:
        shapes: (out, in) of each matrix, in the order of the step.
        rows: of the batch.
    """
    weights = [torch.randn(shape) for shape in shapes]
    turned = [weight.t().contiguous() for weight in weights]
    inputs = [torch.randn(rows, shape[1]) for shape in shapes]
    found = {
        "plain": timed(lambda: [F.linear(x, w) for x, w in zip(inputs, weights, strict=True)]),
        "transposed": timed(lambda: [x @ w for x, w in zip(inputs, turned, strict=True)]),
    }
    packed = [Matrix(weight) for weight in weights]
    if all(matrix.packed is not None for matrix in packed):
        found["prepacked"] = timed(lambda: [matrix(x) for matrix, x in zip(packed, inputs, strict=True)])
    return found
