"""Feed-forward layers: gated (gate and up in one product) and plain.

Shapes: T packed tokens, H hidden size, I intermediate size on this rank.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from executor.layers.linear import (
    ColumnParallelLinear,
    GatedLinear,
    LayerFactory,
    RowParallelLinear,
)
from ipc.errors import ConfigError
from kernels.activation import GELU, GELU_TANH, SILU

T = TypeVar("T")

_GATED = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        factory: LayerFactory,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(
            hidden_size, intermediate_size, _pick(_GATED, activation), factory, bias=bias
        )
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, factory, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], summed over the group."""
        return self.down_proj.forward(self.gate_up_proj.forward(x))


class MLP(nn.Module):
    """down(act(up(x))), with biases as the older models have them."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        factory: LayerFactory,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, factory, bias=bias)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, factory, bias=bias)
        self.act = _pick(_PLAIN, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], summed over the group."""
        return self.down_proj(self.act(self.up_proj(x)))


def _pick(table: dict[str, T], activation: str) -> T:
    if activation not in table:
        raise ConfigError(
            f"the activation {activation!r} of config.json is not known; "
            f"known are {', '.join(table)}"
        )
    return table[activation]
