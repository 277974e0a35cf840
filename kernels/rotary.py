"""Rotary position embedding of queries and keys.

Of each head the first R = rotary_dim values turn in pairs: value pair (a, b) at frequency j and
position p becomes (a cos - b sin, b cos + a sin) with cos = cos[p, j]; the rest passes through.
Pairs are (j, j + R/2), or with ``interleaved`` (2j, 2j + 1). Arithmetic is float32.
Shapes: T tokens, N query heads, K key heads, D head size, P positions in the tables.

Source: Su et al., "RoFormer", arXiv:2104.09864. The half-split pairing is GPT-NeoX's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def apply_rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the turned ``(q, k)`` in their dtypes; the inputs are left as they are.

    The results are contiguous within a token. On the CPU they may be two slices of one tensor.

    Args:
        q, k: [T, N, D] and [T, K, D], contiguous within a token: slices of a packed projection
            are fine.
        cos, sin: [P, R/2] float32, contiguous, R <= D.
        positions: [T] integers in [0, P).

    Raises:
        ValueError: a shape, layout, dtype or device that the kernel cannot take.
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q must be [T, N, D] and k [T, K, D]: {q.shape}, {k.shape}")
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} and k is {k.dtype}")
    if cos.ndim != 2 or cos.shape != sin.shape or not 0 < 2 * cos.shape[1] <= q.shape[2]:
        raise ValueError(f"cos and sin must be [P, R/2], R <= D: {cos.shape}, {sin.shape}")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"cos and sin must be float32, not {cos.dtype}, {sin.dtype}")
    if positions.shape != q.shape[:1] or positions.is_floating_point():
        raise ValueError(f"positions must be [T] integers, not {positions.shape}")
    if any(t.stride()[1:] != (t.shape[2], 1) for t in (q, k) if t.numel()):
        raise ValueError(f"a token's q and k must be contiguous: {q.stride()}, {k.stride()}")
    if not all(t.is_contiguous() for t in (cos, sin, positions)):
        raise ValueError("cos, sin and positions must be contiguous")
    if any(t.device != q.device for t in (k, cos, sin, positions)):
        raise ValueError("all tensors must be on one device")
    run = apply_rotary_triton if q.is_cuda else apply_rotary_cpu
    return run(q, k, cos, sin, positions, interleaved)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn all heads of ``x`` by rows that the caller gathered, once for all layers of a step.

    Two calls instead of eight, for a CPU, where a call costs more than a decode step's arithmetic;
    correct on every device. ``apply_rotary`` is the definition; the pairs are (j, j + R/2).

    Args:
        x: [T, N, D], any strides.
        cos, sin: [T, 1, R] float32, R <= D: the rows of the tables from ``widen_tables``.
    """
    rotary_dim = cos.shape[-1]
    if x.ndim != 3 or cos.shape != (x.shape[0], 1, rotary_dim) or cos.shape != sin.shape:
        raise ValueError(f"x must be [T, N, D], cos and sin [T, 1, R]: {x.shape}, {cos.shape}")
    part = x if rotary_dim == x.shape[2] else x[..., :rotary_dim]
    if x.dtype != torch.float32:
        part = part.float()
    turned = (part * cos).addcmul_(part.roll(rotary_dim // 2, -1), sin)
    if x.dtype != torch.float32:
        turned = turned.to(x.dtype)
    if rotary_dim == x.shape[2]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def widen_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables [P, R/2] as ``rotate_heads`` wants them: [P, 1, R], the sign of each half included."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def apply_rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The definition, on strided views of the pairs."""
    half = cos.shape[1]
    c, s = cos[positions.long()].unsqueeze(1), sin[positions.long()].unsqueeze(1)  # [T, 1, R/2]
    turned = []
    for x in (q, k):
        y = x.float().clone()
        if interleaved:
            a, b = y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2]
        else:
            a, b = y[..., :half], y[..., half : 2 * half]
        new_a, new_b = a * c - b * s, b * c + a * s
        a.copy_(new_a)
        b.copy_(new_b)
        turned.append(y.to(x.dtype))
    return turned[0], turned[1]


def apply_rotary_cpu(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """The CPU path: few calls, as each costs more than the arithmetic of a decode step."""
    c, s = cos.index_select(0, positions), sin.index_select(0, positions)
    c, s = c.unsqueeze(1), s.unsqueeze(1)  # [T, 1, R/2]
    packed = _adjacent_heads(q, k)
    if packed is None:
        return _turn(q, c, s, interleaved), _turn(k, c, s, interleaved)
    turned = _turn(packed, c, s, interleaved)
    return turned[:, : q.shape[1]], turned[:, q.shape[1] :]


def _adjacent_heads(q: Tensor, k: Tensor) -> Tensor | None:
    """[T, N + K, D] over both, when k follows q in one packed projection; else None."""
    (T, N, D), K = q.shape, k.shape[1]
    if q.stride() != k.stride() or k.data_ptr() != q.data_ptr() + N * D * q.element_size():
        return None
    if q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    return q.as_strided((T, N + K, D), q.stride())


def _turn(x: Tensor, c: Tensor, s: Tensor, interleaved: bool) -> Tensor:
    half, D = c.shape[-1], x.shape[-1]
    source = x if x.dtype == torch.float32 else x.float()
    turning = source if 2 * half == D else source[..., : 2 * half]
    dim = -1 if interleaved else -2  # where the two of a pair lie side by side
    pairs = turning.view(*x.shape[:2], *((half, 2) if interleaved else (2, half)))
    y = pairs * c.unsqueeze(dim)
    (a, b), (y_a, y_b) = pairs.unbind(dim), y.unbind(dim)
    y_a.addcmul_(b, s, value=-1)
    y_b.addcmul_(a, s)
    y = y.reshape(turning.shape)
    if 2 * half < D:
        y = torch.cat((y, source[..., 2 * half :]), dim=-1)
    return y.to(x.dtype)


def apply_rotary_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program a token and head, queries first."""
    (T, N, D), K = q.shape, k.shape[1]
    q_out = torch.empty((T, N, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((T, K, D), dtype=k.dtype, device=k.device)
    if T == 0 or N + K == 0:
        return q_out, k_out
    half = cos.shape[1]
    _rotary_kernel[(T, N + K)](
        q,
        k,
        q_out,
        k_out,
        cos,
        sin,
        positions,
        q.stride(0),
        k.stride(0),
        N,
        K,
        D,
        half,
        INTERLEAVED=interleaved,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=0 if 2 * half == D else triton.next_power_of_2(D - 2 * half),
        num_warps=1,
    )
    return q_out, k_out


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_stride,
    k_stride,
    N,
    K,
    D,
    half,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # int64: T * N * D may pass 2**31
    head = tl.program_id(1)
    if head < N:
        x_ptr = q_ptr + t * q_stride + head * D
        y_ptr = q_out_ptr + (t * N + head) * D
    else:
        x_ptr = k_ptr + t * k_stride + (head - N) * D
        y_ptr = k_out_ptr + (t * K + head - N) * D
    position = tl.load(positions_ptr + t).to(tl.int64)
    j = tl.arange(0, BLOCK_HALF)
    mask = j < half
    c = tl.load(cos_ptr + position * half + j, mask, other=0.0)
    s = tl.load(sin_ptr + position * half + j, mask, other=0.0)
    if INTERLEAVED:
        a_cols = 2 * j
        b_cols = 2 * j + 1
    else:
        a_cols = j
        b_cols = j + half
    a = tl.load(x_ptr + a_cols, mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + b_cols, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + a_cols, a * c - b * s, mask)
    tl.store(y_ptr + b_cols, b * c + a * s, mask)
    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)
        x = tl.load(x_ptr + rest, rest < D, other=0.0).to(tl.float32)
        tl.store(y_ptr + rest, x, rest < D)
