"""Compile every kernel for an H100 or H200, through the wrappers' own launches, without a GPU.

Run as a program, without TRITON_INTERPRET: a stand-in driver names the target, and each launch
stops after the compilation. So the signatures, constants, warps and stages are those of a real
launch. Prints one JSON object per compiled variant.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import (
    activation,
    cudnn_attention,
    decode_attention,
    gumbel,
    logits,
    logprobs,
    paged_attention,
    prepare_inputs,
    qkv_rope_store,
    rms_norm,
    sampling,
    skinny_gemm,
    store_kv_cache,
    store_samples,
)
from kernels.attention_step import Options, Step, StepMemo
from kernels.sampling_cpu import Rows
from tests.kernels.cases import make_cache, make_head_norm, make_rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class H200WithoutDevice:
    """What the launcher asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def stop_after_compiling() -> None:
    """Make every launch a compilation whose result is printed."""
    run = JITFunction.run
    seen: set[int] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            report = {
                "kernel": self.fn.__name__,
                "shared": kernel.metadata.shared,
                "cubin_bytes": len(kernel.asm["cubin"]),
                "wgmma": "wgmma" in kernel.asm["ptx"],
                "approximate_log": "lg2.approx" in kernel.asm["ptx"],
            }
            sys.stdout.write(json.dumps(report) + "\n")
        return kernel

    JITFunction.run = compile_only


def compile_elementwise(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 512, dtype=dtype)
    weight = torch.zeros(512, dtype=dtype)
    rms_norm.rms_norm_triton(x, weight, 1e-5, 0.0)
    rms_norm.fused_add_rms_norm_triton(x, x, weight, 1e-5, 0.0)
    for act in (activation.SILU, activation.GELU, activation.GELU_TANH):
        activation.gated_triton(x, act)
    q = torch.zeros(3, 4, 64, dtype=dtype)
    positions = torch.zeros(3, dtype=torch.int64)
    compile_qkv(dtype)
    cache = torch.zeros(2, 16, 4, 64, dtype=dtype)
    store_kv_cache.store_kv_cache_triton(q, q, cache, cache, positions)


def compile_qkv(dtype: torch.dtype) -> None:
    for D, half in ((128, 64), (80, 16)):
        cache, norm = make_cache(3, 2, D, dtype), make_head_norm(D, dtype)
        qkv, rotation = torch.zeros(3, 8 * D, dtype=dtype), make_rotation(3, half)
        qkv_rope_store.qkv_rope_store_triton(qkv, 4, cache, norm, rotation)
        qkv_rope_store.qkv_rope_store_triton(qkv, 4, cache, None, rotation)
        qkv_rope_store.qkv_rope_store_triton(qkv, 4, cache, None, None)


def compile_attention(dtype: torch.dtype, head_dim: int, options: Options) -> None:
    cache = torch.zeros(40, 16, 2, head_dim, dtype=dtype)
    table, lens = torch.zeros(2, 40, dtype=torch.int32), torch.full((2,), 600, dtype=torch.int32)
    for queries in (100, 2):
        q = torch.zeros(queries + 1, 8, head_dim, dtype=dtype)
        starts = torch.tensor([0, queries, queries + 1], dtype=torch.int32)
        mixed = Step(table, starts, lens, queries, 600)
        paged_attention.mixed_attention(q, cache, cache, mixed, options)
    alone = Step(table[:1], starts[:2], lens[:1], 2, 600)
    paged_attention.mixed_attention(q[:2], cache, cache, alone, options)
    decode, memo = Step(table, torch.arange(3, dtype=torch.int32), lens, 1, 600), StepMemo()
    for _ in range(2):  # the second layer is launched in another way
        decode_attention.decode_attention_triton(q[:2], cache, cache, decode, options, memo)
    cudnn_attention.gather_keys(cache, cache, table[0], num_keys=20)
    part = q[:2], torch.zeros(8, 2)
    cudnn_attention.merge_results(part, part, q[:2], num_ahead=0)


def compile_logits() -> None:
    B, V = 4, 1000
    x = torch.zeros(B, V)
    ones, ids = torch.ones(B), torch.zeros(B, dtype=torch.int64)
    logits.apply_penalties_triton(x, x.int(), x.bool(), ones, ones, ones)
    logits.apply_token_bias_triton(x, ids, ids, ones)
    logits.apply_bitmask_triton(x, ids, torch.zeros(B, -(-V // 32), dtype=torch.int32))
    logits.has_nan_triton(x)
    logprobs.token_logprobs_triton(x, ids, 2)
    gumbel.gumbel_noise_triton(ids, ids, V)
    for any_filter in (False, True):
        sampling.sample_triton(x, Rows(ones, ids.int(), ones, ones, ids, ids), any_filter)


def compile_step_inputs() -> None:
    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    f32, i32, i64, B, R = torch.float32, torch.int32, torch.int64, 4, 9
    tokens, blocks = zeros(i32, R, 640), zeros(i32, R, 40)
    requests = prepare_inputs.Requests(zeros(i32, B), zeros(i32, B), zeros(i32, B + 1))
    packed = prepare_inputs.PackedInputs(
        zeros(i32, B), zeros(i64, B), zeros(i64, B), zeros(i32, B, 48)
    )
    tables = prepare_inputs.DrawTables(zeros(f32, 6, R), zeros(i64, 2, R))
    draws = prepare_inputs.Draws(*(zeros(t, B) for t in (f32, f32, f32, i32, i64, i64)))
    for parameters in ((None, None), (tables, draws)):
        prepare_inputs.prepare_inputs_triton(requests, tokens, blocks, packed, 16, *parameters)
    ids, is_bad, out = zeros(i64, B), zeros(torch.bool, B), zeros(i32, 2, B)
    store_samples.store_samples_triton(ids, is_bad, *requests[:2], tokens, out)


def compile_skinny_products() -> None:
    """Every pinned tile once, at the most rows that it serves, and two whatever is pinned."""
    tables = skinny_gemm.skinny_gemm_h200
    wanted = {
        (False, 2, 512, 1, 1, 4, 1, 1): (2, False),
        (True, 128, 64, 1, 2, 8, 4, 2): (64, True),
    }
    for gated, table in ((False, tables.PLAIN), (True, tables.GATED)):
        for entries in table.values():
            wanted |= {tile: (rows, gated) for rows, tile in entries.items() if tile is not None}
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16)
    for values, (rows, gated) in wanted.items():
        x, tile = weight[:rows], skinny_gemm.Tile._make(values)
        if gated:
            skinny_gemm.skinny_gated(x, weight, activation=activation.SILU, tile=tile)
        else:
            skinny_gemm.skinny_linear(x, weight, tile=tile)


def main() -> None:
    driver.set_active(H200WithoutDevice())  # type: ignore[arg-type]
    stop_after_compiling()
    compile_step_inputs()
    compile_logits()
    compile_skinny_products()
    for dtype in DTYPES:
        compile_elementwise(dtype)
        compile_attention(dtype, 64, Options(0.1, None, None))
    for head_dim in (80, 128, 512):
        compile_attention(torch.bfloat16, head_dim, Options(0.1, None, None))
    for dtype in (torch.bfloat16, torch.float32):
        compile_attention(dtype, 256, Options(0.1, 64, 30.0))


if __name__ == "__main__":
    main()
