"""Products of a few rows: the definition against torch, then both forms of the kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import activation
from kernels.skinny_gemm import (
    Tile,
    arrival_counters,
    pinned_tiles,
    skinny_gated,
    skinny_gated_reference,
    skinny_linear,
    skinny_linear_reference,
    tiles_by_rows,
)
from kernels.tuning import skinny_gemm_h200
from tests.kernels.cases import assert_close, random

CPU = torch.device("cpu")
# dot, block_n, block_k, slices, split_k, warps, stages, prefetch
TILES = [
    pytest.param(Tile(False, 2, 32, 1, 1, 4, 1, 0), id="vector"),
    pytest.param(Tile(False, 4, 128, 1, 1, 4, 3, 0), id="vector, all of K at once"),
    pytest.param(Tile(True, 16, 32, 1, 1, 4, 3, 0), id="dot"),
    pytest.param(Tile(True, 16, 64, 4, 1, 4, 3, 0), id="dot, sliced"),
    pytest.param(Tile(True, 16, 32, 1, 3, 4, 3, 0), id="dot, split"),
    pytest.param(Tile(True, 32, 64, 2, 2, 4, 3, 0), id="dot, sliced and split"),
]
SHAPES = [
    pytest.param(1, 6, 64, id="one row"),
    pytest.param(3, 34, 192, id="whole turns"),
    pytest.param(5, 20, 100, id="turns cut short"),
]
ACTIVATIONS = [activation.SILU, activation.GELU, activation.GELU_TANH]


def case(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias whose results are about one."""
    weight = random(N, K) / K**0.5
    return random(M, K, dtype=dtype, seed=1), weight.to(dtype), random(N, dtype=dtype, seed=2)


def test_definitions_agree_with_torch() -> None:
    x, weight, bias = (t.double() for t in case(3, 10, 40, torch.float32))
    y = F.linear(x, weight, bias)
    gate, up = y.chunk(2, dim=1)
    expected = [F.silu(gate), F.gelu(gate), F.gelu(gate, approximate="tanh")]

    assert_close(skinny_linear_reference(x, weight, bias, torch.float32), y.float())
    for act, activated in zip(ACTIVATIONS, expected, strict=True):
        result = skinny_gated_reference(x.float(), weight, bias, act)
        assert_close(result, (activated * up).float())


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_equals_definition(M: int, N: int, K: int, tile: Tile, dtype: torch.dtype) -> None:
    x, weight, bias = case(M, N, K, dtype)

    for given, out_dtype in ((None, None), (bias, torch.float32)):
        y = skinny_linear(x, weight, given, out_dtype=out_dtype, tile=tile)
        assert_close(y, skinny_linear_reference(x, weight, given, out_dtype))
    assert not arrival_counters(CPU).any()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_gated_product_equals_definition(M: int, N: int, K: int, tile: Tile) -> None:
    x, weight, bias = case(M, N, K, torch.float16)

    for act, given in zip(ACTIVATIONS, (None, bias, None), strict=True):
        y = skinny_gated(x, weight, given, activation=act, tile=tile)
        assert_close(y, skinny_gated_reference(x, weight, given, act))


@pytest.mark.parametrize("tile", TILES[2:])
def test_a_row_does_not_depend_on_the_values_of_its_mates(tile: Tile) -> None:
    x, weight, _ = case(4, 20, 128, torch.float16)
    other = x.clone()
    other[1:] = 7.0

    first, second = (skinny_linear(rows, weight, tile=tile)[0] for rows in (x, other))

    assert first.equal(second)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x, weight, bias = case(2, 8, 32, torch.float16)
    tile = Tile(True, 16, 32, 1, 1, 4, 3, 0)
    wrong = [
        ((x[:, :16], weight, None), "must be"),
        ((x[:0], weight, None), "must be"),
        ((x, weight, bias[:4]), "bias must be"),
        ((x.float(), weight.float(), None), "bfloat16 or float16"),
        ((x, weight.bfloat16(), None), "bfloat16 or float16"),
        ((x.t().contiguous().t(), weight, None), "contiguous"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            skinny_linear(*arguments, tile=tile)
    with pytest.raises(ValueError, match="no gated product"):
        skinny_gated(x, weight[:7], activation=activation.SILU, tile=tile)
    with pytest.raises(ValueError, match="no gated product"):
        skinny_gated(x, weight, activation=3, tile=tile)


@pytest.mark.parametrize("name", ["PLAIN", "GATED"])
def test_every_pinned_tile_can_be_launched(name: str) -> None:
    table = getattr(skinny_gemm_h200, name)
    for (N, K), entries in table.items():
        tiles = pinned_tiles(N, K, gated=name == "GATED")
        for rows, values in entries.items():
            found = tiles[rows] if rows < len(tiles) else None
            assert found == (None if values is None else Tile(*values))
            if found is None:
                continue
            assert found.dot or found.slices == found.split_k == 1
            assert found.block_n & (found.block_n - 1) == 0
            assert found.block_k % (16 * found.slices) == 0
            assert found.split_k * found.block_k <= K


def test_a_number_of_rows_takes_the_smallest_entry_that_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = (False, 2, 512, 1, 1, 4, 1, 0), (True, 64, 64, 1, 2, 4, 4, 0)
    monkeypatch.setattr(skinny_gemm_h200, "PLAIN", {(8, 256): {4: small, 6: None, 9: large}})

    tiles = pinned_tiles(8, 256)

    assert tiles == (None, *4 * [Tile(*small)], None, None, *3 * [Tile(*large)])


def test_a_shape_that_was_not_measured_takes_the_nearest_tiles_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, wide = (False, 2, 512, 1, 1, 4, 1, 0), (True, 64, 64, 1, 4, 4, 4, 0)
    table = {(1000, 512): {4: small, 8: wide}, (3000, 512): {8: small}}
    monkeypatch.setattr(skinny_gemm_h200, "PLAIN", table)
    monkeypatch.setattr(skinny_gemm_h200, "GATED", {})

    assert pinned_tiles(1500, 600) == (None, *4 * [Tile(*small)], *4 * [Tile(*wide)])
    assert pinned_tiles(1900, 512) == (None, *8 * [Tile(*small)])  # the other is nearer
    assert pinned_tiles(1000, 512)[8] == Tile(*wide)
    monkeypatch.setattr(skinny_gemm_h200, "PLAIN", {(1000, 512): {64: small}})
    assert (len(pinned_tiles(1000, 512)), len(pinned_tiles(1000, 500))) == (65, 33)
    # Four parts of K would leave some without a turn, and the vector form's turn is cut short.
    monkeypatch.setattr(skinny_gemm_h200, "PLAIN", {(1000, 512): {4: small, 8: wide}})
    assert pinned_tiles(1000, 256)[4:] == (Tile(*small), *4 * [Tile(*wide)])
    monkeypatch.setattr(skinny_gemm_h200, "PLAIN", {(1000, 256): {4: small, 8: wide}})
    assert pinned_tiles(1000, 255)[8] is None
    assert pinned_tiles(1000, 700) == pinned_tiles(400, 256) == ()
    assert pinned_tiles(1000, 256, gated=True) == ()


def test_only_a_measured_gpu_has_tiles() -> None:
    assert tiles_by_rows(torch.empty(4096, 4096, dtype=torch.bfloat16)) == ()
