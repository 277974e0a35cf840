"""int8 weights on the CPU, made from a float checkpoint while it loads.

Each output channel of a weight is stored as int8 with one scale, -127 to 127. Each row of
activations gets a scale of its own at every product, from its largest magnitude, and is stored as
unsigned bytes around the one that stands for zero, as the processors' byte products want them.
Products are added up in int32, without rounding, and nothing of a row depends on its mates:
results are bit for bit the same in any batch, so this goes together with ``--deterministic``.

Every linear layer is quantized, the language-model head too; the embedding stays as it is.

Measured with torch 2.13 (oneDNN), two threads, microseconds at 1 / 8 / 128 rows, scales included:
weight [4096, 1024] 120 / 140 / 560 against 209 / 218 / 606 for packed bfloat16; [640, 384], which
fits the cache, 52 / 58 / 150 against 30 / 31 / 64, since the scales alone take 15. So int8 is for
models whose weights come from memory. The relative error of a product is 1 % (bfloat16: 0.3 %).

torch's older ``quantized::linear_dynamic`` has one scale for all rows, and tensors of type qint8,
which are deprecated; ``aten::_weight_int8pack_mm`` is twice as fast at one row of a small weight,
and three times slower than bfloat16 from eight rows on.

Shapes: T packed tokens, K input features, N output features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from executor.layers import gpu_linear
from executor.layers.cpu_linear import WIDEST_TILE, Run, in_tiles
from executor.layers.linear import Linear, UnquantizedLinearMethod
from ipc.errors import ConfigError

_MAX_WEIGHT = 127.0


@dataclass(frozen=True, slots=True)
class Int8LinearMethod:
    """Loads like a dense layer; keeps int8 weights and a scale per output channel."""

    def create_weights(self, layer: Linear, dtype: torch.dtype) -> None:
        """The float weight that the loader fills, and a bias where the layer has one."""
        UnquantizedLinearMethod().create_weights(layer, dtype)

    def finish_loading(self, layer: Linear) -> Run:
        """Quantize the loaded weight and let it go."""
        weight = layer.weight
        assert weight is not None, "the weight was already quantized"
        layer.weight = None
        layer.packed_bytes = quantized_bytes(weight)
        return quantize(weight.data, layer.run_bias(), layer.out_dtype)

    def finish_gated(self, layer: Linear, activation: int) -> Run:
        """The product, then the activation."""
        product, gate = self.finish_loading(layer), gpu_linear.GATES[activation]
        return lambda x: gate(product(x))


def finish_when_filled(model: nn.Module, device: torch.device) -> Callable[[str], None]:
    """A function that is told of each filled parameter, and finishes layers that have all theirs.

    So a model's float weights are never in memory together.
    """
    missing = {
        path: {name for name, _ in layer.named_parameters(recurse=False)}
        for path, layer in model.named_modules()
        if isinstance(layer, Linear) and layer.weight is not None  # a tied head has to wait
    }

    def on_filled(parameter: str) -> None:
        path, _, name = parameter.rpartition(".")
        if path not in missing:
            return
        missing[path].remove(name)
        if not missing[path]:
            layer = model.get_submodule(path)
            assert isinstance(layer, Linear)
            layer.finish_loading(device)

    return on_filled


def quantized_bytes(weight: Tensor) -> int:
    """What ``weight`` [N, K] takes once quantized."""
    return weight.numel() + 4 * weight.shape[0]


def quantize(weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None = None) -> Run:
    """A function [T, K] -> [T, N] for ``weight`` [N, K], which the caller may then let go.

    Args:
        out_dtype: of what the function returns; None: as its input.
    """
    values, scales = quantize_weight(weight)
    zero = _zero_byte()
    scales = scales / (zero - 1)  # a row's own scale is then its largest magnitude
    middle = torch.tensor(zero + 0.5)  # bytes are cut off, so a half more rounds to the nearest
    most = torch.tensor(zero - 1.0)
    multiply = _byte_product(values, scales)
    added = None if bias is None else bias.float()

    def run(x: Tensor) -> Tensor:
        rows = x.float()
        largest = rows.abs().amax(1, keepdim=True)  # [T, 1]
        data = torch.addcmul(middle, rows, most / largest).to(torch.uint8)
        out = multiply(data, zero)
        # A row of zeros has no scale: whatever bytes it got are multiplied by zero.
        out = out.mul_(largest) if added is None else torch.addcmul(added, out, largest)
        return out.to(x.dtype if out_dtype is None else out_dtype)

    return in_tiles(run, WIDEST_TILE)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [N, K] as int8 [N, K] and scales [N], float32, whose product is near it."""
    scales = weight.abs().amax(1).float() / _MAX_WEIGHT
    divisors = torch.where(scales > 0, scales, 1.0).to(torch.float32)
    values = (weight.float() / divisors.unsqueeze(1)).round_().to(torch.int8)
    return values, scales


def check_supported(device: torch.device) -> None:
    """Refuse what int8 weights cannot run on.

    Raises:
        ConfigError: not a CPU, or a torch without oneDNN.
    """
    if device.type != "cpu":
        raise ConfigError(f"--quantization int8 runs on the CPU only, not on {device.type}")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise ConfigError("--quantization int8 needs a torch that was built with oneDNN")


def _byte_product(values: Tensor, scales: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A function of bytes [T, K] and the byte that stands for zero: times int8 [N, K], scaled."""
    packed = torch.ops.onednn.qlinear_prepack(values, None)
    no_offsets = torch.zeros(len(scales), dtype=torch.int32)
    multiply = torch.ops.onednn.qlinear_pointwise.default
    no_arguments: list[float] = []
    as_float = (
        None,
        1.0,
        0,
        torch.float32,
        "none",
        no_arguments,
        "",
    )  # no bias, nothing after the product

    def product(data: Tensor, zero: int) -> Tensor:
        out: Tensor = multiply(data, 1.0, zero, packed, scales, no_offsets, *as_float)
        return out

    return product


@functools.cache
def _zero_byte() -> int:
    """The byte that stands for zero in a row: 128, or 64 where the processor would saturate.

    Without VNNI, two neighbouring products are added in 16 bits, where 2 * 255 * 127 does not fit
    and 2 * 127 * 127 does. Found by trying: oneDNN does not say which routine it takes.
    """
    product = _byte_product(torch.full((64, 64), 127, dtype=torch.int8), torch.ones(64))
    out = product(torch.full((64, 64), 255, dtype=torch.uint8), 128)
    return 128 if bool((out == 64 * 127 * 127).all()) else 64
