"""Rotary embedding: the definition against complex numbers, then both paths against it."""

import pytest
import torch

from kernels import rotary
from tests.kernels.cases import DTYPES, assert_close, packed_qkv, random


def tables(num_positions: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(num_positions).unsqueeze(1) * 0.5 ** torch.arange(half)
    return angles.cos(), angles.sin()


def test_definition_turns_pairs_as_complex_numbers() -> None:
    q, k = random(3, 2, 8), random(3, 1, 8)
    cos, sin = tables(10, 4)
    positions = torch.tensor([9, 0, 4])
    turns = torch.complex(cos, sin)[positions].unsqueeze(1)

    interleaved, _ = rotary.apply_rotary_reference(q, k, cos, sin, positions, True)
    halves, _ = rotary.apply_rotary_reference(q, k, cos, sin, positions, False)

    pairs = torch.view_as_complex(q.unflatten(-1, (4, 2))) * turns
    assert_close(interleaved, torch.view_as_real(pairs).flatten(-2))
    pairs = torch.complex(q[..., :4], q[..., 4:]) * turns
    assert_close(halves, torch.cat((pairs.real, pairs.imag), dim=-1))


@pytest.mark.parametrize("run", [rotary.apply_rotary_cpu, rotary.apply_rotary_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [10, 6])  # the whole head, or a part that leaves a rest
def test_both_paths_equal_the_definition(
    run, dtype: torch.dtype, interleaved: bool, half: int
) -> None:
    cos, sin = tables(50, half)
    positions = torch.tensor([3, 49, 0, 17])
    packed = packed_qkv(4, 3, 2, 20, dtype=dtype)[:2]
    apart = random(4, 3, 20, dtype=dtype), random(4, 2, 20, dtype=dtype)
    for q, k in (packed, apart):
        before = q.clone(), k.clone()

        turned = run(q, k, cos, sin, positions, interleaved)

        expected = rotary.apply_rotary_reference(q, k, cos, sin, positions, interleaved)
        for actual, wanted in zip(turned, expected, strict=True):
            assert actual.dtype == dtype
            assert_close(actual, wanted)
        assert q.equal(before[0])
        assert k.equal(before[1])


@pytest.mark.parametrize("run", [rotary.apply_rotary_cpu, rotary.apply_rotary_triton])
def test_no_tokens_are_no_work(run) -> None:
    cos, sin = tables(5, 4)
    positions = torch.zeros(0, dtype=torch.int64)

    q, k = run(random(0, 2, 8), random(0, 1, 8), cos, sin, positions, False)

    assert q.shape == (0, 2, 8)
    assert k.shape == (0, 1, 8)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    q, k, positions = random(3, 2, 8), random(3, 1, 8), torch.arange(3)
    cos, sin = tables(5, 4)
    assert rotary.apply_rotary(q, k, cos, sin, positions.int())[0].shape == q.shape
    with pytest.raises(ValueError, match=r"k \[T, K, D\]"):
        rotary.apply_rotary(q, k[:2], cos, sin, positions)
    with pytest.raises(ValueError, match="and k is"):
        rotary.apply_rotary(q, k.half(), cos, sin, positions)
    with pytest.raises(ValueError, match="R <= D"):
        rotary.apply_rotary(q, k, *tables(5, 5), positions)
    with pytest.raises(ValueError, match="float32"):
        rotary.apply_rotary(q, k, cos.half(), sin.half(), positions)
    with pytest.raises(ValueError, match="integers"):
        rotary.apply_rotary(q, k, cos, sin, positions.float())
    with pytest.raises(ValueError, match="token's q and k"):
        rotary.apply_rotary(q.transpose(0, 1).contiguous().transpose(0, 1), k, cos, sin, positions)
    with pytest.raises(ValueError, match="cos, sin"):
        rotary.apply_rotary(q, k, cos.t().contiguous().t(), sin, positions)
