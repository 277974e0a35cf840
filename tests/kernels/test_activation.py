"""Gated activations: the definitions against torch, then both paths against them."""

import pytest
import torch
import torch.nn.functional as F

from kernels import activation
from tests.kernels.cases import DTYPES, assert_close, random

# exp(-x) of a large negative x is infinite, and 1 / (1 + inf) the 0 that is meant; numpy, which
# stands in for the GPU, remarks on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.usefixtures("cpu_path"),
]

CASES = [
    pytest.param(activation.SILU, id="silu"),
    pytest.param(activation.GELU, id="gelu"),
    pytest.param(activation.GELU_TANH, id="gelu-tanh"),
]


def reference(x: torch.Tensor, act: int) -> torch.Tensor:
    if act == activation.SILU:
        return activation.silu_and_mul_reference(x)
    return activation.gelu_and_mul_reference(x, tanh=act == activation.GELU_TANH)


def wrapper(x: torch.Tensor, act: int) -> torch.Tensor:
    if act == activation.SILU:
        return activation.silu_and_mul(x)
    return activation.gelu_and_mul(x, tanh=act == activation.GELU_TANH)


@pytest.mark.parametrize("act", CASES)
def test_definition_agrees_with_torch(act: int) -> None:
    x = random(3, 20)
    gate, up = x.chunk(2, dim=1)
    expected = {
        activation.SILU: F.silu(gate),
        activation.GELU: F.gelu(gate),
        activation.GELU_TANH: F.gelu(gate, approximate="tanh"),
    }[act]

    assert_close(reference(x, act), expected * up)


@pytest.mark.parametrize("act", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [wrapper, activation.gated_triton])
def test_both_paths_equal_the_definition(run, act: int, dtype: torch.dtype) -> None:
    for shape in ((3, 14), (2, 2060), (0, 6)):
        x = random(*shape, dtype=dtype) * 4
        x[:1, :2] = torch.tensor([90.0, -90.0])  # where exp is clamped

        assert_close(run(x, act), reference(x, act))


@pytest.mark.parametrize("x", [random(3, 5), random(3), random(3, 0), random(6, 4).t()])
def test_what_is_not_a_gate_beside_its_values_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\[T, 2I\]"):
        activation.silu_and_mul(x)
    with pytest.raises(ValueError, match=r"\[T, 2I\]"):
        activation.gelu_and_mul(x, tanh=True)
