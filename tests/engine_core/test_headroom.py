"""Room to grow."""

from typing import Any

from engine_core.headroom import Headroom
from engine_core.request import Request
from ipc.config import SchedulerConfig
from tests.engine_core.test_kv_cache_manager import compute, make_kv_cache, make_requests


def make_headroom(kv_cache: Any, **config: Any) -> Headroom:
    return Headroom(SchedulerConfig(**config), kv_cache)


def make_request(num_tokens: int, max_output_tokens: int = 99) -> Request:
    (request,) = make_requests(num_tokens)
    request.max_num_tokens = num_tokens + max_output_tokens
    return request


def test_alone_there_is_always_room() -> None:
    headroom = make_headroom(make_kv_cache(num_gpu_blocks=2))
    assert headroom.has_room(make_request(80), 0, running=[])


def test_room_is_left_for_everyone_to_grow_by_sixteen_tokens() -> None:
    running = make_request(8)
    for num_gpu_blocks, expected in ((1 + 3 + 3, True), (1 + 3 + 2, False)):
        kv_cache = make_kv_cache(num_gpu_blocks=num_gpu_blocks)
        running.block_ids.clear()
        running.num_computed_tokens = 0
        compute(kv_cache, running, 8)
        headroom = make_headroom(kv_cache)
        headroom.begin_step()
        assert headroom.has_room(make_request(8), 0, [running]) is expected


def test_who_will_end_soon_needs_less() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=4)
    running = make_request(6, max_output_tokens=2)
    compute(kv_cache, running, 6)
    headroom = make_headroom(kv_cache)
    headroom.begin_step()
    assert headroom.has_room(make_request(8, max_output_tokens=4), 0, [running])


def test_each_preemption_doubles_the_room_that_is_asked_for() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=10)
    running = make_request(8)
    compute(kv_cache, running, 8)
    headroom = make_headroom(kv_cache)
    headroom.begin_step()
    newcomer = make_request(8)
    assert headroom.has_room(newcomer, 0, [running])
    newcomer.num_preemptions = 1
    assert not headroom.has_room(newcomer, 0, [running])


def test_blocks_that_are_shared_cost_no_room() -> None:
    kv_cache = make_kv_cache(num_gpu_blocks=6)
    running = make_request(8)
    compute(kv_cache, running, 8)
    headroom = make_headroom(kv_cache)
    headroom.begin_step()
    assert not headroom.has_room(make_request(8), 0, [running])
    assert headroom.has_room(make_request(8), 1, [running])


def test_prompts_gather_only_while_something_runs() -> None:
    headroom = make_headroom(make_kv_cache(), delay_factor=0.5)
    headroom.note_prompt_latency(4.0)
    waiting, running = [make_request(8)], [make_request(8)]
    assert headroom.is_too_early(waiting, running, now_s=2.0)
    assert not headroom.is_too_early(waiting, running, now_s=2.1)
    assert not headroom.is_too_early(waiting, [], now_s=0.0)
