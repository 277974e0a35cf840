"""Products of a few rows on a GPU: right in odd shapes, and when kernels overlap in a graph."""

import pytest
import torch
from torch import Tensor

from executor.layers import gpu_linear
from kernels import activation, dependent_launch
from kernels.skinny_gemm import (
    Tile,
    arrival_counters,
    skinny_gated,
    skinny_gated_reference,
    skinny_linear,
    skinny_linear_reference,
)
from kernels.tuning import skinny_gemm_h200 as table_file
from tests.kernels.cases import assert_close, random

pytestmark = pytest.mark.gpu
# dot, block_n, block_k, slices, split_k, warps, stages, prefetch
SPLIT = Tile(True, 32, 256, 4, 2, 4, 3, 0)
TILES = [
    pytest.param(Tile(False, 2, 512, 1, 1, 4, 1, 1), id="vector"),
    pytest.param(Tile(False, 4, 512, 1, 1, 4, 3, 0), id="vector, staged"),
    pytest.param(Tile(True, 16, 256, 4, 1, 4, 4, 2), id="dot, sliced"),
    pytest.param(SPLIT, id="dot, sliced and split"),
    pytest.param(Tile(True, 64, 64, 1, 1, 4, 4, 0), id="dot"),
    pytest.param(Tile(True, 128, 64, 1, 4, 8, 4, 2), id="dot, split"),
]
SHAPES = [(1, 640, 1024), (5, 130, 1000), (8, 1024, 2048), (33, 258, 1160), (64, 384, 512)]


def case(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and bias on the GPU, whose results are about one."""
    x, weight = random(M, K, seed=1), random(N, K) / K**0.5
    return tuple(t.to(dtype).cuda() for t in (x, weight, random(N, seed=2)))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def device_without_a_pending_error() -> None:
    arrival_counters(torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.synchronize()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_product_equals_definition(M: int, N: int, K: int, tile: Tile) -> None:
    rows = M if tile.dot else min(M, 8)
    x, weight, bias = case(rows, N, K, torch.bfloat16)

    y = skinny_linear(x, weight, bias, tile=tile)

    assert_close(y, skinny_linear_reference(x, weight, bias))
    assert not arrival_counters(x.device).any()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
def test_float16_and_results_in_float32(tile: Tile, out_dtype: torch.dtype) -> None:
    x, weight, _ = case(3, 200, 1024, torch.float16)

    y = skinny_linear(x, weight, out_dtype=out_dtype, tile=tile)

    assert_close(y, skinny_linear_reference(x, weight, None, out_dtype))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(activation.SILU, id="silu"),
        pytest.param(activation.GELU, id="gelu"),
        pytest.param(activation.GELU_TANH, id="gelu-tanh"),
    ],
)
def test_gated_product_equals_definition(act: int, tile: Tile) -> None:
    x, weight, bias = case(7, 258, 1000, torch.bfloat16)

    y = skinny_gated(x, weight, bias, activation=act, tile=tile)

    assert_close(y, skinny_gated_reference(x, weight, bias, act))


@pytest.mark.parametrize("with_dependent_launch", [True, False])
@pytest.mark.parametrize("M", [1, 7, 40])
def test_a_chain_of_products_replays_in_a_graph(M: int, with_dependent_launch: bool) -> None:
    first_form = Tile(False, 2, 512, 1, 1, 4, 1, 1) if M == 1 else SPLIT
    split = Tile(True, 64, 64, 1, 4, 4, 4, 0)
    weights = [(random(1024, 1024, seed=i) / 32).bfloat16().cuda() for i in range(12)]
    gate_up = (random(2048, 1024, seed=20) / 32).bfloat16().cuda()
    x = random(M, 1024, seed=21).bfloat16().cuda()

    def run() -> Tensor:
        y = x
        for weight in weights:
            y = skinny_linear(y, weight, tile=first_form)
            y = skinny_linear(y, weight, tile=split)
            y = skinny_gated(y, gate_up, activation=activation.SILU, tile=split)
            y = skinny_gated(y, gate_up, activation=activation.SILU, tile=first_form)
            y = torch.nn.functional.rms_norm(y, (1024,))  # or it would vanish
        return y

    dependent_launch.switch(with_dependent_launch)
    try:
        first = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for seed in range(30):
            x.copy_(random(M, 1024, seed=seed + 40))
            expected = run()
            torch.cuda.synchronize()
            graph.replay()
            assert expected.isfinite().all()
            assert captured.equal(expected), f"replay {seed}"
        assert not captured.equal(first)
    finally:
        dependent_launch.switch(True)


def test_rows_do_not_depend_on_the_values_of_their_mates() -> None:
    x, weight, _ = case(16, 1024, 1024, torch.bfloat16)
    other = x.clone()
    other[1:] = 3.0
    for tile in (Tile(True, 16, 256, 4, 1, 4, 4, 2), Tile(True, 64, 64, 1, 4, 4, 4, 0)):
        first, second = (skinny_linear(rows, weight, tile=tile)[0] for rows in (x, other))
        assert first.equal(second)


def pinned() -> list[object]:
    """Every shape of the tables."""
    return [
        pytest.param(kind == "gated", N, K, entries, id=f"{kind} {N}x{K}")
        for kind, table in (("plain", table_file.PLAIN), ("gated", table_file.GATED))
        for (N, K), entries in table.items()
    ]


@pytest.mark.parametrize(("gated", "N", "K", "entries"), pinned())
def test_what_a_layer_runs_is_right_for_every_pinned_tile(
    gated: bool, N: int, K: int, entries: dict[int, object]
) -> None:
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5
    run = (
        gpu_linear.gated(weight, None, activation.SILU) if gated else gpu_linear.dense(weight, None)
    )

    for rows in entries:
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
        y = run(x).float()
        expected = skinny_linear_reference(x, weight, out_dtype=torch.float32)
        if gated:
            gate, up = expected.chunk(2, dim=1)
            expected = torch.nn.functional.silu(gate) * up
        assert (y - expected).norm() < 5e-3 * expected.norm(), f"{rows} rows"
        assert y.bfloat16().equal(run(x)), f"{rows} rows: not the same twice"


@pytest.mark.parametrize("rows", [1, 8, 40, 300])
def test_logits_are_not_rounded_to_16_bits(rows: int) -> None:
    weight = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16) / 32
    bias = torch.randn(8192, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)

    y = gpu_linear.dense(weight, bias, torch.float32)(x)

    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (y - expected).norm() < 1e-4 * expected.norm()
