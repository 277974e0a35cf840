"""Products on a GPU: the number of rows picks the kernel. Interpreted here, on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from executor.layers import gpu_linear
from kernels.activation import GELU, GELU_TANH, SILU
from kernels.skinny_gemm import Tile

VECTOR = Tile(False, 2, 32, 1, 1, 4, 1, 0)
DOT = Tile(True, 16, 32, 1, 1, 4, 3, 0)


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(12, 64, dtype=torch.float16) / 8
    return torch.randn(5, 64, dtype=torch.float16), weight, torch.randn(12, dtype=torch.float16)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """One to three rows have tiles, two rows are left to cuBLAS; the list tells which tiles ran."""
    tiles = (None, VECTOR, None, DOT)
    used: list[Tile] = []
    monkeypatch.setattr(gpu_linear, "tiles_by_rows", lambda weight, gated=False: tiles)
    for name in ("skinny_linear", "skinny_gated"):
        kernel = getattr(gpu_linear, name)

        def recorded(*args: object, tile: Tile, kernel=kernel, **options: object) -> Tensor:
            used.append(tile)
            return kernel(*args, tile=tile, **options)

        monkeypatch.setattr(gpu_linear, name, recorded)
    return used


def test_the_number_of_rows_picks_the_kernel(seen: list[Tile]) -> None:
    x, weight, bias = case()
    run = gpu_linear.dense(weight, bias)

    for rows in (1, 2, 3, 4, 5):
        expected = F.linear(x[:rows], weight, bias)
        torch.testing.assert_close(run(x[:rows]), expected, atol=4e-3, rtol=4e-3)

    assert seen == [VECTOR, DOT]


def test_rows_that_are_not_contiguous_are_made_so(seen: list[Tile]) -> None:
    x, weight, _ = case()
    columns = x.t().contiguous().t()[:3]

    y = gpu_linear.dense(weight, None)(columns)

    torch.testing.assert_close(y, F.linear(columns, weight), atol=4e-3, rtol=4e-3)
    assert seen == [DOT]


def test_logits_come_out_in_float32_without_being_rounded_before(seen: list[Tile]) -> None:
    x, weight, bias = case()

    y = gpu_linear.dense(weight, bias, torch.float32)(x[:1])

    expected = F.linear(x[:1].float(), weight.float(), bias.float())
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "act"),
    [
        pytest.param(SILU, F.silu, id="silu"),
        pytest.param(GELU, F.gelu, id="gelu"),
        pytest.param(GELU_TANH, lambda x: F.gelu(x, approximate="tanh"), id="gelu-tanh"),
    ],
)
def test_gate_and_up_are_joined_by_every_kernel(seen: list[Tile], activation: int, act) -> None:
    x, weight, bias = case()
    run = gpu_linear.gated(weight, bias, activation)

    for rows in (1, 2, 3, 4):
        gate, up = F.linear(x[:rows].float(), weight.float(), bias.float()).chunk(2, dim=1)
        expected = (act(gate) * up).half()
        torch.testing.assert_close(run(x[:rows]), expected, atol=8e-3, rtol=8e-3)

    assert seen == [VECTOR, DOT]


def test_without_tiles_everything_is_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu_linear, "skinny_linear")  # a call would fail
    monkeypatch.delattr(gpu_linear, "skinny_gated")
    x, weight, bias = case()

    assert gpu_linear.dense(weight, bias)(x).equal(F.linear(x, weight, bias))
    assert gpu_linear.gated(weight, None, SILU)(x).shape == (5, 6)
