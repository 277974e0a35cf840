"""Every kernel on a GPU against its definition on the CPU, in each dtype and in odd shapes.

The wrappers run with synchronisation forbidden: a launch must need no value from the device.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

from kernels import activation, gumbel, logits, logprobs, rms_norm, sampling
from kernels.attention_step import Options
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.qkv_rope_store import qkv_rope_store, qkv_rope_store_reference
from kernels.store_kv_cache import store_kv_cache, store_kv_cache_reference
from tests.kernels.cases import (
    DTYPES,
    FILTERS,
    QKV_SHAPES,
    AttentionInputs,
    assert_close,
    attention_inputs,
    filter_logits,
    make_cache,
    make_head_norm,
    make_rotation,
    packed_qkv,
    random,
    sampling_rows,
)

pytestmark = pytest.mark.gpu
R = TypeVar("R")


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Make torch raise where it would wait for the device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_waiting(run: Callable[[], R]) -> R:
    with no_synchronisation():
        return run()


def attend(inputs: AttentionInputs, options: Options) -> torch.Tensor:
    q, key_cache, value_cache, step = inputs
    return without_waiting(
        lambda: paged_attention(q, key_cache, value_cache, **step._asdict(), **options._asdict())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (5, 4096), (7, 3, 96), (2, 16384), (0, 64), (33,)])
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], weight_offset: float) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    residual = random(*shape, dtype=dtype, seed=1)
    gpu = [t.cuda() for t in (x, residual, weight)]

    y = without_waiting(
        lambda: rms_norm.rms_norm(gpu[0], gpu[2], 1e-5, weight_offset=weight_offset)
    )
    fused = without_waiting(
        lambda: rms_norm.fused_add_rms_norm(*gpu, 1e-5, weight_offset=weight_offset)
    )

    assert_close(y.cpu(), rms_norm.rms_norm_reference(x, weight, 1e-5, weight_offset))
    expected = rms_norm.fused_add_rms_norm_reference(x, residual, weight, 1e-5, weight_offset)
    assert_close(fused[0].cpu(), expected[0])
    assert_close(fused[1].cpu(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_in_a_packed_projection(dtype: torch.dtype) -> None:
    q, k, _ = packed_qkv(9, 5, 3, 80, dtype=dtype, device="cuda")
    weight = random(80, dtype=dtype)

    for heads in (q, k):
        y = rms_norm.rms_norm(heads, weight.cuda(), 1e-6)
        assert_close(y.cpu(), rms_norm.rms_norm_reference(heads.cpu(), weight, 1e-6, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 14), (5, 2 * 4097), (64, 2048), (0, 6)])
def test_gated_activations(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = random(*shape, dtype=dtype) * 4
    on_gpu = x.cuda()

    silu = without_waiting(lambda: activation.silu_and_mul(on_gpu))
    gelu = without_waiting(lambda: activation.gelu_and_mul(on_gpu, tanh=False))
    gelu_tanh = without_waiting(lambda: activation.gelu_and_mul(on_gpu, tanh=True))

    assert_close(silu.cpu(), activation.silu_and_mul_reference(x))
    assert_close(gelu.cpu(), activation.gelu_and_mul_reference(x, tanh=False))
    assert_close(gelu_tanh.cpu(), activation.gelu_and_mul_reference(x, tanh=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D", "half"),
    [*QKV_SHAPES, (300, 32, 8, 128, 64), (700, 16, 8, 128, 64), (65, 8, 4, 256, 128)],
)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_qkv_rope_store(
    dtype: torch.dtype,
    T: int,
    N: int,
    K: int,
    D: int,
    half: int,
    has_norm: bool,
    interleaved: bool,
) -> None:
    qkv = random(T, (N + 2 * K) * D, dtype=dtype)
    norms = [make_head_norm(D, dtype, device) if has_norm else None for device in ("cuda", "cpu")]
    rotations = [make_rotation(T, half, device) if half else None for device in ("cuda", "cpu")]
    rotations = [r and r._replace(interleaved=interleaved) for r in rotations]
    caches = [make_cache(T, K, D, dtype, device) for device in ("cuda", "cpu")]
    on_gpu = qkv.cuda()

    q = without_waiting(
        lambda: qkv_rope_store(on_gpu, N, caches[0], norm=norms[0], rotation=rotations[0])
    )

    expected = qkv_rope_store_reference(qkv, N, caches[1], norms[1], rotations[1])
    assert_close(q.cpu(), expected)
    assert_close(caches[0].key.cpu(), caches[1].key)
    assert caches[0].value.cpu().equal(caches[1].value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 80), (16, 128), (32, 700)])
@pytest.mark.parametrize("T", [11, 0])
def test_store_kv_cache(dtype: torch.dtype, block_size: int, head_dim: int, T: int) -> None:
    _, k, v = packed_qkv(T, 3, 2, head_dim, dtype=dtype, device="cuda")
    caches = [torch.zeros(4, block_size, 2, head_dim, dtype=dtype) for _ in range(2)]
    on_gpu = [cache.cuda() for cache in caches]
    slots = torch.arange(4 * block_size).flip(0)[:T]
    slots_on_gpu = slots.cuda()

    without_waiting(lambda: store_kv_cache(k, v, *on_gpu, slots_on_gpu))

    store_kv_cache_reference(k.cpu(), v.cpu(), *caches, slots)
    assert on_gpu[0].cpu().equal(caches[0])
    assert on_gpu[1].cpu().equal(caches[1])


STEPS = [
    pytest.param([5, 1, 0, 3], [5, 20, 7, 30], id="mixed"),
    pytest.param([130, 1, 64, 17], [130, 700, 300, 17], id="prefill of several tiles"),
    pytest.param([2, 2, 2], [900, 3, 2], id="two tokens each"),
    pytest.param([1] * 5, [1, 16, 17, 300, 40], id="decode, short"),
    pytest.param([1, 0, 1, 1], [3000, 9, 257, 0], id="decode, split"),
    pytest.param([1] * 200, [3 * b + 1 for b in range(200)], id="decode of many"),
    pytest.param([0], [0], id="no token"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_lens", "seq_lens"), STEPS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"),
    [
        pytest.param((6, 2), 64, 16, id="groups of 3"),
        pytest.param((4, 4), 80, 8, id="no groups"),
        pytest.param((8, 1), 128, 32, id="one key head"),
        pytest.param((2, 1), 40, 16, id="head size 40"),
        pytest.param((3, 1), 96, 16, id="head size 96"),
    ],
)
def test_paged_attention(
    dtype: torch.dtype,
    query_lens: list[int],
    seq_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
) -> None:
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    options = Options(head_dim**-0.5, None, None)

    out = attend(attention_inputs(query_lens, seq_lens, **shape, device="cuda"), options)

    inputs = attention_inputs(query_lens, seq_lens, **shape)
    assert_close(out.cpu(), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("query_lens", "seq_lens"), STEPS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(0.1, 7, None), id="window"),
        pytest.param(Options(0.1, 128, 30.0), id="window and cap"),
        pytest.param(Options(0.1, None, 5.0), id="cap"),
    ],
)
def test_paged_attention_with_window_and_cap(
    dtype: torch.dtype, query_lens: list[int], seq_lens: list[int], options: Options
) -> None:
    shape = {"heads": (6, 2), "head_dim": 64, "dtype": dtype}

    out = attend(attention_inputs(query_lens, seq_lens, **shape, device="cuda"), options)

    inputs = attention_inputs(query_lens, seq_lens, **shape)
    assert_close(out.cpu(), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((71, 1), 64), ((4, 2), 256), ((2, 1), 512)])
@pytest.mark.parametrize("query_lens", [[70, 1], [1, 1]])
def test_paged_attention_with_large_heads_and_groups(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, query_lens: list[int]
) -> None:
    shape = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
    options = Options(head_dim**-0.5, None, None)

    out = attend(attention_inputs(query_lens, [90, 600], **shape, device="cuda"), options)

    inputs = attention_inputs(query_lens, [90, 600], **shape)
    assert_close(out.cpu(), paged_attention_reference(*inputs, options))


@pytest.mark.parametrize("query_len", [1, 20])
def test_cache_of_more_than_2_to_the_31_values(query_len: int) -> None:
    K, D, seq_len = 8, 128, 40
    num_blocks = 2**31 // (16 * K * D) + 4
    caches = [
        torch.zeros(num_blocks, 16, K, D, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    ]
    table = torch.arange(num_blocks - 3, num_blocks, device="cuda").int().unsqueeze(0)
    slots = (
        table[0].long().repeat_interleave(16)[:seq_len] * 16
        + torch.arange(seq_len, device="cuda") % 16
    )
    _, k, v = packed_qkv(seq_len, K, K, D, dtype=torch.bfloat16, device="cuda")
    q = random(query_len, K, D, dtype=torch.bfloat16, device="cuda")
    store_kv_cache(k, v, *caches, slots)

    out = paged_attention(
        q,
        *caches,
        block_table=table,
        query_start_loc=torch.tensor([0, query_len], device="cuda").int(),
        seq_lens=torch.tensor([seq_len], device="cuda").int(),
        max_query_len=query_len,
        max_seq_len=seq_len,
        scale=D**-0.5,
    )

    seen = torch.ones(query_len, seq_len, dtype=torch.bool, device="cuda").tril(seq_len - query_len)
    scores = torch.einsum("qnd,snd->nqs", q.float(), k.float()) * D**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("nqs,snd->qnd", weights, v.float())
    assert_close(out, expected.to(torch.bfloat16))


@pytest.mark.parametrize(("B", "V"), [(33, 128_256), (3, 8191), (1, 5), (0, 40)])
def test_changes_to_logits(B: int, V: int) -> None:
    x = random(B, V) * 5
    counts = (random(B, V, seed=1) * 2).clamp(min=0).int()
    prompt_mask = random(B, V, seed=2) > 1
    penalties = random(B, seed=3), random(B, seed=4), random(B, seed=5).exp()
    rows = torch.arange(B)
    biased = rows, (rows * 977 + 3) % V, random(B, seed=6)
    mask = torch.randint(-(2**31), 2**31, (B, -(-V // 32))).int()
    on_gpu = x.cuda()
    gpu_penalties = [t.cuda() for t in (counts, prompt_mask, *penalties)]
    gpu_biased = [t.cuda() for t in biased]
    gpu_mask = mask.cuda()

    with no_synchronisation():
        logits.apply_penalties(on_gpu, *gpu_penalties)
        logits.apply_token_bias(on_gpu, *gpu_biased)
        logits.apply_bitmask(on_gpu, gpu_biased[0], gpu_mask)

    logits.apply_penalties_reference(x, counts, prompt_mask, *penalties)
    logits.apply_token_bias_reference(x, *biased)
    logits.apply_bitmask_reference(x, rows, mask)
    assert_close(on_gpu.cpu(), x)


def test_has_nan() -> None:
    x = random(4, 128_256)
    x[1, -1], x[2], x[3, 0] = torch.nan, -torch.inf, torch.inf
    on_gpu = x.cuda()

    found = without_waiting(lambda: logits.has_nan(on_gpu))

    assert found.tolist() == [False, True, False, False]
    assert logits.has_nan(on_gpu[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("B", "V", "k"),
    [(33, 128_256, 20), (3, 8191, 1), (2, 5, 0), (0, 9, 2), (70, 151_936, 32), (2, 40_000, 33)],
)
def test_token_logprobs(B: int, V: int, k: int) -> None:
    x = random(B, V) * 4
    x[: B // 2, 1] = -torch.inf
    token_ids = (torch.arange(B) * 977 + 2) % V
    on_gpu, ids_on_gpu = x.cuda(), token_ids.cuda()

    results = without_waiting(lambda: logprobs.token_logprobs(on_gpu, ids_on_gpu, k))

    expected = logprobs.token_logprobs_reference(x, token_ids, k)
    assert_close(results[0].cpu(), expected[0])
    assert results[1].cpu().equal(expected[1])
    assert results[2].cpu().equal(expected[2])
    assert_close(results[3].cpu(), expected[3])


def test_noise_has_the_definitions_integers() -> None:
    seeds = torch.tensor([0, 1, -5, 2**62 + 12345])
    positions = torch.tensor([0, 7, 2**31 - 1, 3])
    gpu_seeds, gpu_positions = seeds.cuda(), positions.cuda()

    noise = without_waiting(lambda: gumbel.gumbel_noise(gpu_seeds, gpu_positions, 128_256))

    # A wrong bit anywhere would move a value by far more than a rounded logarithm does.
    expected = gumbel.gumbel_noise_reference(seeds, positions, 128_256)
    torch.testing.assert_close(noise.cpu(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab_size", [151_936, 8191, 130])
def test_sampling_equals_definition(vocab_size: int) -> None:
    x, rows = filter_logits(vocab_size), sampling_rows(12, **FILTERS)
    on_gpu, gpu_rows = filter_logits(vocab_size, "cuda"), sampling_rows(12, "cuda", **FILTERS)

    sampled = without_waiting(lambda: sampling.sample(on_gpu, **gpu_rows._asdict()))

    good = ~sampling.is_bad_reference(x)
    assert sampled.is_bad.tolist() == (~good).tolist()
    token_ids = sampled.token_ids.cpu()
    assert token_ids[good].tolist() == sampling.sample_reference(x, rows)[good].tolist()
    again = sampling.sample(on_gpu, **gpu_rows._asdict())
    assert again.token_ids.equal(sampled.token_ids)


@pytest.mark.parametrize("num_rows", [70, 1, 0])
def test_sampling_without_filters_equals_definition(num_rows: int) -> None:
    x = random(num_rows, 128_256) * 2
    rows = sampling_rows(num_rows)
    on_gpu, gpu_rows = x.cuda(), sampling_rows(num_rows, "cuda")

    drawn = without_waiting(lambda: sampling.sample(on_gpu, **gpu_rows._asdict(), any_filter=False))
    gpu_rows.temperature.zero_()
    greedy = without_waiting(
        lambda: sampling.sample(on_gpu, **gpu_rows._asdict(), any_filter=False)
    )

    assert drawn.token_ids.tolist() == sampling.sample_reference(x, rows).tolist()
    assert greedy.token_ids.cpu().equal(x.argmax(dim=1))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        pytest.param({}, [0.05, 0.4, 0.1, 0.25, 0.2], id="plain"),
        pytest.param({"top_k": 3}, [0, 0.4, 0, 0.25, 0.2], id="top-k"),
        pytest.param({"top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2], id="top-p"),
        pytest.param({"min_p": 0.25}, [0, 0.4, 0.1, 0.25, 0.2], id="min-p"),
    ],
)
def test_draws_follow_the_distribution(filters: dict[str, float], expected: list[float]) -> None:
    num_draws = 50_000
    parameters = {name: [value] * num_draws for name, value in filters.items()}
    rows = sampling_rows(num_draws, "cuda", seeds=[99] * num_draws, **parameters)
    x = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]], device="cuda").log().repeat(num_draws, 1)

    drawn = sampling.sample(x, **rows._asdict())

    counts = torch.bincount(drawn.token_ids, minlength=5).double().cpu()
    possible = torch.tensor(expected) > 0
    wanted = torch.tensor(expected).double()[possible] / sum(expected) * num_draws
    assert not counts[~possible].any()
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_decode_and_sampling_replay_in_a_graph() -> None:
    q, key_cache, value_cache, step = attention_inputs(
        [1] * 4, [700, 5, 90, 33], heads=(4, 2), head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    x, rows = filter_logits(5000, "cuda"), sampling_rows(12, "cuda", **FILTERS)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out = paged_attention(q, key_cache, value_cache, **step._asdict(), scale=0.1)
        return out, sampling.sample(x, **rows._asdict()).token_ids

    run()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    q.mul_(0.5)
    step.seq_lens[0] = 321
    rows.positions.add_(1000)
    graph.replay()

    expected = run()
    assert captured[0].equal(expected[0])
    assert captured[1].equal(expected[1])
