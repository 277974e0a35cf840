"""Tables of blocks: prefixes, slots, forks, windows, swap."""

from typing import Any

from engine_core.block_hash import BlockHasher, ExtraKeys
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request, RequestGroup, make_branch
from ipc.config import CacheConfig
from ipc.messages import RowParams
from ipc.sampling_params import SamplingParams

SIZE = 8
HASHER = BlockHasher(b"secret", SIZE)


def make_kv_cache(
    num_gpu_blocks: int = 11,
    num_cpu_blocks: int = 11,
    *,
    num_lookahead_slots: int = 0,
    max_step_tokens: int = 16,
    **cache: Any,
) -> KVCacheManager:
    return KVCacheManager(
        CacheConfig(block_size=SIZE, **cache),
        HASHER,
        num_gpu_blocks=num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        num_lookahead_slots=num_lookahead_slots,
        max_step_tokens=max_step_tokens,
    )


def make_requests(num_tokens: int, n: int = 1, salt: str | None = None, **params: Any) -> Any:
    prompt = list(range(num_tokens))
    sampling = SamplingParams(n=n, seed=1, **params)
    root = HASHER.root(ExtraKeys(cache_salt=salt))
    group = RequestGroup(b"c", "r", prompt, sampling, frozenset(), 0.0, root)
    row = RowParams(1, 1.0, num_prompt_logprobs=sampling.prompt_logprobs)
    return [make_branch(group, i, row, order=(0, 1, i), max_output_tokens=99) for i in range(n)]


def compute(kv_cache: KVCacheManager, request: Request, num_tokens: int) -> list[int]:
    """Let a step compute so many tokens of a request; the new blocks."""
    blocks = kv_cache.allocate_slots(request, num_tokens)
    assert blocks is not None
    request.num_computed_tokens += num_tokens
    kv_cache.remember(request)
    return blocks


def test_blocks_are_appended_as_tokens_need_them() -> None:
    kv_cache = make_kv_cache()
    (request,) = make_requests(20)
    assert len(compute(kv_cache, request, 8)) == 1
    assert len(compute(kv_cache, request, 1)) == 1
    assert compute(kv_cache, request, 7) == []
    assert kv_cache.gpu_pool.num_held == 2


def test_slots_are_given_all_or_none() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=3)
    (request,) = make_requests(40)
    assert kv_cache.allocate_slots(request, 17) is None
    assert request.block_ids == []
    assert kv_cache.gpu_pool.num_free == 2


def test_look_ahead_slots_are_reserved_behind_the_new_tokens() -> None:
    kv_cache = make_kv_cache(num_lookahead_slots=3)
    (request,) = make_requests(20)
    assert len(compute(kv_cache, request, 6)) == 2
    assert kv_cache.last_decode_position(request) == 13


def test_a_prefix_is_found_up_to_the_last_full_block_but_one_token() -> None:
    kv_cache = make_kv_cache()
    (first,) = make_requests(16)
    compute(kv_cache, first, 16)
    for num_tokens, expected in ((16, 8), (17, 16), (30, 16), (7, 0)):
        (second,) = make_requests(num_tokens)
        prefix = kv_cache.find_cached_prefix(second)
        assert prefix.num_tokens == expected
        assert prefix.block_ids == first.block_ids[: expected // SIZE]


def test_a_found_prefix_is_held_once_it_begins_a_table() -> None:
    kv_cache = make_kv_cache()
    (first,) = make_requests(16)
    compute(kv_cache, first, 16)
    kv_cache.free(first)
    assert kv_cache.gpu_pool.num_free_cached == 2
    (second,) = make_requests(20)
    prefix = kv_cache.find_cached_prefix(second)
    new = kv_cache.allocate_slots(second, 4, prefix)
    assert new is not None
    assert second.block_ids == [*prefix.block_ids, *new]
    assert kv_cache.gpu_pool.num_held == 3


def test_nothing_is_found_under_another_salt_or_when_asked_not_to_look() -> None:
    kv_cache = make_kv_cache()
    (first,) = make_requests(16)
    compute(kv_cache, first, 16)
    assert kv_cache.find_cached_prefix(make_requests(17)[0]).num_tokens == 16
    for other in (
        make_requests(17, salt="other"),
        make_requests(17, skip_reading_prefix_cache=True),
        make_requests(17, prompt_logprobs=1),
    ):
        assert kv_cache.find_cached_prefix(other[0]).num_tokens == 0


def test_only_known_and_computed_tokens_are_remembered() -> None:
    kv_cache = make_kv_cache()
    (request,) = make_requests(10)
    compute(kv_cache, request, 10)
    request.num_computed_tokens += 6  # six placeholders: their ids are not known yet
    kv_cache.remember(request)
    assert request.num_remembered_blocks == 1
    request.output_token_ids.extend(range(6))
    kv_cache.remember(request)
    assert request.num_remembered_blocks == 2


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=4)
    (first,) = make_requests(24)
    compute(kv_cache, first, 24)
    start = first.block_ids[0]
    kv_cache.free(first)
    (other,) = make_requests(16, salt="other")
    compute(kv_cache, other, 16)
    prefix = kv_cache.find_cached_prefix(make_requests(24)[0])
    assert prefix.block_ids == [start]


