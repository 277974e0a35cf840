"""The KV cache tensors: allocation, copies between blocks, and the swap pool on the host.

Layers of one shape share a tensor [G, 2, num_blocks, block_size, K, D] (G layers, keys and values),
so that a block is copied for all of them at once. Which block belongs to whom is the core's
affair; block 0 is the null block, where padded slots point.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from executor.attention_metadata import KVCacheSpec, LayerKVCache
from executor.transfer import upload

_SWAP_CHUNK_BYTES = 64 * 2**20  # the swap pool grows by this much

Pairs = Sequence[tuple[int, int]]


def bytes_per_block(specs: Sequence[KVCacheSpec], block_size: int, dtype: torch.dtype) -> int:
    """What one block takes over all layers, keys and values."""
    elements = sum(spec.num_kv_heads * spec.head_dim for spec in specs)
    return 2 * block_size * elements * dtype.itemsize


class KVCache:
    """Owns the cache of all layers of a rank, and the pool that blocks are swapped out to."""

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        *,
        num_blocks: int,
        num_swap_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.num_bytes = num_blocks * bytes_per_block(specs, block_size, dtype)
        self.layers: list[LayerKVCache] = []
        self._device = device
        self._groups: list[Tensor] = []  # each [G, 2, num_blocks, block_size, K, D]
        places: dict[int, tuple[Tensor, int]] = {}
        for spec in dict.fromkeys(specs):
            members = [i for i, other in enumerate(specs) if other == spec]
            shape = (len(members), 2, num_blocks, block_size, *spec)
            group = _allocate(shape, dtype, device)
            self._groups.append(group)
            places.update((layer, (group, i)) for i, layer in enumerate(members))
        for layer in range(len(specs)):
            group, i = places[layer]
            self.layers.append(LayerKVCache(group[i, 0], group[i, 1]))
        self._pools = [SwapPool(group, num_swap_blocks) for group in self._groups]

    def copy_blocks(self, pairs: Pairs) -> None:
        """Copy blocks, (source, destination) each; destinations differ."""
        sources = {source for source, _ in pairs}
        if sources.isdisjoint(destination for _, destination in pairs):
            self._copy(pairs)
        else:  # a chain: in the order given
            for pair in pairs:
                self._copy([pair])

    def swap_out(self, pairs: Pairs) -> None:
        """Copy blocks to the host, (cache block, pool block) each."""
        for group, pool in zip(self._groups, self._pools, strict=True):
            pool.store(group.index_select(2, self._index([gpu for gpu, _ in pairs])), pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Copy blocks back, (pool block, cache block) each."""
        destinations = self._index([gpu for _, gpu in pairs])
        for group, pool in zip(self._groups, self._pools, strict=True):
            group.index_copy_(2, destinations, pool.load([cpu for cpu, _ in pairs]))

    def scrub(self, block_ids: Sequence[int]) -> None:
        """Replace what is not finite by zeros, so that the next owner cannot meet it."""
        index = self._index(sorted(set(block_ids)))
        for group in self._groups:
            group.index_copy_(2, index, group.index_select(2, index).nan_to_num_(0.0, 0.0, 0.0))

    def _copy(self, pairs: Pairs) -> None:
        sources = self._index([source for source, _ in pairs])
        destinations = self._index([destination for _, destination in pairs])
        for group in self._groups:
            group.index_copy_(2, destinations, group.index_select(2, sources))

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        return upload(np.array(block_ids, dtype=np.int64), self._device)


class SwapPool:
    """Swapped blocks of one group on the host, pinned where the device is a GPU.

    Memory comes in chunks, each allocated when one of its blocks is first used: a pool that is
    never used costs nothing. On a GPU the copies are queued on the stream, in order with the rest.
    """

    def __init__(self, group: Tensor, num_blocks: int) -> None:
        num_layers, two, _, *block_shape = group.shape
        self._block_shape = (num_layers, two, *block_shape)
        self._dtype = group.dtype
        self._device = group.device
        block_bytes = group.element_size() * int(np.prod(self._block_shape))
        self._chunk_size = max(1, min(num_blocks, _SWAP_CHUNK_BYTES // block_bytes))
        self._num_blocks = num_blocks
        self._chunks: dict[int, Tensor] = {}

    def store(self, blocks: Tensor, pairs: Pairs) -> None:
        """Keep ``blocks`` [G, 2, n, ...], in the order of the pairs."""
        rows = blocks.movedim(2, 0).contiguous()  # a block in one piece
        for block, (_, pool_block) in zip(rows, pairs, strict=True):
            self._at(pool_block).copy_(block, non_blocking=True)

    def load(self, pool_blocks: Sequence[int]) -> Tensor:
        """These blocks on the device, [G, 2, n, ...]."""
        rows = torch.empty(
            (len(pool_blocks), *self._block_shape), dtype=self._dtype, device=self._device
        )
        for row, pool_block in zip(rows, pool_blocks, strict=True):
            row.copy_(self._at(pool_block), non_blocking=True)
        return rows.movedim(0, 2)

    def _at(self, pool_block: int) -> Tensor:
        if not 0 <= pool_block < self._num_blocks:
            raise ValueError(f"swap block {pool_block} is outside a pool of {self._num_blocks}")
        number, place = divmod(pool_block, self._chunk_size)
        chunk = self._chunks.get(number)
        if chunk is None:
            shape = (self._chunk_size, *self._block_shape)
            is_pinned = self._device.type == "cuda"
            chunk = torch.empty(shape, dtype=self._dtype, pin_memory=is_pinned)
            self._chunks[number] = chunk
        return chunk[place]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the host they are the system's zero pages, so only blocks in use take memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
