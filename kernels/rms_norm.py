"""RMS normalisation, alone and fused with the residual add.

y = x / sqrt(mean(x ** 2) + eps) * (weight + weight_offset), and with a residual the same of
h = x + residual, which is returned too. Arithmetic is float32 whatever the inputs are.
Shapes: the norm runs over the last dimension, of size H; R rows are all the others together.
``weight_offset`` is 1 for models that store the weight's distance from one (Gemma).

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
"""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpu_library, dependent_launch
from kernels.cpu_library import address


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0) -> Tensor:
    """Return the norm of ``x``, contiguous and in x's dtype.

    Args:
        x: [..., H], at most three dimensions; the last must be contiguous, so heads sliced
            out of a packed projection need no copy.
        weight: [H], contiguous.

    Raises:
        ValueError: a shape, layout or device that the kernel cannot take. Checked on every
            device, so a CPU test catches what would be an illegal access on a GPU.
    """
    if not 1 <= x.ndim <= 3 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x must be [..., H] and weight [H]: {x.shape}, {weight.shape}")
    if x.stride(-1) != 1 or not weight.is_contiguous() or weight.device != x.device:
        raise ValueError("x must be contiguous in its last dimension, weight too, on one device")
    run = rms_norm_triton if x.is_cuda else rms_norm_cpu
    return run(x, weight, eps, weight_offset)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return ``(y, h)`` with h = x + residual and y its norm. The inputs are left as they are.

    The norm is taken of h before it is rounded to x's dtype. On a CPU h is not rounded at all: it
    comes back in float32, and may be the residual of the next call.

    Args:
        x, residual: [..., H], contiguous, of one shape and dtype; on a CPU the residual may be
            float32.
        weight: [H], contiguous.

    Raises:
        ValueError: a shape, layout or device that the kernel cannot take.
    """
    if x.ndim < 1 or x.shape[-1] == 0 or x.shape != residual.shape or weight.shape != x.shape[-1:]:
        raise ValueError(f"shapes differ: {x.shape}, {residual.shape}, {weight.shape}")
    if x.dtype != residual.dtype and (x.is_cuda or residual.dtype != torch.float32):
        raise ValueError(f"x is {x.dtype} and residual is {residual.dtype}")
    if not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()):
        raise ValueError("x, residual and weight must be contiguous")
    if not x.device == residual.device == weight.device:
        raise ValueError("x, residual and weight must be on one device")
    run = fused_add_rms_norm_triton if x.is_cuda else fused_add_rms_norm_cpu
    return run(x, residual, weight, eps, weight_offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """The definition: what the kernel and the CPU function are tested against."""
    h = x.float()
    inv_rms = torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (h * inv_rms * (weight.float() + weight_offset)).to(x.dtype)


def fused_add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """The definition of the fused form."""
    h = x.float() + residual.float()
    return rms_norm_reference(h, weight, eps, weight_offset).to(x.dtype), h.to(x.dtype)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """The CPU path: one compiled call, or torch's own composite."""
    if _is_compiled(x, None, weight, weight_offset):
        return _compiled(x, None, weight, eps)[0]
    scale = weight if weight_offset == 0.0 else weight.float() + weight_offset
    if x.dtype == scale.dtype == torch.float32:
        return F.rms_norm(x, scale.shape, scale, eps)
    return _norm_cpu(x.float(), scale, eps).to(x.dtype)


def fused_add_rms_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """The CPU path of the fused form; of 16-bit inputs h stays float32."""
    if x.dtype == torch.float32:
        h = x + residual
        return rms_norm_cpu(h, weight, eps, weight_offset), h
    if _is_compiled(x, residual, weight, weight_offset):
        return _compiled(x, residual, weight, eps)
    h = residual + x if residual.dtype == torch.float32 else x.float() + residual
    scale = weight if weight_offset == 0.0 else weight.float() + weight_offset
    return _norm_cpu(h, scale, eps).to(x.dtype), h


def _is_compiled(x: Tensor, residual: Tensor | None, weight: Tensor, weight_offset: float) -> bool:
    """Whether ``cpu_kernels.c`` has this form: weights as a layer on a CPU keeps them."""
    if weight_offset or weight.dtype is not torch.float32 or not x.is_contiguous():
        return False
    return cpu_library.library_for(x) is not None