def test_a_fork_shares_full_blocks_and_copies_the_partial_one_it_writes_into() -> None:
    kv_cache = make_kv_cache()
    parent, child = make_requests(12, n=2)
    compute(kv_cache, parent, 12)
    kv_cache.fork(parent, child, 11)
    child.num_computed_tokens = 11
    assert kv_cache.allocate_slots(child, 1) == []
    assert child.block_ids[0] == parent.block_ids[0]
    assert child.block_ids[1] != parent.block_ids[1]
    assert kv_cache.take_transfers().copies == [(parent.block_ids[1], child.block_ids[1])]
    assert kv_cache.take_transfers().copies == []
    kv_cache.gpu_pool.check_invariants([parent.block_ids, child.block_ids])


def test_a_fork_at_a_block_border_copies_nothing() -> None:
    kv_cache = make_kv_cache()
    parent, child = make_requests(9, n=2)
    compute(kv_cache, parent, 9)
    kv_cache.fork(parent, child, 8)
    child.num_computed_tokens = 8
    assert len(kv_cache.allocate_slots(child, 1) or ()) == 1
    assert kv_cache.take_transfers().copies == []


def test_four_branches_take_far_fewer_blocks_than_four_requests() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=64)
    parent, *children = make_requests(80, n=4)
    compute(kv_cache, parent, 80)
    for child in children:
        kv_cache.fork(parent, child, 79)
        child.num_computed_tokens = 79
        compute(kv_cache, child, 1)
    assert kv_cache.gpu_pool.num_held == 10 + 3


def test_blocks_behind_the_window_are_given_back_while_the_request_runs() -> None:
    kv_cache = make_kv_cache(sliding_window=8, enable_prefix_caching=False)
    (request,) = make_requests(80)
    most = 0
    for _ in range(40):
        compute(kv_cache, request, 2)
        most = max(most, kv_cache.gpu_pool.num_held)
    assert most <= kv_cache.num_blocks_for(80) <= 5
    assert request.block_ids[: request.num_released_blocks] == [0] * request.num_released_blocks
    assert request.num_released_blocks >= 7


def test_with_a_window_only_what_it_sees_must_be_cached() -> None:
    kv_cache = make_kv_cache(sliding_window=8)
    (first,) = make_requests(40)
    for _ in range(5):
        compute(kv_cache, first, 8)
    table = list(first.block_ids)
    kv_cache.free(first)
    # Take blocks until those that fell behind the window first are forgotten.
    (other,) = make_requests(64, salt="other")
    compute(kv_cache, other, 64)
    prefix = kv_cache.find_cached_prefix(make_requests(41)[0])
    assert prefix.num_tokens == 40
    assert prefix.block_ids == [0, 0, 0, 0, table[4]]


def test_a_window_bounds_what_a_request_can_need() -> None:
    windowed, whole = make_kv_cache(sliding_window=8), make_kv_cache()
    assert windowed.max_tokens_that_fit(10_000) == 10_000
    assert whole.max_tokens_that_fit(10_000) == 80


def test_swapping_out_and_in_keeps_what_was_computed() -> None:
    kv_cache = make_kv_cache(enable_prefix_caching=False)
    (request,) = make_requests(20)
    compute(kv_cache, request, 20)
    gpu_before = list(request.block_ids)
    assert kv_cache.swap_out(request)
    assert kv_cache.gpu_pool.num_held == 0
    assert kv_cache.cpu_pool.num_held == 3
    cpu_table = list(request.cpu_block_ids)
    assert kv_cache.take_transfers().swap_out == list(zip(gpu_before, cpu_table, strict=True))
    assert kv_cache.swap_in(request, 1)
    assert kv_cache.cpu_pool.num_held == 0
    swapped_in = kv_cache.take_transfers().swap_in
    assert swapped_in == list(zip(cpu_table, request.block_ids, strict=True))


def test_full_host_memory_refuses_a_swap_and_changes_nothing() -> None:
    kv_cache = make_kv_cache(num_cpu_blocks=3)
    (request,) = make_requests(20)
    compute(kv_cache, request, 20)
    assert not kv_cache.swap_out(request)
    assert len(request.block_ids) == 3
    assert kv_cache.cpu_pool.num_free == 2
    assert kv_cache.take_transfers().swap_out == []


def test_siblings_share_their_prompt_in_host_memory_and_after_it() -> None:
    kv_cache = make_kv_cache()
    parent, child = make_requests(20, n=2)
    compute(kv_cache, parent, 20)
    kv_cache.fork(parent, child, 19)
    child.num_computed_tokens = 19
    compute(kv_cache, child, 1)
    assert kv_cache.swap_out(parent)
    assert kv_cache.swap_out(child)
    assert kv_cache.cpu_pool.num_held == 4  # two full blocks once, two partial ones
    assert kv_cache.swap_in(parent, 1)
    assert kv_cache.swap_in(child, 1)
    assert parent.block_ids[:2] == child.block_ids[:2]
    assert kv_cache.gpu_pool.num_held == 4


def test_blocks_of_a_request_with_nan_are_never_found() -> None:
    kv_cache = make_kv_cache()
    (request,) = make_requests(16)
    compute(kv_cache, request, 16)
    kv_cache.forget(request)
    kv_cache.free(request)
    assert kv_cache.find_cached_prefix(make_requests(17)[0]).num_tokens == 0
    assert kv_cache.gpu_pool.num_free_cached == 0


def test_the_prefix_cache_is_reset_only_when_nothing_is_held() -> None:
    kv_cache = make_kv_cache()
    (request,) = make_requests(16)
    compute(kv_cache, request, 16)
    assert not kv_cache.reset_prefix_cache()
    kv_cache.free(request)
    assert kv_cache.reset_prefix_cache()
    assert kv_cache.find_cached_prefix(make_requests(17)[0]).num_tokens == 0
