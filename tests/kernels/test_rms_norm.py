"""RMS norm: the definition against torch, then the CPU path and the kernel against it."""

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm
from tests.kernels.cases import DTYPES, assert_close, packed_qkv, random

pytestmark = pytest.mark.usefixtures("cpu_path")


def test_definition_agrees_with_torch() -> None:
    x, weight = random(5, 40), random(40)

    expected = F.rms_norm(x, (40,), weight, 1e-5)

    assert_close(rms_norm.rms_norm_reference(x, weight, 1e-5, 0.0), expected)
    # A weight stored as its distance from one, as Gemma does.
    assert_close(rms_norm.rms_norm_reference(x, weight - 1, 1e-5, 1.0), expected)


@pytest.mark.parametrize("run", [rms_norm.rms_norm_cpu, rms_norm.rms_norm_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_norm_equals_definition(run, dtype: torch.dtype, weight_offset: float) -> None:
    for shape in ((3, 40), (1, 7), (0, 8), (33,)):
        x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)

        y = run(x, weight, 1e-5, weight_offset)

        assert y.is_contiguous()
        assert_close(y, rms_norm.rms_norm_reference(x, weight, 1e-5, weight_offset))


@pytest.mark.parametrize("run", [rms_norm.rms_norm_cpu, rms_norm.rms_norm_triton])
def test_heads_inside_a_packed_projection_need_no_copy(run) -> None:
    _, k, _ = packed_qkv(3, 4, 2, 24, dtype=torch.float32)
    weight = random(24)

    assert_close(run(k, weight, 1e-6, 0.0), rms_norm.rms_norm_reference(k, weight, 1e-6, 0.0))


@pytest.mark.parametrize(
    "run", [rms_norm.fused_add_rms_norm_cpu, rms_norm.fused_add_rms_norm_triton]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_norm_equals_definition_and_keeps_its_inputs(run, dtype: torch.dtype) -> None:
    for shape in ((3, 40), (2, 2, 9), (0, 8)):
        x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        weight = random(shape[-1], dtype=dtype)
        before = x.clone(), residual.clone()

        y, h = run(x, residual, weight, 1e-5, 0.0)

        expected = rms_norm.fused_add_rms_norm_reference(x, residual, weight, 1e-5, 0.0)
        assert_close(y, expected[0])
        assert_close(h.to(dtype), expected[1])
        assert torch.equal(x, before[0])
        assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_norms_with_a_weight_as_its_layers_keep_it(dtype: torch.dtype) -> None:
    for shape in ((3, 40), (1, 384), (70, 1000), (0, 8)):
        x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
        weight = random(shape[-1])

        alone = rms_norm.rms_norm_cpu(x, weight, 1e-5, 0.0)
        y, h = rms_norm.fused_add_rms_norm_cpu(x, residual, weight, 1e-5, 0.0)
        again, _ = rms_norm.fused_add_rms_norm_cpu(x, h, weight, 1e-5, 0.0)

        assert h.equal(x.float() + residual.float())
        assert_close(alone, rms_norm.rms_norm_reference(x, weight, 1e-5, 0.0))
        assert_close(y, rms_norm.rms_norm_reference(h, weight, 1e-5, 0.0).to(dtype))
        expected = rms_norm.rms_norm_reference(x.float() + h, weight, 1e-5, 0.0)
        assert_close(again, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_keeps_the_residual_of_16_bit_models_in_float32(dtype: torch.dtype) -> None:
    x, residual, weight = random(3, 40, dtype=dtype), random(3, 40, seed=1), random(40)

    y, h = rms_norm.fused_add_rms_norm(x, residual, weight, 1e-5, weight_offset=1.0)

    assert torch.equal(h, x.float() + residual)
    assert y.dtype == dtype
    assert_close(y, rms_norm.rms_norm_reference(h, weight, 1e-5, 1.0).to(dtype))


def test_shapes_and_layouts_that_do_not_fit_are_refused() -> None:
    x, weight = random(3, 8), random(8)
    with pytest.raises(ValueError, match=r"weight \[H\]"):
        rms_norm.rms_norm(x, random(7), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm.rms_norm(random(8, 3).t(), weight, 1e-5)
    with pytest.raises(ValueError, match="shapes differ"):
        rms_norm.fused_add_rms_norm(x, random(2, 8), weight, 1e-5)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm.fused_add_rms_norm(x.half(), x.bfloat16(), weight, 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm.fused_add_rms_norm(x[:, :4], x[:, :4], random(4), 1e-5)
    assert rms_norm.rms_norm(x, weight, 1e-5).shape == (3, 8)
    assert rms_norm.fused_add_rms_norm(x, x, weight, 1e-5)[1].equal(2 * x)
