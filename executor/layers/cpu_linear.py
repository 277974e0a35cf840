"""Dense products on the CPU: the fastest stored form of a weight, and rows that ignore their mates.

Measured with torch 2.13 (MKL, oneDNN 3.12), AVX512 without AMX, weights [640, 384], [384, 384],
[2048, 384], [384, 1024], [8192, 384] and [2048, 2048], 1 to 1024 rows, one and two threads.
"Batch-invariant" means that a row's result is bit for bit the same whatever the number of rows;
a row's *place* in the batch never mattered in any form.

| float32 form | batch-invariant | microseconds at 1 / 8 / 32 rows, [640, 384], one thread |
| --- | --- | --- |
| F.linear, weight stored [N, K] | no: 1 to 15 rows differ from the rest | 15 / 41 / 138 |
| MKL packed (mkl._mkl_linear) | no: as above | 15 / 32 / 107 |
| the same weight stored [K, N] | from 2 rows on, while K is small (see below) | 12 / 29 / 103 |
| oneDNN packed (mkldnn._linear_pointwise) | yes; with K = 2048 from 2 rows on | 34 / 52 / 133 |

- Stored [K, N], one row takes a matrix-vector routine that adds in another order; two equal rows
  agree with every other batch size. With K = 1024, two threads split K for up to 16 rows, and from
  129 rows on the blocks change. [K, N] and oneDNN agree bit for bit at K = 384, not at K = 1024.
- Those weights fit the cache; a model's do not. All 29 products of a model of 14 M parameters in
  turn, milliseconds at 1 / 8 rows: F.linear 4.5 / 8.9, [K, N] with one row doubled 5.1 / 7.4,
  oneDNN 4.9 / 6.6; on two threads 2.3 / 8.5, 2.8 / 8.0 and 3.0 / 3.8. So oneDNN comes first.
- bfloat16: oneDNN packed beats F.linear everywhere (49 / 51 / 63 against 70 / 63 / 82 us on two
  threads). It is batch-invariant at K = 384; at K = 1024 and 2048 up to 32 rows, then no more.

oneDNN compiles a routine for each new number of rows: 0.5 to 1 ms in float32, 0.5 to 14 ms in
bfloat16, where 51 rows take 0.3 ms once compiled. So above 16 rows only multiples of 8 and, above
128, of 32 are multiplied, the rest being padding.

None of this is promised by a library, so nothing is assumed: ``pack`` tries each shape once, with
the thread count in force and every number of rows that will ever be multiplied, and keeps the form
whose rows agree up to the widest tile. Set the thread count before loading.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Run = Callable[[Tensor], Tensor]
Form = Callable[[Tensor, Tensor | None], Run]  # weight and bias -> the product

# Every number of rows that a tile of up to 64 is ever multiplied in; see ``_padded_size``. In
# float32, 128 rows at once would save 6 % of a long prompt, and triple the time of the trials.
_PROBED_ROWS = (*range(2, 17), *range(24, 65, 8))
_TILES = (64, 32, 16, 8)
_PROBED_OUTPUTS = 8192  # at most: beyond that there are only more blocks of outputs
_DISTINCT_OUTPUTS = 128  # the others repeat them: making random numbers takes as long as trying
_FIXED_TILE = 16
WIDEST_TILE = 512  # from 256 rows on, more at once gain nothing


def pack(weight: Tensor, bias: Tensor | None, *, deterministic: bool) -> Run:
    """A function [M, K] -> [M, N] for ``weight`` [N, K], which the caller may then let go.

    Args:
        deterministic: a row's result must not depend on how many rows there are.
    """
    forms = _forms(weight.dtype)
    if not deterministic:
        return in_tiles(forms[0](weight, bias), WIDEST_TILE)
    shape = (min(weight.shape[0], _PROBED_OUTPUTS), weight.shape[1])
    choice = _choose(shape, weight.dtype, torch.get_num_threads())
    run = forms[choice.form](weight, bias)
    if choice.tile == 0:
        return fixed_tiles(run, _FIXED_TILE)
    return in_tiles(run, choice.tile, smallest=1 if choice.one_row_agrees else 2)


class Choice(NamedTuple):
    """What the trial found."""

    form: int  # index into the forms of the type
    tile: int  # rows up to which all batch sizes agree; 0: not enough to be worth it
    one_row_agrees: bool  # else one row is multiplied beside a second one


@functools.cache
def _choose(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> Choice:
    """The first form with the widest tile of rows that do not depend on each other.

    Tried on made-up weights: a routine is picked by shape, type and thread count, not by values.
    """
    weight, x = _probes(shape, dtype)
    best = Choice(form=0, tile=0, one_row_agrees=False)
    for index, form in enumerate(_forms(dtype)):
        run = form(weight, None)
        tile = _invariant_rows(run, x)
        if tile > best.tile:
            best = Choice(index, tile, torch.equal(run(x[:1]), run(x[:2])[:1]))
        if tile == _TILES[0]:
            break
    return best


def fixed_tiles(run: Run, rows: int) -> Run:
    """Always multiply exactly ``rows`` rows, padded with zeros: invariant on any device."""

    def tiled(x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        padding = -num_rows % rows
        if padding:
            x = torch.cat((x, x.new_zeros(padding, x.shape[1])))
        if x.shape[0] == rows:
            return run(x)[:num_rows]
        return torch.cat([run(tile) for tile in _tiles(x, rows)])[:num_rows]

    return tiled


def _forms(dtype: torch.dtype) -> list[Form]:
    """The ways to multiply, fastest first."""
    if dtype == torch.float32:
        return [_onednn, _columns] if _has_onednn() else [_columns]
    if dtype == torch.bfloat16 and _has_onednn():
        return [_onednn]
    return [_plain]


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _columns(weight: Tensor, bias: Tensor | None) -> Run:
    columns = weight.t().contiguous()  # [K, N]
    if bias is None:
        return lambda x: torch.mm(x, columns)
    return lambda x: torch.addmm(bias, x, columns)


def _onednn(weight: Tensor, bias: Tensor | None) -> Run:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _plain(weight: Tensor, bias: Tensor | None) -> Run:
    return lambda x: nn.functional.linear(x, weight, bias)


def in_tiles(run: Run, tile: int, smallest: int = 1) -> Run:
    """Multiply up to ``tile`` rows at once, in few different sizes, none below ``smallest``."""

    def one_tile(x: Tensor) -> Tensor:
        rows = x.shape[0]
        size = max(_padded_size(rows), smallest)
        if rows in (0, size):
            return run(x)
        return run(nn.functional.pad(x, (0, 0, 0, size - rows)))[:rows]

    def tiled(x: Tensor) -> Tensor:
        if x.shape[0] <= tile:
            return one_tile(x)
        return torch.cat([one_tile(rows) for rows in _tiles(x, tile)])

    return tiled


def _padded_size(rows: int) -> int:
    """The size that ``rows`` are multiplied in: oneDNN compiles a routine for each new one."""
    if rows <= 16:
        return rows
    step = 8 if rows <= 128 else 32
    return -(-rows // step) * step


def _tiles(x: Tensor, rows: int) -> list[Tensor]:
    return [x[start : start + rows] for start in range(0, x.shape[0], rows)]


def _probes(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight and equal rows whose true products are zero: what comes out is rounding alone.

    So another order of additions shows in every value, even after rounding to bfloat16, and in
    every place of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    half = shape[1] // 2
    weight = torch.randn(min(shape[0], _DISTINCT_OUTPUTS), shape[1], generator=generator)
    x = torch.randn(1, shape[1], generator=generator)
    order = torch.randperm(shape[1], generator=generator)
    weight[:, half : 2 * half] = -weight[:, :half]
    x[:, half : 2 * half] = x[:, :half]
    x[:, 2 * half :] = 0.0
    repeats = -(-shape[0] // len(weight))
    weight = weight[:, order].to(dtype).repeat(repeats, 1)[: shape[0]]
    return weight, x[:, order].to(dtype).repeat(_TILES[0], 1)


def _invariant_rows(run: Run, x: Tensor) -> int:
    """The widest tile for which rows agree at every probed row count; 0 when none is worth it."""
    reference, agreed = run(x[:2])[0], 1
    for rows in _PROBED_ROWS:
        if not torch.equal(run(x[:rows]), reference.expand(rows, -1)):
            break
        agreed = rows
    return next((tile for tile in _TILES if tile <= agreed), 0)
