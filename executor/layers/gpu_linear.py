"""Dense products on a GPU: by our kernels for a few rows, where they are faster, else by cuBLAS.

How many rows there are decides, so a captured graph keeps what its batch size asked for. Which
kernel adds in which order differs, so results depend on the number of rows in the last place; where
they must not, ``cpu_linear.fixed_tiles`` goes around cuBLAS instead.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import GELU, GELU_TANH, SILU, gelu_and_mul, silu_and_mul
from kernels.skinny_gemm import arrival_counters, skinny_gated, skinny_linear, tiles_by_rows

Run = Callable[[Tensor], Tensor]

GATES: dict[int, Run] = {
    SILU: silu_and_mul,
    GELU: lambda x: gelu_and_mul(x, tanh=False),
    GELU_TANH: lambda x: gelu_and_mul(x, tanh=True),
}


def dense(weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Run:
    """The product [M, K] -> [M, N] in ``out_dtype``, or in x's dtype, for ``weight`` [N, K]."""
    by_cublas = _cublas(weight, bias, out_dtype)
    tiles = tiles_by_rows(weight)
    if not tiles:
        return by_cublas
    arrival_counters(weight.device)  # now: later a graph may be being captured

    def run(x: Tensor) -> Tensor:
        tile = tiles[x.shape[0]] if x.shape[0] < len(tiles) else None
        if tile is None:
            return by_cublas(x)
        return skinny_linear(x.contiguous(), weight, bias, out_dtype=out_dtype, tile=tile)

    return run


def gated(weight: Tensor, bias: Tensor | None, activation: int) -> Run:
    """act(gate) * up, [M, K] -> [M, N / 2], for ``weight`` = gate and up, [N, K]."""
    gate = GATES[activation]
    tiles = tiles_by_rows(weight, gated=True)
    if not tiles:
        product = dense(weight, bias)
        return lambda x: gate(product(x))
    arrival_counters(weight.device)

    def run(x: Tensor) -> Tensor:
        tile = tiles[x.shape[0]] if x.shape[0] < len(tiles) else None
        if tile is None:
            return gate(F.linear(x, weight, bias))
        return skinny_gated(x.contiguous(), weight, bias, activation=activation, tile=tile)

    return run


def _cublas(weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None) -> Run:
    if out_dtype in (None, weight.dtype):
        return lambda x: F.linear(x, weight, bias)

    def widened(x: Tensor) -> Tensor:
        y = torch.mm(x, weight.t(), out_dtype=out_dtype)
        return y if bias is None else y.add_(bias)

    return widened
