"""int8 weights on the CPU: their products, the models made of them, and what refuses them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from executor.layers.linear import GatedLinear, LayerFactory
from executor.loader.loader import load_model
from executor.parallel import TensorParallel
from executor.quantization.int8_dynamic import (
    Int8LinearMethod,
    check_supported,
    quantize,
    quantize_weight,
)
from ipc.config import LoadConfig
from ipc.errors import ConfigError
from kernels.activation import SILU
from tests.executor.forward_driver import Driver, load, model_config
from tests.executor.models.test_families import CASES, PROMPT, make_model
from tests.executor.models.test_transformers_fallback import CASES as OTHER_CASES
from tests.executor.models.test_transformers_fallback import save_model

ROOT = Path(__file__).parents[3]
TINY = ROOT / "scripts" / "demo_models" / "tiny"
EXPECTED = json.loads((ROOT / "tests" / "expected.json").read_text())["base"]


def make_rows(num_rows: int, size: int) -> Tensor:
    """Rows of very different magnitudes: with one scale for all, the small ones would vanish."""
    magnitudes = torch.logspace(-3, 3, num_rows)[torch.randperm(num_rows)]
    return torch.randn(num_rows, size) * magnitudes.unsqueeze(1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_outputs", "size"), [(640, 384), (100, 48), (17, 20), (1, 7)])
def test_every_row_of_a_product_is_near_the_exact_one(
    num_outputs: int, size: int, dtype: torch.dtype, has_bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(num_outputs, size) * torch.rand(num_outputs, 1)
    bias = torch.randn(num_outputs) if has_bias else None
    x = make_rows(30, size).clamp(-1000, 1000).to(dtype)
    exact = nn.functional.linear(x.double(), weight.double())

    out = quantize(weight.to(dtype), None if bias is None else bias.to(dtype))(x)

    assert out.dtype == dtype
    without = out.double() - (0.0 if bias is None else bias.to(dtype).double())
    allowed = 0.04 * weight.norm(dim=1) * x.float().norm(dim=1, keepdim=True) + 1e-5
    if has_bias:
        allowed = allowed + 0.02 * (exact.abs() + 4)  # the sum's own rounding to ``dtype``
    assert ((without - exact).abs() <= allowed).all()


def test_a_weight_is_rounded_to_the_nearest_step_of_its_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 64) * torch.logspace(-4, 4, 50).unsqueeze(1)
    weight[7] = 0.0

    values, scales = quantize_weight(weight)

    assert values.dtype == torch.int8
    assert values.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    error = (values.float() * scales.unsqueeze(1) - weight).abs()
    assert (error <= 0.5001 * scales.unsqueeze(1)).all()


@pytest.mark.parametrize(("num_outputs", "size"), [(640, 384), (384, 1024), (33, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_for_bit_in_every_batch(
    num_outputs: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    run = quantize(torch.randn(num_outputs, size).to(dtype), torch.randn(num_outputs).to(dtype))
    x = make_rows(530, size).to(dtype)
    together = run(x)
    for count in (0, 1, 2, 3, 7, 8, 15, 16, 17, 33, 100, 129, 300, 512, 513):
        assert torch.equal(run(x[:count]), together[:count]), count
    assert torch.equal(run(x[400:401]), together[400:401])


def test_zeros_stay_zeros_and_a_nan_stays_in_its_row() -> None:
    run = quantize(torch.randn(24, 32), None)
    x = torch.randn(4, 32)
    alone = run(x)
    x[1], x[2, 5] = 0.0, float("nan")

    out = run(x)

    assert not out[1].any()
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 3]], alone[[0, 3]])
    assert not quantize(torch.zeros(3, 8), None)(torch.randn(2, 8)).any()


def test_gate_and_up_are_one_product() -> None:
    torch.manual_seed(0)
    layer = GatedLinear(
        32, 24, SILU, LayerFactory(TensorParallel(), torch.float32, Int8LinearMethod())
    )
    assert layer.weight is not None
    layer.weight.data.normal_()
    weight = layer.weight.data.clone()
    layer.finish_loading(torch.device("cpu"))
    x = torch.randn(5, 32)

    gate, up = quantize(weight, None)(x).chunk(2, dim=1)

    torch.testing.assert_close(layer(x), nn.functional.silu(gate) * up)
    assert not list(layer.parameters())
    assert layer.packed_bytes == 48 * 32 + 48 * 4


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_processors_whose_byte_products_saturate_get_smaller_bytes(instructions: str) -> None:
    """oneDNN reads the limit once per process, so each has one of its own."""
    program = """
