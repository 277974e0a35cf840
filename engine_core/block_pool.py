"""The KV blocks of one memory: who holds each, and which prefix it still remembers.

Knows block ids and hashes, never requests or tensors. The same class keeps the books of device
memory and of the host memory that preempted requests are swapped to.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ipc.errors import OutOfBlocksError

NULL_BLOCK_ID = 0


@dataclass(slots=True)
class Block:
    """State of one block."""

    ref_count: int = 0
    prefix_hash: bytes | None = None


class BlockPool:
    """Owns every block of one memory.

    A block is *held* (``ref_count > 0``) or *free* (``ref_count == 0`` and in ``_free``). A free
    block may still remember a prefix, until it is handed out again. Block 0 is the null block:
    padded slots point at it and it stands in for blocks that fell behind a sliding window, so it
    is never held, freed or remembered; methods that take ids pass over it.
    """

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [Block() for _ in range(num_blocks)]
        self._block_id_by_hash: dict[bytes, int] = {}
        # Free ids, next victim first. An OrderedDict because a prefix hit takes a block out of
        # the middle, which must be O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._num_free_cached = 0

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return len(self._blocks) - 1

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` could hand out."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds."""
        return self.num_usable - len(self._free)

    @property
    def num_free_cached(self) -> int:
        """Free blocks that still remember a prefix."""
        return self._num_free_cached

    def ref_count(self, block_id: int) -> int:
        """How many holders a block has."""
        return self._blocks[block_id].ref_count

    def num_free_among(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks are free: holding them would take so many from the pool."""
        if not block_ids:
            return 0
        blocks = self._blocks
        return sum(1 for i in block_ids if i != NULL_BLOCK_ID and blocks[i].ref_count == 0)

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out ``num_blocks`` blocks, least recently freed first, forgetting their prefixes.

        All or nothing: when it raises, no block has changed hands.

        Raises:
            OutOfBlocksError: fewer are free. Running short is normal, so callers ask
                ``num_free`` first; reaching this is a bug in the caller.
        """
        if num_blocks > len(self._free):
            raise OutOfBlocksError(f"{num_blocks} blocks wanted, {len(self._free)} free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.ref_count == 0, f"block {block_id} is free yet held {block.ref_count}x"
            block.ref_count = 1
            if block.prefix_hash is not None:
                del self._block_id_by_hash[block.prefix_hash]
                block.prefix_hash = None
                self._num_free_cached -= 1
        return block_ids

    def hold(self, block_ids: Iterable[int]) -> None:
        """Add a holder to each block, taking free ones out of reach of ``allocate``."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK_ID:
                continue
            block = self._blocks[block_id]
            if block.ref_count == 0:
                del self._free[block_id]
                if block.prefix_hash is not None:
                    self._num_free_cached -= 1
            block.ref_count += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Take a holder from each block. Blocks freed first are handed out again first.

        Callers pass a request's blocks in reverse, so that the start of a prefix outlives its
        end. Blocks that remember nothing go to the head of the line: nobody misses them.
        """
        for block_id in block_ids:
            if block_id == NULL_BLOCK_ID:
                continue
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} is freed but nobody holds it"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.prefix_hash is None:
                    self._free.move_to_end(block_id, last=False)
                else:
                    self._num_free_cached += 1

    def remember(self, block_id: int, prefix_hash: bytes) -> None:
        """Note which prefix a held block ends; the first block with a hash keeps it."""
        block = self._blocks[block_id]
        assert block.ref_count > 0, f"block {block_id} is free: its content may change"
        if block.prefix_hash is None and prefix_hash not in self._block_id_by_hash:
            block.prefix_hash = prefix_hash
            self._block_id_by_hash[prefix_hash] = block_id

    def find(self, prefix_hash: bytes) -> int | None:
        """The block that ends this prefix, held or free; it may be handed out unless held."""
        return self._block_id_by_hash.get(prefix_hash)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Let nobody find these blocks any more: their content is not to be trusted."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.prefix_hash is not None:
                del self._block_id_by_hash[block.prefix_hash]
                block.prefix_hash = None
                if block.ref_count == 0:
                    self._num_free_cached -= 1

    def forget_all(self) -> None:
        """Forget every prefix, of held blocks too."""
        for block_id in list(self._block_id_by_hash.values()):
            self._blocks[block_id].prefix_hash = None
        self._block_id_by_hash.clear()
        self._num_free_cached = 0

    def check_invariants(self, holders: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with ``holders``, every table in use."""
        expected = [0] * len(self._blocks)
        for table in holders:
            for block_id in table:
                expected[block_id] += block_id != NULL_BLOCK_ID
        counted = [block.ref_count for block in self._blocks]
        assert counted == expected, f"reference counts are {counted}, holders add up to {expected}"
        free = {i for i in range(1, len(self._blocks)) if counted[i] == 0}
        assert set(self._free) == free, f"free list {set(self._free)}, unheld blocks {free}"
        remembered = {
            b.prefix_hash: i for i, b in enumerate(self._blocks) if b.prefix_hash is not None
        }
        assert remembered == self._block_id_by_hash, "hash index and blocks differ"
        num_free_cached = sum(1 for i in remembered.values() if i in self._free)
        assert num_free_cached == self._num_free_cached, "count of free cached blocks is off"
