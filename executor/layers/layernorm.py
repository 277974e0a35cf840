"""Normalisation layers. The arithmetic of RMSNorm is in ``kernels.rms_norm``.

Shapes: T packed tokens, H the normalised size (hidden size, or head size for QK norms).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from executor.layers.linear import LayerFactory
from kernels.rms_norm import fused_add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + weight_offset), the same on every rank."""

    def __init__(
        self, size: int, eps: float, factory: LayerFactory, *, weight_offset: float = 0.0
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.empty(size, dtype=factory.dtype), requires_grad=False)

    def finish_loading(self, device: torch.device) -> None:
        """On a CPU, keep the weight as the arithmetic wants it: float32, the offset added.

        The kernel does both in each call otherwise; the result is the same to the bit.
        """
        if device.type == "cpu":
            self.weight.data = self.weight.data.float() + self.weight_offset
            self.weight_offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return rms_norm(x, self.weight, self.eps, weight_offset=self.weight_offset)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)``; the first layer has no residual yet."""
        if residual is None:
            return self(x), x
        return fused_add_rms_norm(
            x, residual, self.weight, self.eps, weight_offset=self.weight_offset
        )


class LayerNorm(nn.Module):
    """Centred and scaled, with a bias; without weights where the model has none."""

    def __init__(
        self, size: int, eps: float, factory: LayerFactory, *, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(size, dtype=factory.dtype), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(size, dtype=factory.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
