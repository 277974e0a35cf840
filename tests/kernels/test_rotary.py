"""Rotary embedding: the definition against complex numbers, then the CPU path against it."""

import pytest
import torch

from kernels import rotary
from tests.kernels.cases import assert_close, random


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (16, 8), (20, 20), (6, 2)])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_rows_turn_heads_as_the_definition_does(
    num_tokens: int, head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 5, head_dim).to(dtype)
    angles = torch.randn(32, rotary_dim // 2)
    positions = torch.randint(0, 32, (num_tokens,))
    q, k = rotary.apply_rotary_reference(
        x[:, :3], x[:, 3:], angles.cos(), angles.sin(), positions, False
    )

    cos, sin = (
        t.index_select(0, positions) for t in rotary.widen_tables(angles.cos(), angles.sin())
    )
    turned = rotary.rotate_heads(x, cos, sin)
    assert turned.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(turned, torch.cat((q, k), dim=1), atol=tolerance, rtol=tolerance)


def test_rows_of_another_step_are_refused() -> None:
    cos = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match=r"\[T, 1, R\]"):
        rotary.rotate_heads(torch.zeros(2, 5, 4), cos, cos)
