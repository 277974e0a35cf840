"""How many KV blocks fit: arithmetic over measured and computed sizes, and the refusals.

The activation peak is computed from the model's shape rather than found by a trial run; the warm-up
step verifies it once. Knows no device: what was measured comes in as numbers of bytes.
"""

import logging
from dataclasses import dataclass

from executor.model_config import ModelShape
from ipc.config import CacheConfig
from ipc.errors import ConfigError

GIB = 2**30
MAX_CPU_KV_BYTES = 4 * GIB  # unless --cpu-kv-cache-space says otherwise
CPU_SHARE = 4  # of the machine's available memory, at most one part in so many for the cache
_GRAPH_SLACK_BYTES = 32 * 2**20  # small temporaries, and what splitting memory leaves over
SWAP_REFUSED, SWAP_WARNED = 0.7, 0.4  # shares of the host's memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the engine asks of a cache, in its own units."""

    block_bytes: int  # one block over all layers of a rank
    block_size: int
    max_model_len: int
    max_num_seqs: int
    num_lookahead_slots: int = 0

    @property
    def blocks_per_request(self) -> int:
        """Blocks of one request of the greatest length."""
        return -(-(self.max_model_len + self.num_lookahead_slots) // self.block_size)

    @property
    def useful_blocks(self) -> int:
        """More than these can never be in use at once; the null block is among them."""
        return self.max_num_seqs * self.blocks_per_request + 1


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """A GPU's memory as this instance sees it, in bytes."""

    total: int
    free: int  # right now; weights are loaded already
    weights: int
    activations: int  # peak of one step, beyond weights and cache
    graphs: int = 0  # recorded steps and their temporaries
    other: int = 0  # context, libraries, the allocator's slack: ours, but no tensor of ours


def activation_bytes(
    shape: ModelShape,
    *,
    tp_size: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    item_size: int,
) -> int:
    """The peak that one step needs beside weights and cache.

    The larger of two moments: in a layer, where the packed tokens' residual, normed and projected
    states live together; and at the end, where the rows that sample have their logits in float32,
    edited and sorted copies included.
    """
    layer = max_num_batched_tokens * _bytes_per_token(shape, tp_size, item_size)
    num_rows = min(max_num_seqs, max_num_batched_tokens)
    logits = num_rows * shape.vocab_size * (4 * 4 + 8)  # four float32 copies, sorted indices
    states = max_num_batched_tokens * 2 * shape.hidden_size * item_size
    return max(layer, states + logits)


def graph_temporaries_bytes(
    shape: ModelShape, *, tp_size: int, max_tokens: int, max_requests: int, item_size: int
) -> int:
    """What the temporaries of recorded steps need: all sizes share the place of the largest.

    The logits of a step exist in the model's dtype and in float32; nothing is edited or sorted.
    """
    layer = max_tokens * _bytes_per_token(shape, tp_size, item_size)
    logits = max_requests * shape.vocab_size * (4 + item_size)
    states = max_tokens * 2 * shape.hidden_size * item_size
    return _GRAPH_SLACK_BYTES + max(layer, states + logits)


def _bytes_per_token(shape: ModelShape, tp_size: int, item_size: int) -> int:
    """What a layer holds at once for each token."""
    attention = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tp_size
    attention += shape.num_heads * shape.head_dim // tp_size  # the output beside the queries
    mlp = 3 * shape.intermediate_size // tp_size  # gate and up, then their product
    return (4 * shape.hidden_size + max(attention, mlp)) * item_size


def plan_gpu_blocks(memory: DeviceMemory, cache_config: CacheConfig, need: Need) -> int:
    """Blocks that bring this instance's total use to its share of the device.

    Raises:
        ConfigError: not even one request of the greatest length fits; says where memory went.
    """
    if cache_config.num_gpu_blocks_override is not None:
        return _overridden(cache_config.num_gpu_blocks_override, need)
    share = int(memory.total * cache_config.gpu_memory_utilization)
    step = memory.activations + memory.graphs
    room = min(share - memory.weights - memory.other, memory.free) - step
    num_blocks = max(0, room) // need.block_bytes
    if num_blocks < need.blocks_per_request + 1:
        raise ConfigError(_no_room(memory, cache_config, need, share, room))
    return num_blocks


def plan_cpu_blocks(available_bytes: int, cache_config: CacheConfig, need: Need) -> int:
    """Blocks for the CPU device; memory that no request could use is not taken.

    Raises:
        ConfigError: not even one request of the greatest length fits.
    """
    if cache_config.num_gpu_blocks_override is not None:
        return _overridden(cache_config.num_gpu_blocks_override, need)
    if cache_config.cpu_kv_cache_space is not None:
        limit = int(cache_config.cpu_kv_cache_space * GIB)
        source = f"--cpu-kv-cache-space {cache_config.cpu_kv_cache_space:g} GiB"
    else:
        limit = min(MAX_CPU_KV_BYTES, available_bytes // CPU_SHARE)
        source = (
            f"the smaller of {_gib(MAX_CPU_KV_BYTES)} and a quarter of the "
            f"{_gib(available_bytes)} of free memory"
        )
    num_blocks = min(limit // need.block_bytes, need.useful_blocks)
    if num_blocks < need.blocks_per_request + 1:
        wanted = (need.blocks_per_request + 1) * need.block_bytes
        raise ConfigError(
            f"one request of --max-model-len {need.max_model_len} needs {_gib(wanted)} of KV "
            f"cache, but the limit is {_gib(limit)} ({source}): lower --max-model-len "
            f"or raise --cpu-kv-cache-space"
        )
    return num_blocks


def check_swap_space(swap_space_gib: float, *, num_workers: int, host_bytes: int) -> None:
    """Refuse or warn about a swap pool that the host can hardly hold.

    The default passes on any machine: on a small one the pool is made smaller instead.

    Raises:
        ConfigError: the pools of all workers would take more than 70 % of the host's memory.
    """
    wanted = swap_space_gib * GIB * num_workers
    if swap_space_gib <= CacheConfig.swap_space and num_workers == 1:
        return
    text = (
        f"--swap-space {swap_space_gib:g} GiB for {num_workers} worker(s) takes "
        f"{wanted / host_bytes:.0%} of the host's {_gib(host_bytes)}"
    )
    if wanted > SWAP_REFUSED * host_bytes:
        raise ConfigError(f"{text}: more than {SWAP_REFUSED:.0%} is refused, lower it")
    if wanted > SWAP_WARNED * host_bytes:
        logger.warning("%s", text)


def plan_swap_blocks(
    swap_space_gib: float, need: Need, *, host_bytes: int, num_gpu_blocks: int
) -> int:
    """Blocks of the swap pool; memory comes only when a block is first used.

    Args:
        host_bytes: what the pool may take of this host at most.
        num_gpu_blocks: of the cache. A pool cannot be of use beyond every request's blocks.
    """
    limit = min(int(swap_space_gib * GIB), host_bytes)
    useful = max(need.useful_blocks, num_gpu_blocks)
    return min(limit // need.block_bytes, useful)


def _overridden(num_blocks: int, need: Need) -> int:
    if num_blocks < need.blocks_per_request + 1:
        logger.warning(
            "--num-gpu-blocks-override %d holds %d tokens, fewer than --max-model-len %d: "
            "longer requests will be refused",
            num_blocks,
            (num_blocks - 1) * need.block_size,
            need.max_model_len,
        )
    return num_blocks


def _no_room(
    memory: DeviceMemory, cache_config: CacheConfig, need: Need, share: int, room: int
) -> str:
    wanted = (need.blocks_per_request + 1) * need.block_bytes
    lines = [
        f"no room for the KV cache of one request of --max-model-len {need.max_model_len}:",
        f"  device memory            {_gib(memory.total):>12}",
        f"  free right now           {_gib(memory.free):>12}",
        f"  share of this instance   {_gib(share):>12}  "
        f"--gpu-memory-utilization {cache_config.gpu_memory_utilization:g}",
        f"  weights                  {_gib(memory.weights):>12}",
        f"  activations of a step    {_gib(memory.activations):>12}",
        f"  recorded steps           {_gib(memory.graphs):>12}",
        f"  context and libraries    {_gib(memory.other):>12}",
        f"  left for the KV cache    {_gib(max(0, room)):>12}",
        f"  one request needs        {_gib(wanted):>12}",
        "raise --gpu-memory-utilization, or lower --max-model-len, --max-num-batched-tokens "
        "or --max-num-seqs",
    ]
    return "\n".join(lines)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
