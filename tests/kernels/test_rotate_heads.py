"""Rotation by rows gathered once a step, against ``apply_rotary``'s definition."""

import pytest
import torch

from kernels.rotary import apply_rotary_reference, rotate_heads, widen_tables


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
    q, k = apply_rotary_reference(x[:, :3], x[:, 3:], angles.cos(), angles.sin(), positions, False)

    cos, sin = (t.index_select(0, positions) for t in widen_tables(angles.cos(), angles.sin()))
    turned = rotate_heads(x, cos, sin)
    assert turned.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(turned, torch.cat((q, k), dim=1), atol=tolerance, rtol=tolerance)


def test_rows_of_another_step_are_refused() -> None:
    cos = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match=r"\[T, 1, R\]"):
        rotate_heads(torch.zeros(2, 5, 4), cos, cos)