def _compiled(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(y, h)``; without a residual h is x itself."""
    library = cpu_library.load()
    assert library is not None, "_is_compiled said so"
    H = x.shape[-1]
    y, h, wide, narrow = torch.empty_like(x), x, None, None
    if residual is not None:
        h = torch.empty(x.shape)
        wide, narrow = (residual, None) if residual.dtype is torch.float32 else (None, residual)
    library.add_rms_norm(
        x.data_ptr(),
        address(wide),
        address(narrow),
        weight.data_ptr(),
        y.data_ptr(),
        h.data_ptr(),
        x.numel() // H,
        H,
        eps,
        torch.get_num_threads(),
    )
    return y, h


def _norm_cpu(h: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The norm of ``h``, float32: half as long as torch's composite, and a third in long prompts.

    It sums squares without compensation, so float32 models keep the composite.
    """
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    inv_rms = torch.addcmul(_eps_tensor(eps), length, length, value=1 / h.shape[-1]).rsqrt_()
    return (h * inv_rms).mul_(scale)


@functools.cache
def _eps_tensor(eps: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((1,), eps)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Launch the kernel: one program for a long row, or for several short ones."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    H = x.shape[-1]
    if y.numel() == 0:
        return y
    R = y.numel() // H
    rows, num_warps = _shape_of_program(R, H)
    _rms_norm_kernel[(triton.cdiv(R, rows),)](
        x,
        weight,
        y,
        R,
        H,
        x.shape[-2] if x.ndim == 3 else 1,
        x.stride(0) if x.ndim > 1 else 0,
        x.stride(1) if x.ndim == 3 else 0,
        eps,
        weight_offset,
        ROWS=rows,
        BLOCK_H=triton.next_power_of_2(H),
        num_warps=num_warps,
        **dependent_launch.options(),
    )
    return y


def fused_add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """Launch the fused kernel: one program for a long row, or for several short ones."""
    y, h = torch.empty_like(x), torch.empty_like(x)
    H = x.shape[-1]
    if x.numel() == 0:
        return y, h
    R = x.numel() // H
    rows, num_warps = _shape_of_program(R, H)
    _fused_add_rms_norm_kernel[(triton.cdiv(R, rows),)](
        x,
        residual,
        weight,
        y,
        h,
        R,
        H,
        eps,
        weight_offset,
        ROWS=rows,
        BLOCK_H=triton.next_power_of_2(H),
        num_warps=num_warps,
        **dependent_launch.options(),
    )
    return y, h


def _shape_of_program(R: int, H: int) -> tuple[int, int]:
    """Rows and warps of a program: a thread holds 8 values of bfloat16, which is one load."""
    block_h = triton.next_power_of_2(H)
    rows = max(1, 1024 // block_h) if R > 256 else 1
    return rows, min(16, max(1, rows * block_h // 256))


@triton.jit(do_not_specialize=["R"])
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    y_ptr,
    R,
    H,
    inner,
    outer_stride,
    inner_stride,
    eps,
    weight_offset,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    # int64: rows * H may pass 2**31
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < R) & (cols < H)
    weight = tl.load(weight_ptr + cols, cols < H, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_row = x_ptr + (row // inner) * outer_stride + (row % inner) * inner_stride
    x = tl.load(x_row + cols, mask, other=0.0).to(tl.float32)
    inv_rms = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / H + eps)
    tl.store(y_ptr + row * H + cols, x * inv_rms * weight, mask)


@triton.jit(do_not_specialize=["R"])
def _fused_add_rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    R,
    H,
    eps,
    weight_offset,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    # int64: rows * H may pass 2**31
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < R) & (cols < H)
    weight = tl.load(weight_ptr + cols, cols < H, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = row * H + cols
    h = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    h += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
    inv_rms = 1.0 / tl.sqrt(tl.sum(h * h, axis=1)[:, None] / H + eps)
    tl.store(y_ptr + at, h * inv_rms * weight, mask)
    tl.store(h_ptr + at, h, mask)
