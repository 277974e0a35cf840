"""Requests' tables of KV blocks: prefix hits, slots, forks, the sliding window, swap, release.

Block ``i`` of a request's table holds its tokens ``i * block_size`` and on. Workers carry plans
out in order, so a block counts as filled once the step that fills it is planned, and a block
freed now may be given to another request in the very next plan.

    table  [ shared prefix, full blocks ][ own full blocks ][ partial block ][ look-ahead ]
           null blocks in front of it all, once they fell behind the sliding window
"""

from dataclasses import dataclass, field

from engine_core.block_hash import BlockHasher
from engine_core.block_pool import NULL_BLOCK_ID, BlockPool
from engine_core.request import Request
from ipc.config import CacheConfig


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Blocks that already hold the first ``num_tokens`` tokens of a request; nobody's hold yet."""

    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class Transfers:
    """Copies of blocks that the next plan must carry to the workers."""

    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (gpu block, cpu block)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (cpu block, gpu block)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)


_NO_PREFIX = CachedPrefix()


class KVCacheManager:
    """Owns both block pools and the block fields of every ``Request``.

    A block that more than one table names is never written: a fork copies the partial block it
    is about to write into, and only full blocks are found by their hash.
    """

    def __init__(
        self,
        config: CacheConfig,
        hasher: BlockHasher,
        *,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
        num_lookahead_slots: int,
        max_step_tokens: int,
    ) -> None:
        self.gpu_pool = BlockPool(num_gpu_blocks)
        self.cpu_pool = BlockPool(max(1, num_cpu_blocks))
        self.block_size = config.block_size
        self._hasher = hasher
        self._is_caching = config.enable_prefix_caching
        self._window = config.sliding_window
        self._num_lookahead_slots = num_lookahead_slots
        self._max_held_blocks: int | None = None  # per request; only a window bounds it
        if self._window is not None:
            longest = self._window + 1 + max_step_tokens + num_lookahead_slots
            self._max_held_blocks = self._num_blocks(longest) + 1
        self._transfers = Transfers()

    def max_tokens_that_fit(self, max_model_len: int) -> int:
        """The longest request that the pool can hold alone, at most ``max_model_len``."""
        if self.num_blocks_for(max_model_len) <= self.gpu_pool.num_usable:
            return max_model_len
        return self.gpu_pool.num_usable * self.block_size - self._num_lookahead_slots

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens holds at most, look-ahead slots included."""
        num_blocks = self._num_blocks(num_tokens + self._num_lookahead_slots)
        if self._max_held_blocks is None:
            return num_blocks
        return min(num_blocks, self._max_held_blocks)

    def num_blocks_to_grow(self, request: Request, num_tokens: int) -> int:
        """Blocks that ``request`` still lacks before it can hold ``num_tokens`` tokens."""
        num_blocks = self._num_blocks(num_tokens + self._num_lookahead_slots)
        num_missing = num_blocks - len(request.block_ids)
        if self._max_held_blocks is not None:
            num_held = len(request.block_ids) - request.num_released_blocks
            num_missing = min(num_missing, self._max_held_blocks - num_held)
        return max(0, num_missing)

    def last_decode_position(self, request: Request) -> int:
        """Tokens that ``request`` may have computed with the slots it has, look-ahead kept."""
        return len(request.block_ids) * self.block_size - self._num_lookahead_slots

    # ------------------------------------------------------------ giving blocks

    def find_cached_prefix(self, request: Request) -> CachedPrefix:
        """The longest cached prefix that leaves at least one token to compute. Takes no hold."""
        if not self._is_caching or request.wants_prompt_logprobs:
            return _NO_PREFIX
        if request.params.skip_reading_prefix_cache:
            return _NO_PREFIX
        self._extend_hashes(request)
        hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        if self._window is None:
            block_ids = _find_whole(self.gpu_pool, hashes)
        else:
            block_ids = _find_behind_window(self.gpu_pool, hashes, self.block_size, self._window)
        return CachedPrefix(block_ids, len(block_ids) * self.block_size)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, prefix: CachedPrefix = _NO_PREFIX
    ) -> list[int] | None:
        """Append blocks until ``num_new_tokens`` more tokens and the look-ahead have slots.

        All or nothing, but for blocks behind the window, which are given back first.

        Args:
            prefix: blocks to begin a table with; the request must not have one yet.

        Returns:
            The new block ids (the prefix's not among them), or None when blocks are short.
        """
        pool, table = self.gpu_pool, request.block_ids
        start = prefix.num_tokens or request.num_computed_tokens
        if self._window is not None:
            self._release_behind_window(request, start, self._window)
        wanted = self._num_blocks(start + num_new_tokens + self._num_lookahead_slots)
        num_missing = max(0, wanted - len(table) - len(prefix.block_ids))
        written = start // self.block_size
        is_shared = written < len(table) and pool.ref_count(table[written]) > 1
        if num_missing + is_shared > pool.num_free - pool.num_free_among(prefix.block_ids):
            return None
        if prefix.block_ids:
            assert not table, "a prefix begins a table"
            pool.hold(prefix.block_ids)
            table.extend(prefix.block_ids)
            request.num_remembered_blocks = len(table)
            request.num_released_blocks = _num_leading_nulls(table)
        if is_shared:
            assert request.row is None, "a worker learns of new blocks, never of replaced ones"
            source, (destination,) = table[written], pool.allocate(1)
            self._transfers.copies.append((source, destination))
            table[written] = destination
            pool.free((source,))
        new_block_ids = pool.allocate(num_missing)
        table.extend(new_block_ids)
        return new_block_ids

    def can_fork(self, parent: Request, num_tokens: int) -> bool:
        """Whether ``parent`` still holds what a child that computed ``num_tokens`` needs."""
        if self._window is None:
            return True
        first_needed = max(0, num_tokens - self._window + 1) // self.block_size
        return parent.num_released_blocks <= first_needed

    def fork(self, parent: Request, child: Request, num_tokens: int) -> None:
        """Let ``child`` share the blocks of the first ``num_tokens`` tokens of ``parent``."""
        assert not child.block_ids, "a fork begins a table"
        child.block_ids.extend(parent.block_ids[: self._num_blocks(num_tokens)])
        self.gpu_pool.hold(child.block_ids)
        if self._is_caching:
            self._extend_hashes(child)
        child.num_released_blocks = _num_leading_nulls(child.block_ids)
        child.num_remembered_blocks = min(
            parent.num_remembered_blocks, num_tokens // self.block_size
        )

    def take_transfers(self) -> Transfers:
        """The copies that piled up since the last call, for the plan being built."""
        transfers, self._transfers = self._transfers, Transfers()
        return transfers

    # ------------------------------------------------------------ remembering

    def remember(self, request: Request) -> None:
        """Let others find the full blocks whose tokens are known and computed by now."""
        if not self._is_caching or request.is_tainted or not request.block_ids:
            return
        num_full = min(request.num_tokens, request.num_computed_tokens) // self.block_size
        if num_full <= request.num_remembered_blocks:
            return
        self._extend_hashes(request)
        for i in range(request.num_remembered_blocks, num_full):
            if request.block_ids[i] != NULL_BLOCK_ID:
                self.gpu_pool.remember(request.block_ids[i], request.block_hashes[i])
        request.num_remembered_blocks = num_full

    def forget(self, request: Request) -> None:
        """Let nobody find blocks of ``request`` any more: NaN was seen in what they lead to."""
        request.is_tainted = True
        self.gpu_pool.forget(request.block_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget every prefix; False, and nothing is forgotten, while blocks are held."""
        if self.gpu_pool.num_held:
            return False
        self.gpu_pool.forget_all()
        self.cpu_pool.forget_all()
        return True

    # ------------------------------------------------------------ taking blocks back

    def free(self, request: Request) -> None:
        """Give back every block, on both sides; what can be remembered is remembered."""
        self.remember(request)
        self.gpu_pool.free(reversed(request.block_ids))
        self.cpu_pool.free(reversed(request.cpu_block_ids))
        request.block_ids.clear()
        request.cpu_block_ids.clear()
        request.num_remembered_blocks = 0
        request.num_released_blocks = 0

    def swap_out(self, request: Request) -> bool:
        """Move what ``request`` has computed to host memory; False when that is full.

        Full blocks that host memory still remembers, say from a sibling, are not copied again.
        """
        self.remember(request)
        table = request.block_ids[: self._num_blocks(request.num_computed_tokens)]
        hashes: list[bytes] = [] if request.is_tainted else request.block_hashes
        num_full = min(len(hashes), request.num_remembered_blocks)
        found = [
            self.cpu_pool.find(hashes[i]) if i < num_full and block_id != NULL_BLOCK_ID else None
            for i, block_id in enumerate(table)
        ]
        known = [cpu_id for cpu_id in found if cpu_id is not None]
        num_missing = len(table) - table.count(NULL_BLOCK_ID) - len(known)
        if num_missing > self.cpu_pool.num_free - self.cpu_pool.num_free_among(known):
            return False
        self.cpu_pool.hold(known)
        fresh = iter(self.cpu_pool.allocate(num_missing))
        cpu_table = []
        for i, (block_id, cpu_id) in enumerate(zip(table, found, strict=True)):
            if block_id == NULL_BLOCK_ID:
                cpu_table.append(NULL_BLOCK_ID)
            elif cpu_id is not None:
                cpu_table.append(cpu_id)
            else:
                cpu_table.append(next(fresh))
                self._transfers.swap_out.append((block_id, cpu_table[i]))
                if i < num_full:
                    self.cpu_pool.remember(cpu_table[i], hashes[i])
        self.free(request)
        request.cpu_block_ids.extend(cpu_table)
        return True

    def num_swapped_blocks(self, request: Request) -> int:
        """Blocks that ``request`` holds in host memory."""
        return len(request.cpu_block_ids) - request.cpu_block_ids.count(NULL_BLOCK_ID)

    def swap_in(self, request: Request, num_new_tokens: int) -> bool:
        """Move ``request`` back, with slots for more tokens; False when blocks are short.

        Full blocks that device memory still remembers are shared instead of copied.
        """
        pool, cpu_table = self.gpu_pool, request.cpu_block_ids
        num_tokens = request.num_computed_tokens + num_new_tokens + self._num_lookahead_slots
        hashes = request.block_hashes if self._is_caching and not request.is_tainted else []
        num_full = min(len(hashes), request.num_computed_tokens // self.block_size)
        table = [
            pool.find(hashes[i]) if i < num_full and cpu_id != NULL_BLOCK_ID else None
            for i, cpu_id in enumerate(cpu_table)
        ]
        known = [block_id for block_id in table if block_id is not None]
        num_nulls = cpu_table.count(NULL_BLOCK_ID)
        num_missing = self._num_blocks(num_tokens) - num_nulls - len(known)
        if num_missing > pool.num_free - pool.num_free_among(known):
            return False
        pool.hold(known)
        fresh = iter(pool.allocate(num_missing))
        for block_id, cpu_id in zip(table, cpu_table, strict=True):
            if cpu_id == NULL_BLOCK_ID:
                request.block_ids.append(NULL_BLOCK_ID)
            elif block_id is not None:
                request.block_ids.append(block_id)
            else:
                request.block_ids.append(next(fresh))
                self._transfers.swap_in.append((cpu_id, request.block_ids[-1]))
        request.block_ids.extend(fresh)
        request.num_released_blocks = num_nulls
        self.cpu_pool.free(reversed(cpu_table))
        cpu_table.clear()
        return True

    # ------------------------------------------------------------ inside

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full blocks of known tokens that were not hashed yet."""
        group, hashes, size = request.group, request.block_hashes, self.block_size
        if not hashes:
            if not group.prompt_hashes:
                group.prompt_hashes = self._hasher.extend(group.root_hash, group.prompt_token_ids)
            hashes.extend(group.prompt_hashes)
        num_full = request.num_tokens // size
        if len(hashes) < num_full:
            parent = hashes[-1] if hashes else group.root_hash
            token_ids = request.token_slice(len(hashes) * size, num_full * size)
            hashes.extend(self._hasher.extend(parent, token_ids))

    def _release_behind_window(
        self, request: Request, num_computed_tokens: int, window: int
    ) -> None:
        """Give back blocks that no query from position ``num_computed_tokens`` on looks at.

        One token more than needed is kept: branches that fork in this very plan begin one
        position earlier than their leader.
        """
        num_behind = max(0, num_computed_tokens - window) // self.block_size
        num_behind = min(num_behind, len(request.block_ids))
        if num_behind <= request.num_released_blocks:
            return
        self.remember(request)
        behind = range(request.num_released_blocks, num_behind)
        self.gpu_pool.free([request.block_ids[i] for i in behind])
        for i in behind:
            request.block_ids[i] = NULL_BLOCK_ID
        request.num_released_blocks = num_behind


def _num_leading_nulls(table: list[int]) -> int:
    for i, block_id in enumerate(table):
        if block_id != NULL_BLOCK_ID:
            return i
    return len(table)


def _find_whole(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks of the longest prefix all of which is cached."""
    block_ids = []
    for block_hash in hashes:
        block_id = pool.find(block_hash)
        if block_id is None:
            break
        block_ids.append(block_id)
    return block_ids


def _find_behind_window(
    pool: BlockPool, hashes: list[bytes], block_size: int, window: int
) -> list[int]:
    """Like ``_find_whole``, but only what the next token looks back at must be cached."""
    first = end = len(hashes)  # blocks first..end are cached
    while first > max(0, end * block_size - window + 1) // block_size:
        first -= 1
        if pool.find(hashes[first]) is None:
            end = first
    found = [pool.find(block_hash) for block_hash in hashes[first:end]]
    return [NULL_BLOCK_ID] * first + [i for i in found if i is not None] if end else []
