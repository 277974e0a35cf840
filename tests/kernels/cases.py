"""Inputs for kernel tests, on any device: a few odd shapes, and how close results must be."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention_step import Step
from kernels.qkv_rope_store import HeadNorm, PagedCache, Rotation
from kernels.sampling_cpu import Rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest error allowed, absolute and relative: float32 differs by the order of its sums, the
# others by a unit or two in the last place of what is stored.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare within the tolerance of the dtype."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def packed_qkv(
    T: int, N: int, K: int, D: int, *, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as slices of one projection, which is how a model holds them."""
    q, k, v = random(T, N + 2 * K, D, dtype=dtype, device=device).split((N, K, K), dim=1)
    return q, k, v


AttentionInputs = tuple[Tensor, Tensor, Tensor, Step]


def attention_inputs(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    stale: float = torch.nan,
) -> AttentionInputs:
    """A step over scattered blocks. Everything that no request holds is ``stale``.

    The block table is a slice of a wider one, and its unused entries point at such a block.
    """
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(len(seq_lens) + head_dim)
    counts = [-(-n // block_size) for n in seq_lens]
    order = (torch.randperm(sum(counts), generator=generator) + 1).int()
    shape = (sum(counts) + 2, block_size, num_kv_heads, head_dim)
    caches = [random(*shape, seed=i) for i in (1, 2)]
    width = max([1, *counts])
    table = torch.full((len(seq_lens), width + 3), shape[0] - 1, dtype=torch.int32)
    for b, ids in enumerate(order.split(counts)):
        table[b, : len(ids)] = ids
        if seq_lens[b] % block_size:
            for cache in caches:
                cache[ids[-1], seq_lens[b] % block_size :] = stale
    for cache in caches:
        cache[-1] = stale
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    step = Step(
        table.to(device)[:, :width],
        starts.int().to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        max([0, *query_lens]),
        max([0, *seq_lens]),
    )
    q = packed_qkv(int(starts[-1]), num_heads, 1, head_dim, dtype=dtype, device=device)[0]
    key_cache, value_cache = (cache.to(dtype).to(device) for cache in caches)
    return q, key_cache, value_cache, step


def same_query_in_other_steps(
    inputs: AttentionInputs, num_queries: int
) -> Iterator[tuple[AttentionInputs, slice, int]]:
    """The last queries of a request, alone and with mates, in steps of several kinds.

    Args:
        inputs: a step of one request that computes at least ``num_queries`` tokens.

    Yields:
        A step, the rows of it that are the request's, and how many queries from the end they are.
    """
    q, key_cache, value_cache, step = inputs
    T, seq_len = q.shape[0], int(step.seq_lens[0])
    for own in (1, num_queries, T):
        for before, after in (((), ()), ((1, 1, 3), ()), ((9,), (1, 4))):
            lens = [*before, own, *after]
            starts = [sum(lens[:i]) for i in range(len(lens) + 1)]
            packed = torch.cat(
                [q[-own:] if i == len(before) else q[:n] for i, n in enumerate(lens)]
            )
            seq_lens = [seq_len if i == len(before) else max(n, 7) for i, n in enumerate(lens)]
            tensors = (
                torch.tensor(values, dtype=torch.int32, device=q.device)
                for values in (starts, seq_lens)
            )
            table = step.block_table.expand(len(lens), -1).contiguous()
            mixed = Step(table, *tensors, max(lens), seq_len)
            first = starts[len(before)]
            yield (packed, key_cache, value_cache, mixed), slice(first, first + own), own


def sampling_rows(num_rows: int, device: str = "cpu", **values: list[float]) -> Rows:
    """Rows with every filter off and temperature 1, changed by ``values``."""
    columns = {
        "temperature": torch.ones(num_rows),
        "top_k": torch.zeros(num_rows, dtype=torch.int32),
        "top_p": torch.ones(num_rows),
        "min_p": torch.zeros(num_rows),
        "seeds": torch.arange(num_rows) * 7919 - 3,
        "positions": torch.arange(num_rows) + 11,
    }
    for name, column in values.items():
        columns[name] = torch.tensor(column, dtype=columns[name].dtype)
    return Rows(**{name: column.to(device) for name, column in columns.items()})


# One row per combination of filters, ties and bans among them; 12 rows.
FILTERS: dict[str, list[float]] = {
    "temperature": [1, 1, 0.5, 0.9, 0, 1, 1, 1, 1, 2, 1, 1],
    "top_k": [0, 5, 0, 10, 0, 3, 4, 0, 100_000, 300, 40, 20],
    "top_p": [1, 1, 0.5, 0.9, 0.5, 0.9, 0.9, 1, 0.95, 0.97, 1e-9, 0.9],
    "min_p": [0, 0, 0, 0.1, 0, 0.1, 0.1, 0.05, 0, 0, 0, 0],
}


def filter_logits(vocab_size: int, device: str = "cpu") -> Tensor:
    """Logits for ``FILTERS``: a banned token, a row of bans, all equal, and many ties."""
    logits = random(12, vocab_size) * 3
    logits[3, 7] = -torch.inf
    logits[5] = -torch.inf
    logits[6] = 1.0
    logits[11] = logits[11].round()
    return logits.to(device)


# T tokens, N query heads, K key heads, head size, and half of what turns of a head.
QKV_SHAPES = [
    pytest.param(3, 4, 2, 64, 32, id="all of the head turns"),
    pytest.param(70, 5, 1, 32, 16, id="many tokens"),
    pytest.param(2, 3, 1, 80, 16, id="part of the head turns"),
    pytest.param(1, 5, 2, 96, 36, id="odd part"),
    pytest.param(4, 6, 6, 40, 0, id="nothing turns"),
    pytest.param(0, 2, 2, 16, 8, id="no token"),
]


def make_rotation(T: int, half: int, device: str = "cpu") -> Rotation:
    """Tables of 100 positions, and tokens scattered over them."""
    angles = torch.arange(100).unsqueeze(1) * 0.5 ** torch.arange(half)
    positions = torch.arange(T) * 13 % 100
    return Rotation(angles.cos().to(device), angles.sin().to(device), positions.to(device))


def make_head_norm(D: int, dtype: torch.dtype, device: str = "cpu") -> HeadNorm:
    """Weights counted from one."""
    q_weight, k_weight = (random(D, dtype=dtype, device=device, seed=i) for i in (1, 2))
    return HeadNorm(q_weight, k_weight, 1e-6, 1.0)


def make_cache(T: int, K: int, D: int, dtype: torch.dtype, device: str = "cpu") -> PagedCache:
    """Zeros in blocks of 16, the first of them the null block, and a place for each token."""
    num_blocks = 2 + -(-T // 16)
    key, value = (torch.zeros(num_blocks, 16, K, D, dtype=dtype, device=device) for _ in range(2))
    slots = torch.arange(16, num_blocks * 16).flip(0)[:T].contiguous()
    return PagedCache(key, value, slots.to(device))
