"""Names for prefixes: a chain of keyed hashes over full blocks of tokens.

A block's hash covers its tokens and, through its parent's hash, everything before it; the root
covers what else decides the content of the cache: adapter, salt, images. The key is secret and
drawn by each core, so nobody can make two prefixes collide from outside, nor test for a hash.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

DIGEST_BYTES = 16  # 128 bits: an accidental collision is out of reach
_TOKEN_BYTES = array("I").itemsize


@dataclass(frozen=True, kw_only=True)
class ExtraKeys:
    """What besides tokens decides the content of a block."""

    adapter_id: int | None = None
    cache_salt: str | None = None
    image_digests: tuple[bytes, ...] = ()


class BlockHasher:
    """Computes hashes under one secret key."""

    def __init__(self, secret: bytes, block_size: int) -> None:
        self._keyed = blake2b(key=secret, digest_size=DIGEST_BYTES)
        self._block_size = block_size

    def root(self, extra: ExtraKeys) -> bytes:
        """The parent of a first block. Every field is length-prefixed: no two sets run together."""
        digest = self._keyed.copy()
        salt = b"" if extra.cache_salt is None else b"s" + extra.cache_salt.encode()
        adapter = b"" if extra.adapter_id is None else b"a%d" % extra.adapter_id
        for field in (adapter, salt, *extra.image_digests):
            digest.update(len(field).to_bytes(8, "little") + field)
        return digest.digest()

    def extend(self, parent: bytes, token_ids: Sequence[int]) -> list[bytes]:
        """Hashes of the full blocks that ``token_ids`` hold, the first one a child of ``parent``.

        Tokens after the last full block are left out.
        """
        data = array("I", token_ids).tobytes()
        width = self._block_size * _TOKEN_BYTES
        hashes = []
        for start in range(0, len(data) - width + 1, width):
            digest = self._keyed.copy()  # half the price of a new one with the same key
            digest.update(parent + data[start : start + width])
            parent = digest.digest()
            hashes.append(parent)
        return hashes
