"""Linear layers: they own how a weight is cut across ranks, and delegate the arithmetic.

``Column`` layers split the output features, ``Row`` layers the input features, which ends in the
one all-reduce of a block. Merged layers lay several checkpoint weights end to end, so that a step
runs one product for q, k and v, and one for gate and up. A ``LinearMethod`` stores the weight and
multiplies: unquantized here, others beside it. Layers know nothing of checkpoints' names.
Shapes: T packed tokens, K input features, N output features, both local to the rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from executor.layers import gpu_linear
from executor.layers.cpu_linear import Run, fixed_tiles, pack
from executor.layers.sharding import Part, Sharding
from executor.parallel import TensorParallel

# On a GPU a fixed number of rows means a fixed algorithm; up to here decode is bound by memory.
_GPU_TILE = 64


class LinearMethod(Protocol):
    """How a linear layer stores its weight and multiplies by it."""

    def create_weights(self, layer: "Linear", dtype: torch.dtype) -> None:
        """Give ``layer`` the parameters that the loader will fill."""

    def finish_loading(self, layer: "Linear") -> Run:
        """Bring the loaded weights into their final form; return the product [T, K] -> [T, N]."""

    def finish_gated(self, layer: "Linear", activation: int) -> Run:
        """The same for gate and up weights: return act(gate) * up, [T, K] -> [T, N / 2]."""


@dataclass(frozen=True, slots=True)
class UnquantizedLinearMethod:
    """A dense weight [N, K] in the model's dtype. On a CPU it is repacked once loaded."""

    deterministic: bool = False

    def create_weights(self, layer: "Linear", dtype: torch.dtype) -> None:
        """One weight, and a bias where the layer has one."""
        layer.weight = nn.Parameter(
            torch.empty(layer.out_features, layer.in_features, dtype=dtype), requires_grad=False
        )
        if layer.has_bias:
            layer.bias = nn.Parameter(
                torch.empty(layer.out_features, dtype=dtype), requires_grad=False
            )

    def finish_loading(self, layer: "Linear") -> Run:
        """Choose the form; a CPU's packed copy takes the place of the loaded weight."""
        weight, bias = layer.weight, layer.run_bias()
        assert weight is not None, "the weight was already packed"
        if weight.device.type == "cpu":
            layer.weight, layer.packed_bytes = None, weight.nbytes
            return pack(weight.data, bias, deterministic=self.deterministic)

        if self.deterministic:
            return fixed_tiles(lambda x: nn.functional.linear(x, weight, bias), _GPU_TILE)
        return gpu_linear.dense(weight, bias, layer.out_dtype)

    def finish_gated(self, layer: "Linear", activation: int) -> Run:
        """One kernel where the GPU has one for it; else the product, then the activation."""
        weight = layer.weight
        assert weight is not None, "the weight was already packed"
        if weight.device.type != "cpu" and not self.deterministic:
            return gpu_linear.gated(weight, layer.run_bias(), activation)
        product, gate = self.finish_loading(layer), gpu_linear.GATES[activation]
        return lambda x: gate(product(x))


@dataclass(frozen=True, slots=True)
class LayerFactory:
    """What every layer is built with: the rank's place, the dtype and the linear method."""

    tp: TensorParallel
    dtype: torch.dtype
    linear_method: LinearMethod
    deterministic: bool = False  # the same result to the bit in any batch


class Linear(nn.Module):
    """What linear layers share: local sizes, the parameters, the product."""

    def __init__(
        self, in_features: int, out_features: int, factory: LayerFactory, *, bias: bool
    ) -> None:
        super().__init__()
        self.in_features = in_features  # on this rank
        self.out_features = out_features
        self.has_bias = bias
        self.out_dtype: torch.dtype | None = None  # of what is returned; None: the input's
        self.tp = factory.tp
        self.sharding: dict[str, Sharding] = {}
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.packed_bytes = 0  # of a weight that was packed, and so is no parameter any more
        self.method = factory.linear_method
        self.method.create_weights(self, factory.dtype)
        self.run: Run = _not_loaded

    def run_bias(self) -> Tensor | None:
        """The bias that belongs inside the product."""
        return self.bias

    def finish_loading(self, device: torch.device) -> None:
        """Called once, when every parameter holds its final values."""
        self.run = self.method.finish_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        return self.run(x)


class ReplicatedLinear(Linear):
    """The whole weight on every rank."""

    def __init__(
        self, in_features: int, out_features: int, factory: LayerFactory, *, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, factory, bias=bias)


class ColumnParallelLinear(Linear):
    """One or more weights side by side, output features split; each rank keeps its own outputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        factory: LayerFactory,
        *,
        bias: bool = False,
    ) -> None:
        sizes = [out_features] if isinstance(out_features, int) else list(out_features)
        tp = factory.tp
        parts = tuple(
            Part(full=size, start=tp.rank * tp.split(size), length=tp.split(size)) for size in sizes
        )
        super().__init__(in_features, sum(p.length for p in parts), factory, bias=bias)
        self.sharding = {name: Sharding(0, parts) for name in ("weight", "bias")}


class GatedLinear(ColumnParallelLinear):
    """Gate and up weights side by side, and what they are multiplied for: act(gate) * up."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: int,
        factory: LayerFactory,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, [out_features, out_features], factory, bias=bias)
        self.activation = activation  # SILU, GELU or GELU_TANH of kernels.activation

    def finish_loading(self, device: torch.device) -> None:
        """Called once, when every parameter holds its final values."""
        self.run = self.method.finish_gated(self, self.activation)


class QKVParallelLinear(Linear):
    """Query, key and value projections side by side, split by heads.

    With fewer key/value heads than ranks, ranks in a row hold copies of the same head.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        factory: LayerFactory,
        *,
        bias: bool = False,
    ) -> None:
        tp = factory.tp
        q_size = tp.split(num_heads) * head_dim
        kv_size = tp.split_kv_heads(num_kv_heads) * head_dim
        kv = Part(num_kv_heads * head_dim, tp.kv_head_start(num_kv_heads) * head_dim, kv_size)
        parts = (Part(num_heads * head_dim, tp.rank * q_size, q_size), kv, kv)
        super().__init__(in_features, q_size + 2 * kv_size, factory, bias=bias)
        self.sharding = {name: Sharding(0, parts) for name in ("weight", "bias")}


class RowParallelLinear(Linear):
    """Input features split; the ranks' partial sums are added up. The bias is added once."""

    def __init__(
        self, in_features: int, out_features: int, factory: LayerFactory, *, bias: bool = False
    ) -> None:
        tp = factory.tp
        local = tp.split(in_features)
        super().__init__(local, out_features, factory, bias=bias)
        part = Part(full=in_features, start=tp.rank * local, length=local)
        self.sharding = {"weight": Sharding(1, (part,))}

    def run_bias(self) -> Tensor | None:
        """Only rank 0 adds it, or the sum would hold it once per rank."""
        return self.bias if self.tp.rank == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], summed over the group."""
        return self.tp.all_reduce(self.run(x))


def _not_loaded(x: Tensor) -> Tensor:
    raise RuntimeError("a linear layer was called before its weights were loaded")
