"""Rotary position embedding of queries and keys.

Of each head the first R = rotary_dim values turn in pairs: value pair (a, b) at frequency j and
position p becomes (a cos - b sin, b cos + a sin) with cos = cos[p, j]; the rest passes through.
Pairs are (j, j + R/2), or with ``interleaved`` (2j, 2j + 1). Arithmetic is float32.
Shapes: T tokens, N query heads, K key heads, D head size, P positions in the tables.

On a GPU the rotation is part of ``kernels.qkv_rope_store``.
Source: Su et al., "RoFormer", arXiv:2104.09864. The half-split pairing is GPT-NeoX's.
"""

import torch
from torch import Tensor


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn all heads of ``x`` by rows that the caller gathered, once for all layers of a step.

    Two calls instead of eight, for a CPU, where a call costs more than a decode step's arithmetic;
    correct on every device. The pairs are (j, j + R/2).

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
