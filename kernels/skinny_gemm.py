"""Products of a few rows with a large weight: y = x @ weight.T + bias, bound by reading the weight.

The gated form has gate and up weights one after the other and returns act(gate) * up, the
activation in float32 before anything is rounded. All sums are float32.

Two forms. The *vector* form, for a handful of rows: a program owns a few output features and the
whole of K, and multiplies without tensor cores. The *dot* form, for up to a few hundred rows: the
weight's rows are the tensor cores' rows, x stands transposed beside them, and K may be split; then
the programs of a tile leave float32 partial sums, and the last to arrive adds them up in order. So
no result depends on timing, and with one tile a row's result does not depend on its mates; between
tiles, which are picked by the number of rows, the order of additions differs.

The weight is what nobody writes, so its first tiles are read, or called into the L2 cache, before
waiting for the kernel before (``dependent_launch``): kernels in a row read weights with hardly a
pause, if the tiles leave room for the next kernel's programs.
Which tile is fastest, and where cuBLAS is, was measured: ``tuning/skinny_gemm_h200.py``.
Shapes: M rows, K input features, N weight rows; the gated form gives I = N / 2 features.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kernels import dependent_launch
from kernels.activation import GELU, GELU_TANH, SILU, _act
from kernels.tuning import skinny_gemm_h200

_HALF_TYPES = (torch.bfloat16, torch.float16)
_MAX_TILES = 8192  # tiles of a product whose K is split: one counter each
_CACHE_LINE = 64  # values
_MOST_BORROWED_ROWS = 32
_FARTHEST = 2.0  # factor between a shape that was measured and one that takes its tiles


class Tile(NamedTuple):
    """How a product is cut into programs."""

    dot: bool  # the dot form, else the vector form
    block_n: int  # weight rows of a program; half of them gate, half up in the gated form
    block_k: int  # input features of one turn of its loop
    slices: int  # warps side by side, each with its own part of a turn's K; 1 in the vector form
    split_k: int  # programs that share a tile's K; 1 in the vector form
    num_warps: int
    num_stages: int  # turns whose loads are under way; 1 leaves that to the hardware
    prefetch: int  # turns whose weights are called into the L2 cache before waiting

    def fewest_rows(self) -> int:
        """The rows to which fewer are padded: the narrowest product that is fast."""
        if not self.dot:
            return 1
        return 16 if self.slices == 1 else 8


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    tile: Tile,
) -> Tensor:
    """Return x @ weight.T + bias, [M, N] in ``out_dtype``, or in x's dtype.

    Args:
        x: [M, K], bfloat16 or float16, at least one row.
        weight: [N, K] of the same dtype; bias: [N]. All contiguous and on one device.
        tile: as ``tiles_by_rows`` names it.

    Raises:
        ValueError: a shape, dtype or layout that the kernels cannot take.
    """
    _check(x, weight, bias)
    return _run(x, weight, bias, out_dtype or x.dtype, None, tile)


def skinny_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: int, tile: Tile
) -> Tensor:
    """Return act(gate) * up, [M, N / 2] in x's dtype, where [gate | up] = x @ weight.T + bias.

    Args:
        activation: SILU, GELU or GELU_TANH of ``kernels.activation``.
        tile: as ``tiles_by_rows`` names it for the gated form.

    Raises:
        ValueError: a shape, dtype or layout that the kernels cannot take.
    """
    _check(x, weight, bias)
    if weight.shape[0] % 2 or activation not in (SILU, GELU, GELU_TANH):
        raise ValueError(f"no gated product of {weight.shape[0]} rows, activation {activation}")
    return _run(x, weight, bias, x.dtype, activation, tile)


def tiles_by_rows(weight: Tensor, *, gated: bool = False) -> tuple[Tile | None, ...]:
    """What to use for a weight: entry m for m rows, None where cuBLAS is as good, as it is beyond.

    Empty too for what was never measured: GPUs that are not Hopper's, types wider than 16 bits.
    """
    if not weight.is_cuda or weight.dtype not in _HALF_TYPES or not _is_hopper(weight.device):
        return ()
    return pinned_tiles(weight.shape[0], weight.shape[1], gated=gated)


def pinned_tiles(N: int, K: int, *, gated: bool = False) -> tuple[Tile | None, ...]:
    """What the table says of a shape: for each number of rows, its smallest entry that holds it.

    A shape that was not measured borrows, up to 32 rows, from the nearest one that was, if neither
    N nor K differ by more than a factor of two. Tried on 14 shapes of models with 1.7B to 8B: one
    row is faster than by cuBLAS on all (by up to 40 %), up to 32 rows on most, at worst 16 %
    slower on one product of a layer; 64 rows are slower on most.
    """
    table = skinny_gemm_h200.GATED if gated else skinny_gemm_h200.PLAIN
    nearest = min(table, key=lambda shape: _distance(shape, (N, K)), default=(0, 0))
    if not nearest[0] or _distance(nearest, (N, K)) > math.log(_FARTHEST):
        return ()
    tiles: list[Tile | None] = [None]
    for most_rows, values in sorted(table[nearest].items()):
        tile = None if values is None else Tile._make(values)
        if tile and tile.split_k > 1 and tile.block_k * tile.split_k > K:
            tile = None  # some programs would have no part of K
        tiles += [tile] * (most_rows + 1 - len(tiles))
    if nearest != (N, K):
        tiles = tiles[: _MOST_BORROWED_ROWS + 1]
    return tuple(tiles) if any(tiles) else ()


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    """How much two shapes differ: the larger logarithm of the two ratios."""
    return max(abs(math.log(a[0] / b[0])), abs(math.log(a[1] / b[1])))


def skinny_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The definition."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y += bias.float()
    return y.to(out_dtype or x.dtype)


def skinny_gated_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int
) -> Tensor:
    """The definition."""
    gate, up = skinny_linear_reference(x.float(), weight, bias).chunk(2, dim=-1)
    if activation == SILU:
        gate = torch.nn.functional.silu(gate)
    else:
        approximate = "tanh" if activation == GELU_TANH else "none"
        gate = torch.nn.functional.gelu(gate, approximate=approximate)
    return (gate * up).to(x.dtype)


@functools.cache
def arrival_counters(device: torch.device) -> Tensor:
    """Zeros, one for each tile; a launch leaves them as zeros. All launches of a stream share them.

    Made once for a device, and never while a graph is captured: ask for it beforehand.
    """
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or 0 in x.shape:
        raise ValueError(f"x must be [M, K] and weight [N, K]: {x.shape}, {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]: {bias.shape}")
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(t.dtype != x.dtype for t in given) or x.dtype not in _HALF_TYPES:
        raise ValueError(f"all must be bfloat16 or float16: {[t.dtype for t in given]}")
    if not all(t.is_contiguous() and t.device == x.device for t in given):
        raise ValueError("x, weight and bias must be contiguous and on one device")


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: int | None,
    tile: Tile,
) -> Tensor:
    N, K = weight.shape
    num_outputs = N if activation is None else N // 2
    y = torch.empty((x.shape[0], num_outputs), dtype=out_dtype, device=x.device)
    per_program = tile.block_n if activation is None else tile.block_n // 2
    options = {
        "ROWS": max(tile.fewest_rows(), triton.next_power_of_2(x.shape[0])),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "ACTIVATION": activation,
        "STAGES": tile.num_stages,
        "PREFETCH": tile.prefetch,
        "LINE": min(_CACHE_LINE, tile.block_k),
        "PDL": dependent_launch.is_on(),
        "num_warps": tile.num_warps,
    }
    if options["PDL"]:
        options["launch_pdl"] = True
    num_tiles = triton.cdiv(num_outputs, per_program)
    if not tile.dot:
        _vector_kernel[(num_tiles,)](x, weight, bias, y, x.shape[0], num_outputs, K, **options)
        return y
    partial, counters = y, y
    if tile.split_k > 1:
        shape = (num_tiles, tile.split_k, tile.block_n, options["ROWS"])
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = arrival_counters(x.device)
        if num_tiles > len(counters):
            raise ValueError(f"K may be split for up to {len(counters)} tiles, not {num_tiles}")
    _dot_kernel[(num_tiles, tile.split_k)](
        x,
        weight,
        bias,
        y,
        partial,
        counters,
        x.shape[0],
        num_outputs,
        K,
        SLICES=tile.slices,
        SPLIT_K=tile.split_k,
        EVEN_K=K % tile.block_k == 0,
        INTERPRET=knobs.runtime.interpret,
        **options,
    )
    return y


@triton.jit
def _weight_rows(N, BLOCK_N: tl.constexpr, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's weight rows, [BLOCK_N]; beyond the last one the last one, again and again.

    In the gated form the first half are gate rows, the second half the up rows that belong to them.
    """
    i = tl.arange(0, BLOCK_N)
    if ACTIVATION is None:
        rows = tl.minimum(tl.program_id(0) * BLOCK_N + i, N - 1)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        rows = tl.minimum(tl.program_id(0) * HALF + i % HALF, N - 1) + N * (i // HALF)
    return rows


@triton.jit
def _prefetch(weight_ptr, rows, start, K, BLOCK_K: tl.constexpr, LINE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Call a tile of the weight into the L2 cache, one address for each cache line."""
    k = tl.minimum(start + LINE * tl.arange(0, BLOCK_K // LINE), K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [weight_ptr + rows[:, None] * K + k[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_results(  # type: ignore[no-untyped-def]
    y, bias_ptr, y_ptr, rows, m, M, N, ACTIVATION: tl.constexpr
):
    """Add the bias to sums [BLOCK_N, R], join gate and up, and store R rows of results, ``m``."""
    BLOCK_N: tl.constexpr = y.shape[0]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        gate, up = y.reshape(2, BLOCK_N // 2, y.shape[1]).permute(1, 2, 0).split()
        y = _act(gate, ACTIVATION) * up
    n = tl.program_id(0) * y.shape[0] + tl.arange(0, y.shape[0])
    y_ptrs = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptrs, y, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def _vector_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = _weight_rows(N, BLOCK_N, ACTIVATION).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + rows[:, None] * K + k[None, :]
    inside = k < K  # true where K is a multiple, which the compiler sees
    weight = tl.load(weight_ptrs, inside[None, :], other=0.0).to(tl.float32)
    for i in tl.static_range(1, PREFETCH + 1):
        if i * BLOCK_K < K:
            _prefetch(weight_ptr, rows, i * BLOCK_K, K, BLOCK_K, LINE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # A tuple, not one tensor of three dimensions: that would move every weight between threads.
    sums = ()
    for m in tl.static_range(ROWS):
        x = tl.load(x_ptr + tl.minimum(m, M - 1) * K + k, inside, other=0.0).to(tl.float32)
        sums = sums + (weight * x[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    for start in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        inside = start + k < K
        weight = tl.load(weight_ptrs + start, inside[None, :], other=0.0).to(tl.float32)
        added = ()
        for m in tl.static_range(ROWS):
            x_ptrs = x_ptr + tl.minimum(m, M - 1) * K + start + k
            x = tl.load(x_ptrs, inside, other=0.0).to(tl.float32)
            added = added + (sums[m] + weight * x[None, :],)  # type: ignore  # noqa: RUF005
        sums = added
    for m in tl.static_range(ROWS):
        y = tl.sum(sums[m], axis=1)[:, None]
        _store_results(y, bias_ptr, y_ptr, rows, m + tl.arange(0, 1), M, N, ACTIVATION)


@triton.jit
def _dot_sums(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rows,
    first,
    last,
    M,
    K,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The products of weight rows and x over K from ``first`` to ``last``, [BLOCK_N, ROWS]."""
    m = tl.arange(0, ROWS)
    if SLICES == 1:
        k = tl.arange(0, BLOCK_K)
        weight_k, x_k = k[None, :], k[:, None]
        weight_rows, x_rows = rows[:, None], m[None, :]
        y = tl.zeros((BLOCK_N, ROWS), tl.float32)
    else:  # one more dimension, whose products different warps take
        SLICE: tl.constexpr = BLOCK_K // SLICES
        k = tl.arange(0, SLICES)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
        weight_k, x_k = k[:, None, :], k[:, :, None]
        weight_rows, x_rows = rows[None, :, None], m[None, None, :]
        y = tl.zeros((SLICES, BLOCK_N, ROWS), tl.float32)
    weight_ptrs = weight_ptr + weight_rows * K + (first + weight_k)
    x_ptrs = x_ptr + x_rows * K + (first + x_k)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_ptrs)
            x = tl.load(x_ptrs, mask=x_rows < M, other=0.0)
        else:
            weight = tl.load(weight_ptrs, mask=start + weight_k < K, other=0.0)
            x = tl.load(x_ptrs, mask=(start + x_k < K) & (x_rows < M), other=0.0)
        if INTERPRET:  # the interpreter multiplies the bits of 16-bit numbers
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        y = tl.dot(weight, x, y, input_precision="ieee")
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    if SLICES > 1:
        y = tl.sum(y, axis=0)
    return y


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    counters_ptr,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * share
    last = tl.minimum(first + share, K)
    rows = _weight_rows(N, BLOCK_N, ACTIVATION).to(tl.int64)
    for i in tl.static_range(PREFETCH):
        _prefetch(weight_ptr, rows, first + i * BLOCK_K, K, BLOCK_K, LINE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y = _dot_sums(
        x_ptr,
        weight_ptr,
        rows,
        first,
        last,
        M,
        K,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        SLICES,
        STAGES,
        EVEN_K,
        INTERPRET,
    )
    m = tl.arange(0, ROWS)
    if SPLIT_K > 1:
        at = tl.arange(0, BLOCK_N)[:, None] * ROWS + m[None, :]
        partial_ptrs = partial_ptr + tile.to(tl.int64) * SPLIT_K * BLOCK_N * ROWS + at
        tl.store(partial_ptrs + split * BLOCK_N * ROWS, y)
        tl.debug_barrier()  # every thread's part is written before the arrival is told
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu") < SPLIT_K - 1:
            return
        y = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for s in tl.static_range(SPLIT_K):  # .cg: not from a first-level cache, which may be old
            y += tl.load(partial_ptrs + s * BLOCK_N * ROWS, cache_modifier=".cg")
        tl.store(counters_ptr + tile, 0)
    _store_results(y, bias_ptr, y_ptr, rows, m, M, N, ACTIVATION)
