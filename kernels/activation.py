"""Gated activations: y = act(gate) * up, where x = [gate | up] side by side.

Shapes: T tokens, I intermediate size. Arithmetic is float32 whatever the input is. Where torch does
it on a CPU, act(gate) is rounded to the input's dtype before the product, as Hugging Face's models
have it: that spares two of four passes.
Sources: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202; Hendrycks and Gimpel,
"Gaussian Error Linear Units", arXiv:1606.08415 (also the tanh approximation).
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpu_library, dependent_launch

SILU, GELU, GELU_TANH = 0, 1, 2  # the kernel's constants; see ``_act``
_BLOCK_I = 1024


def silu_and_mul(x: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, I] in x's dtype, for ``x`` = [gate | up], [T, 2I].

    Raises:
        ValueError: x is not a contiguous [T, 2I].
    """
    _check(x)
    if x.is_cuda:
        return gated_triton(x, SILU)
    if (library := cpu_library.library_for(x)) is not None:
        y = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype)
        T, I = y.shape  # noqa: E741
        library.silu_and_mul(x.data_ptr(), y.data_ptr(), T, I, torch.get_num_threads())
        return y
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul(x: Tensor, *, tanh: bool) -> Tensor:
    """Return gelu(gate) * up, [T, I] in x's dtype; ``tanh`` picks the tanh approximation.

    Raises:
        ValueError: x is not a contiguous [T, 2I].
    """
    _check(x)
    if x.is_cuda:
        return gated_triton(x, GELU_TANH if tanh else GELU)
    gate, up = x.chunk(2, dim=-1)
    approximate = "tanh" if tanh else "none"
    return F.gelu(gate, approximate=approximate).mul_(up)


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """The definition, from the formula."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)


def gelu_and_mul_reference(x: Tensor, *, tanh: bool) -> Tensor:
    """The definition, from the formulas."""
    gate, up = x.float().chunk(2, dim=-1)
    if tanh:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(x.dtype)
    return (0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up).to(x.dtype)


def gated_triton(x: Tensor, activation: int) -> Tensor:
    """Launch the kernel: one program for up to 1024 columns of a row."""
    T, I = x.shape[0], x.shape[1] // 2  # noqa: E741
    y = torch.empty((T, I), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block = min(_BLOCK_I, triton.next_power_of_2(I))
    _gated_kernel[(T, triton.cdiv(I, block))](
        x,
        y,
        I,
        ACTIVATION=activation,
        BLOCK_I=block,
        num_warps=max(1, block // 256),  # a thread holds 8 values of bfloat16: one load
        **dependent_launch.options(),
    )
    return y


def _check(x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] % 2 or x.shape[1] == 0 or not x.is_contiguous():
        raise ValueError(f"x must be a contiguous [T, 2I], not {x.shape}, strides {x.stride()}")


@triton.jit
def _act(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == 0:
        y = x * tl.sigmoid(x)
    elif ACTIVATION == 1:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # tanh(z) = 2 sigmoid(2z) - 1, so (1 + tanh(z)) / 2 = sigmoid(2z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    I,  # noqa: E741
    ACTIVATION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)  # int64: T * 2I may pass 2**31
    cols = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = cols < I
    gate = tl.load(x_ptr + row * 2 * I + cols, mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * I + I + cols, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * I + cols, _act(gate, ACTIVATION) * up, mask)