import torch
from executor.quantization.int8_dynamic import quantize
weight = torch.ones(64, 96) * torch.arange(1, 65).unsqueeze(1)
x = torch.ones(40, 96)
print((quantize(weight, None)(x) / (96 * weight[:, 0]) - 1).abs().max().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1e-5


@pytest.mark.parametrize("case", list(CASES))
def test_every_family_stays_near_its_float_weights(case: str, tmp_path: Path) -> None:
    make_model(*CASES[case]).save_pretrained(tmp_path)
    exact = Driver(load(tmp_path).model).prefill(PROMPT)
    driver = Driver(load(tmp_path, quantization="int8").model, num_blocks=128)

    logits = driver.prefill(PROMPT)

    assert not torch.equal(logits, exact)
    assert ((logits - exact).norm() / exact.norm()).item() < 0.15
    sequences = [driver.add(PROMPT[:length]) for length in (7, 23, 1)]
    together = driver.step([(s, len(s.token_ids)) for s in sequences])
    for length, many in zip((7, 23, 1), together, strict=True):
        assert torch.equal(many[-1], driver.prefill(PROMPT[:length])[-1])


def test_a_model_that_runs_through_transformers_stays_near_its_float_weights(
    tmp_path: Path,
) -> None:
    save_model(*OTHER_CASES["cohere, with layer norms and scaled logits"], tmp_path)
    whole = load(tmp_path)
    exact = Driver(whole.model).prefill(PROMPT)

    loaded = load(tmp_path, quantization="int8")
    logits = Driver(loaded.model).prefill(PROMPT)

    assert not torch.equal(logits, exact)
    assert ((logits - exact).norm() / exact.norm()).item() < 0.1
    assert loaded.weights_bytes < 0.5 * whole.weights_bytes


def test_the_bundled_model_keeps_its_likelihoods() -> None:
    agreed, changes = [], []
    exact_model, model = load(TINY).model, load(TINY, quantization="int8").model
    for case in EXPECTED:
        prompt, ids = case["prompt_ids"], torch.tensor(case["ids"])
        logits = Driver(model).prefill([*prompt, *case["ids"]])[len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        agreed += (logprobs.argmax(-1) == ids).tolist()
        exact = Driver(exact_model).prefill([*prompt, *case["ids"]])
        exact = exact[len(prompt) - 1 : -1].log_softmax(-1)
        changes += (logprobs - exact).gather(1, ids.unsqueeze(1)).squeeze(1).tolist()

    assert sum(agreed) / len(agreed) > 0.95  # measured: 0.974
    assert sum(changes) / len(changes) > -0.01  # measured: -0.0016 per token
    assert sum(map(abs, changes)) / len(changes) < 0.04  # measured: 0.025


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_are_counted_as_they_lie_in_memory(load_format: str) -> None:
    loaded = load(TINY, load_format, quantization="int8")

    config = json.loads((TINY / "config.json").read_text())
    hidden, vocab, layers = (
        config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, inner = config.get("head_dim") or hidden // heads, config["intermediate_size"]
    shapes = layers * [
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    norms = (2 * layers + 1) * hidden
    expected = sum(n * k + 4 * n for n, k in [*shapes, (vocab, hidden)])
    assert loaded.weights_bytes == expected + 4 * (vocab * hidden + norms)


def test_float_weights_go_while_the_others_are_still_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    was_loading: list[bool] = []
    finish = Int8LinearMethod.finish_loading

    def note(self: Int8LinearMethod, layer: Any) -> Any:
        done, total = progress[-1]
        was_loading.append(done < total)
        return finish(self, layer)

    progress = [(0, 1)]
    monkeypatch.setattr(Int8LinearMethod, "finish_loading", note)
    load_model(
        model_config(TINY, quantization="int8"),
        LoadConfig(),
        device=torch.device("cpu"),
        tp=TensorParallel(),
        on_progress=lambda stage, done, total: progress.append((done, total)),
    )
    assert was_loading == [True] * (7 * 4) + [False]  # the tied head waits for the embedding


def test_other_devices_and_quantized_checkpoints_are_refused() -> None:
    with pytest.raises(ConfigError, match="--quantization int8 runs on the CPU only, not on cuda"):
        check_supported(torch.device("cuda"))
    overrides = {"quantization_config": {"quant_method": "int8"}}
    with pytest.raises(ConfigError, match="nor are checkpoints in it"):
        load(TINY, quantization="int8", hf_overrides=overrides)
