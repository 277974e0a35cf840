"""Names of prefixes."""

import pytest

from engine_core.block_hash import DIGEST_BYTES, BlockHasher, ExtraKeys

TOKENS = list(range(100, 120))


def make_hasher(secret: bytes = b"secret") -> BlockHasher:
    return BlockHasher(secret, block_size=8)


def chain(hasher: BlockHasher, extra: ExtraKeys, tokens: list[int]) -> list[bytes]:
    return hasher.extend(hasher.root(extra), tokens)


def test_only_full_blocks_are_hashed_with_128_bits() -> None:
    hashes = chain(make_hasher(), ExtraKeys(), TOKENS)
    assert [len(h) for h in hashes] == [DIGEST_BYTES] * 2
    assert DIGEST_BYTES * 8 >= 128


def test_a_chain_may_be_extended_piece_by_piece() -> None:
    hasher = make_hasher()
    whole = chain(hasher, ExtraKeys(), TOKENS)
    first = chain(hasher, ExtraKeys(), TOKENS[:8])
    assert first + hasher.extend(first[-1], TOKENS[8:16]) == whole


def test_a_change_in_the_first_block_changes_every_hash() -> None:
    ours = chain(make_hasher(), ExtraKeys(), TOKENS)
    theirs = chain(make_hasher(), ExtraKeys(), [0, *TOKENS[1:]])
    assert not set(ours) & set(theirs)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(ExtraKeys(adapter_id=1), id="adapter"),
        pytest.param(ExtraKeys(cache_salt="1"), id="salt"),
        pytest.param(ExtraKeys(cache_salt=""), id="empty salt is not no salt"),
        pytest.param(ExtraKeys(image_digests=(b"1",)), id="image"),
        pytest.param(ExtraKeys(image_digests=(b"", b"1")), id="two images"),
    ],
)
def test_whatever_decides_the_content_decides_the_name(extra: ExtraKeys) -> None:
    hasher = make_hasher()
    assert chain(hasher, extra, TOKENS) != chain(hasher, ExtraKeys(), TOKENS)


def test_fields_of_extra_keys_do_not_run_together() -> None:
    hasher = make_hasher()
    roots = [
        hasher.root(ExtraKeys(image_digests=(b"ab", b"c"))),
        hasher.root(ExtraKeys(image_digests=(b"a", b"bc"))),
        hasher.root(ExtraKeys(adapter_id=12, cache_salt="3")),
        hasher.root(ExtraKeys(adapter_id=1, cache_salt="23")),
    ]
    assert len(set(roots)) == len(roots)


def test_another_secret_gives_other_names() -> None:
    ours, theirs = make_hasher(b"one"), make_hasher(b"two")
    assert chain(ours, ExtraKeys(), TOKENS) != chain(theirs, ExtraKeys(), TOKENS)
