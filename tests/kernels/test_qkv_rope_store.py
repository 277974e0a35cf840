"""From the packed projection to queries and cache: the definition, then the kernel against it."""

import pytest
import torch
from torch import Tensor

from kernels.qkv_rope_store import (
    HeadNorm,
    Rotation,
    qkv_rope_store,
    qkv_rope_store_reference,
    qkv_rope_store_triton,
)
from kernels.rms_norm import rms_norm_reference
from kernels.rotary import apply_rotary_reference
from tests.kernels.cases import (
    DTYPES,
    QKV_SHAPES,
    assert_close,
    make_cache,
    make_head_norm,
    make_rotation,
    random,
)


def make_inputs(
    T: int, N: int, K: int, D: int, half: int, dtype: torch.dtype
) -> tuple[Tensor, HeadNorm, Rotation | None]:
    rotation = make_rotation(T, half) if half else None
    return random(T, (N + 2 * K) * D, dtype=dtype), make_head_norm(D, dtype), rotation


def test_definition_agrees_with_its_parts() -> None:
    qkv, norm, rotation = make_inputs(5, 4, 2, 16, 8, torch.float32)
    cache = make_cache(5, 2, 16, torch.float32)
    q, k, v = qkv.view(5, 8, 16).split((4, 2, 2), dim=1)
    assert rotation is not None
    normed_q = rms_norm_reference(q, norm.q_weight, norm.eps, norm.weight_offset)
    normed_k = rms_norm_reference(k, norm.k_weight, norm.eps, norm.weight_offset)
    turned = apply_rotary_reference(normed_q, normed_k, *rotation)

    out = qkv_rope_store(qkv, 4, cache, norm=norm, rotation=rotation)

    assert_close(out, turned[0])
    assert_close(cache.key.view(-1, 2, 16)[cache.slot_mapping], turned[1])
    assert cache.value.view(-1, 2, 16)[cache.slot_mapping].equal(v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N", "K", "D", "half"), QKV_SHAPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel_equals_definition(
    dtype: torch.dtype,
    T: int,
    N: int,
    K: int,
    D: int,
    half: int,
    has_norm: bool,
    interleaved: bool,
) -> None:
    qkv, norm, rotation = make_inputs(T, N, K, D, half, dtype)
    if rotation is not None:
        rotation = rotation._replace(interleaved=interleaved)
    optional = norm if has_norm else None
    cache, expected_cache = (make_cache(T, K, D, dtype) for _ in range(2))

    q = qkv_rope_store_triton(qkv, N, cache, optional, rotation)

    expected = qkv_rope_store_reference(qkv, N, expected_cache, optional, rotation)
    assert q.is_contiguous()
    assert_close(q, expected)
    assert_close(cache.key, expected_cache.key)
    assert cache.value.equal(expected_cache.value)


def test_rows_may_be_apart_and_padding_may_share_a_slot() -> None:
    wide = random(6, 200)
    qkv = wide[:, 8:136]  # N 4, K 2, D 16
    cache = make_cache(6, 2, 16, torch.float32)
    cache.slot_mapping[3:] = 0
    expected_cache = make_cache(6, 2, 16, torch.float32)

    q = qkv_rope_store_triton(qkv, 4, cache, None, None)

    assert q.equal(qkv.reshape(6, 8, 16)[:, :4])
    qkv_rope_store_reference(
        qkv[:3],
        4,
        expected_cache._replace(slot_mapping=expected_cache.slot_mapping[:3]),
        None,
        None,
    )
    assert cache.key[1:].equal(expected_cache.key[1:])
    assert cache.value[1:].equal(expected_cache.value[1:])


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    qkv, norm, rotation = make_inputs(3, 4, 2, 16, 8, torch.float32)
    cache = make_cache(3, 2, 16, torch.float32)
    assert rotation is not None
    with pytest.raises(ValueError, match=r"\(N \+ 2K\) \* D"):
        qkv_rope_store(qkv, 5, cache)
    with pytest.raises(ValueError, match="do not fit"):
        qkv_rope_store(qkv, 4, cache._replace(value=cache.value[1:]))
    with pytest.raises(ValueError, match="int64"):
        qkv_rope_store(qkv, 4, cache._replace(slot_mapping=cache.slot_mapping.int()))
    with pytest.raises(ValueError, match="norm's weight"):
        qkv_rope_store(qkv, 4, cache, norm=norm._replace(k_weight=norm.k_weight[1:]))
    with pytest.raises(ValueError, match="R <= 16"):
        qkv_rope_store(qkv, 4, cache, rotation=make_rotation(3, 9))
    with pytest.raises(ValueError, match=r"positions must be \[T\]"):
        qkv_rope_store(qkv, 4, cache, rotation=rotation._replace(positions=torch.arange(2)))
