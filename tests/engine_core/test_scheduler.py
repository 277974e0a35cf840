"""What a step holds. A step is a function call: no model, no sockets."""

from typing import Any

import pytest

from engine_core.headroom import AdapterLimit
from engine_core.scheduler import Scheduler
from ipc.errors import ProtocolError
from ipc.messages import EngineOutput, FinishReason, ModelRunnerOutput, SchedulerOutput, encoder
from tests.engine_core.builders import CLIENT, Rig, Setup, make_request


def plan_tokens(rig: Rig) -> list[dict[str, int]]:
    """Tokens per request of each plan so far; rows are named through the plans themselves."""
    names = {tuple(request.prompt_token_ids): req_id for req_id, request in rig.requests.items()}
    by_row: dict[int, str] = {}
    steps = []
    for plan in rig.executor.plans:
        for new in plan.new_rows:
            by_row[new.row] = names[tuple(new.token_ids[: new.num_prompt_tokens])]
        counts = plan.num_new_tokens or [1] * len(plan.rows)
        steps.append({by_row[r]: n for r, n in zip(plan.rows, counts, strict=True)})
    return steps


def last_plan(rig: Rig) -> SchedulerOutput:
    return rig.executor.plans[-1]


@pytest.mark.parametrize(
    ("prompt_len", "expected"),
    [
        pytest.param(4, [4, 1, 1], id="prompt fits: prefill once, then decode"),
        pytest.param(40, [16, 16, 8, 1], id="long prompt: chunks, a short last chunk, decode"),
        pytest.param(32, [16, 16, 1], id="prompt ends exactly on the budget"),
    ],
)
def test_prompt_is_chunked_by_the_token_budget(prompt_len: int, expected: list[int]) -> None:
    rig = Rig(max_num_batched_tokens=16, max_num_seqs=4, max_steps_in_flight=1)
    rig.add(make_request("a", prompt_len, max_tokens=8))
    for _ in expected:
        rig.step()
    assert plan_tokens(rig) == [{"a": n} for n in expected]


def test_streams_bear_short_chunks_of_a_prompt_once_the_costs_are_known() -> None:
    # A decode takes 4 ms and 500 prompt tokens took 14: twice a decode's time is that of 285.
    rig = Rig(
        max_num_batched_tokens=2048,
        max_model_len=2048,
        num_gpu_blocks=600,
        max_steps_in_flight=1,
        max_prefill_slowdown=2.0,
        enable_prefix_caching=False,
    )
    rig.add(make_request("stream", 500, max_tokens=60))
    for _ in range(40):
        rig.step()

    rig.add(make_request("the prompt", 700, max_tokens=2))
    for _ in range(4):
        rig.step()

    chunks = [step["the prompt"] for step in plan_tokens(rig) if "the prompt" in step]
    assert chunks == [pytest.approx(283, abs=5)] * 2 + [700 - sum(chunks[:2]), 1]
    assert plan_tokens(rig)[0] == {"stream": 500}  # nobody waited for this one


def test_a_long_queue_gets_the_whole_budget() -> None:
    rig = Rig(
        max_num_batched_tokens=2048,
        max_model_len=128,
        max_num_seqs=80,
        num_gpu_blocks=2000,
        enable_prefix_caching=False,
        max_steps_in_flight=1,
        max_prefill_slowdown=2.0,
    )
    rig.add(make_request("stream", 100, max_tokens=20))
    for _ in range(5):
        rig.step()
    for i in range(70):
        rig.add(make_request(f"r{i}", 100, max_tokens=2))

    rig.step()

    assert sum(last_plan(rig).num_new_tokens) == 2048


def test_newest_request_gives_way_when_blocks_run_out() -> None:
    # Two requests of two blocks each fill the pool; the second decode needs a fifth block.
    rig = Rig(num_gpu_blocks=5, block_size=8, max_steps_in_flight=1, growth_tokens=0)
    rig.add(make_request("old", 15))
    rig.add(make_request("newer", 15))
    rig.step()
    rig.step()
    assert plan_tokens(rig) == [{"old": 15, "newer": 15}, {"old": 1, "newer": 1}]
    assert rig.gpu_pool.num_free == 0

    rig.step()
    assert plan_tokens(rig)[-1] == {"old": 1}
    assert rig.gpu_pool.num_free == 1  # "newer" gave back 2 and "old" took 1
    assert rig.core.stats().num_preemptions == 1
    rig.run()
    for req_id in rig.requests:
        rig.check_solo(req_id)


def test_nobody_is_admitted_without_room_for_everyone_to_grow() -> None:
    rig = Rig(num_gpu_blocks=6, block_size=8, max_steps_in_flight=1)
    rig.add(make_request("old", 16, max_tokens=20))  # five blocks in the end
    rig.add(make_request("newer", 16, max_tokens=20))
    rig.run()
    assert rig.core.stats().num_preemptions == 0
    assert {"old": 1, "newer": 1} not in plan_tokens(rig)


@pytest.mark.parametrize("num_blocks", [18, 23, 31])
def test_nobody_is_preempted_over_and_over(num_blocks: int) -> None:
    rig = Rig(num_gpu_blocks=num_blocks, block_size=8, max_num_seqs=32, max_steps_in_flight=2)
    for i in range(40):
        rig.add(make_request(f"r{i}", 5 + i % 23, seed=i, max_tokens=60))
    worst = 0
    while rig.core.has_unfinished:
        rig.step()
        waiting = rig.scheduler.lifecycle.waiting
        worst = max([worst, *(request.num_preemptions for request in waiting)])
    assert worst <= 4
    for req_id in rig.requests:
        rig.check_solo(req_id)


def test_a_long_prompt_leaves_a_token_for_every_running_request() -> None:
    rig = Rig(policy="priority", max_num_batched_tokens=16, max_num_seqs=8, max_steps_in_flight=1)
    for i in range(3):
        rig.add(make_request(f"r{i}", 3 + i, max_tokens=12, priority=1))
    rig.step()
    rig.add(make_request("urgent", 40, priority=0))
    for _ in range(3):
        rig.step()
    assert plan_tokens(rig)[2:4] == [{"r0": 1, "r1": 1, "r2": 1, "urgent": 13}] * 2


def test_decodes_come_first_and_counts_are_left_out_when_all_are_one() -> None:
    rig = Rig(max_steps_in_flight=1)
    rig.add(make_request("a", 4, max_tokens=9))
    rig.step()
    rig.add(make_request("bb", 6, max_tokens=9))
    rig.step()
    assert last_plan(rig).num_new_tokens == [1, 6]
    rig.step()
    assert last_plan(rig).num_new_tokens == []


def test_an_unchanged_decode_batch_is_a_few_bytes_per_request() -> None:
    rig = Rig(max_num_seqs=256, num_gpu_blocks=2000, max_num_batched_tokens=8192, block_size=32)
    for i in range(256):
        rig.add(make_request(f"r{i}", 8, max_tokens=12))
    rig.step()
    rig.step()
    assert len(last_plan(rig).rows) == 256
    assert len(encoder.encode(last_plan(rig))) < 3 * 256 + 64


def test_a_step_is_planned_before_the_token_it_needs_is_known() -> None:
    rig = Rig(max_steps_in_flight=3)
    rig.add(make_request("a", 4, max_tokens=8))
    rig.core.submit_steps()
    assert plan_tokens(rig) == [{"a": 4}, {"a": 1}, {"a": 1}]
    rig.run()
    rig.check_solo("a")


def test_no_step_is_planned_beyond_max_tokens() -> None:
    rig = Rig(max_steps_in_flight=3)
    rig.add(make_request("a", 4, max_tokens=2))
    rig.core.submit_steps()
    assert plan_tokens(rig) == [{"a": 4}, {"a": 1}]


def find_stop(rig: Rig) -> int:
    """A request's second token, found in a run of its own."""
    probe = Rig(rig.setup)
    probe.add(make_request("a", 4, max_tokens=8))
    probe.run()
    return probe.branch("a").token_ids[1]


def test_a_row_too_many_is_dropped_and_released_when_its_step_is_answered() -> None:
    rig = Rig(max_steps_in_flight=2)
    rig.add(make_request("a", 4, max_tokens=8, stop_token_ids=[find_stop(rig)]))
    rig.step()  # answers the first token; steps 0 and 1 are planned
    rig.step()  # answers the stop; step 2 is in flight and holds a row too many
    assert rig.branch("a").finish_reason is FinishReason.STOP
    assert rig.scheduler.num_steps_in_flight == 1
    assert rig.gpu_pool.num_held == 1
    assert rig.scheduler.lifecycle.rows.num_free == rig.setup.max_num_seqs - 1
    rig.step()
    assert rig.gpu_pool.num_held == 0
    assert len(rig.branch("a").token_ids) == 2
    rig.add(make_request("bb", 4))
    rig.step()
    freeing = [plan for plan in rig.executor.plans if plan.freed_rows]
    assert [new.row for new in freeing[0].new_rows] == freeing[0].freed_rows == [0]


@pytest.mark.parametrize("max_steps_in_flight", [1, 2, 3])
@pytest.mark.parametrize("num_steps", range(6))
def test_a_request_can_be_aborted_in_every_state(max_steps_in_flight: int, num_steps: int) -> None:
    rig = Rig(max_steps_in_flight=max_steps_in_flight, max_num_batched_tokens=16)
    rig.add(make_request("a", 40, max_tokens=9, n=2))
    rig.add(make_request("bb", 5, max_tokens=9))
    for _ in range(num_steps):
        rig.core.submit_steps()
        rig.step()
    rig.core.abort_requests(CLIENT, ["a", "a", "unknown"])
    rig.core.check_invariants()
    rig.run()
    rig.check_solo("bb")
    assert rig.branch("a", 0).finish_reason is None


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    rig = Rig(num_gpu_blocks=5, block_size=8, max_steps_in_flight=3, growth_tokens=0)
    rig.add(make_request("old", 15))
    rig.add(make_request("newer", 15))
    rig.core.submit_steps()  # step 2 preempts "newer", for which steps 0 and 1 sample
    (newer,) = rig.scheduler.lifecycle.waiting
    assert newer.num_output_placeholders == 2
    rig.step()
    rig.step()
    assert len(rig.branch("newer").token_ids) == 2  # its tokens are not lost
    rig.run()
    rig.check_solo("newer")


def test_without_chunking_a_prompt_enters_whole_and_beside_decodes() -> None:
    rig = Rig(
        enable_chunked_prefill=False,
        max_num_batched_tokens=128,
        max_steps_in_flight=1,
        num_gpu_blocks=99,
    )
    rig.add(make_request("a", 100, max_tokens=5))
    rig.add(make_request("bb", 60, max_tokens=5))
    rig.step()
    rig.step()
    assert plan_tokens(rig) == [{"a": 100}, {"a": 1, "bb": 60}]


def test_arrival_order_is_kept_and_nobody_overtakes_a_large_request() -> None:
    rig = Rig(num_gpu_blocks=13, block_size=8, max_steps_in_flight=1)
    rig.add(make_request("a", 40, max_tokens=8))
    rig.step()
    rig.add(make_request("large", 60, max_tokens=8))
    rig.add(make_request("small", 4, max_tokens=2))
    rig.step()
    assert plan_tokens(rig)[-1] == {"a": 1}
    rig.run()
    first_seen = [req_id for step in plan_tokens(rig) for req_id in step]
    assert first_seen.index("large") < first_seen.index("small")


def test_lower_priority_values_run_first_and_higher_ones_give_way() -> None:
    rig = Rig(policy="priority", max_num_seqs=1, max_steps_in_flight=1)
    for req_id, priority in (("low", 5), ("mid_", 1), ("first", -1)):
        rig.add(make_request(req_id, 4, priority=priority, max_tokens=2))
    rig.run()
    order = [req_id for step in plan_tokens(rig) for req_id in step]
    assert order == ["first", "first", "mid_", "mid_", "low", "low"]


def test_the_delay_factor_lets_prompts_gather() -> None:
    rig = Rig(delay_factor=2.0, max_steps_in_flight=1)
    scheduler = rig.scheduler
    rig.core.add_request(CLIENT, make_request("a", 4, max_tokens=9))
    start = next(iter(scheduler.lifecycle.waiting)).group.arrival_s

    def run_step(now_s: float, took_s: float) -> int:
        plan, frames = scheduler.schedule(now_s)
        rig.executor.submit(plan, frames)
        output, _ = rig.executor.receive(None) or (None, None)
        scheduler.update_from_output(output, now_s + took_s)
        return len(plan.new_rows)

    assert run_step(start, took_s=10.0) == 1  # the latest prompt took 10 s
    rig.core.add_request(CLIENT, make_request("bb", 4, max_tokens=9))
    arrival = next(iter(scheduler.lifecycle.waiting)).group.arrival_s
    assert run_step(arrival + 19.9, took_s=1.0) == 0
    assert run_step(arrival + 20.1, took_s=1.0) == 1


def test_at_most_max_adapters_run_and_others_wait() -> None:
    rig = Rig(max_steps_in_flight=1)
    rig.core.scheduler = Scheduler(
        rig.setup.config().scheduler_config,
        rig.scheduler.kv_cache,
        vocab_size=61,
        adapter_limit=AdapterLimit(1),
    )
    for i in range(4):
        rig.add(make_request(f"r{i}" + "x" * i, 4 + i, max_tokens=2))
    waiting = list(rig.scheduler.lifecycle.waiting)
    for request, adapter_id in zip(waiting, [1, 2, 1, None], strict=True):
        request.group.adapter_id = adapter_id
    rig.step()
    assert set(plan_tokens(rig)[-1]) == {"r0", "r2xx", "r3xxx"}
    rig.run()
    rig.check_solo("r1x")


def test_branches_fork_from_the_first_once_its_prompt_is_computed() -> None:
    rig = Rig(max_steps_in_flight=2, max_num_batched_tokens=16, max_num_seqs=8)
    rig.add(make_request("a", 36, n=4, max_tokens=6))
    for _ in range(5):
        rig.step()
    entered = [(plan.step_id, new) for plan in rig.executor.plans for new in plan.new_rows]
    assert [(step_id, new.num_computed_tokens) for step_id, new in entered] == [
        (0, 0),
        (3, 35),
        (3, 35),
        (3, 35),
    ]
    assert len(rig.executor.plans[3].block_copies) == 3
    rig.run()
    rig.check_solo("a")


def test_branches_compute_the_prompt_themselves_when_the_first_is_gone() -> None:
    rig = Rig(max_steps_in_flight=1, max_num_batched_tokens=16, enable_prefix_caching=False)
    rig.add(make_request("a", 40, n=3, max_tokens=6))
    rig.step()
    rig.core.abort_branches(CLIENT, [("a", 0)])
    rig.run()
    assert len(rig.branch("a", 1).token_ids) == 6
    assert len(rig.branch("a", 2).token_ids) == 6


def test_one_request_alone_gets_through_a_pool_that_just_fits_it() -> None:
    rig = Rig(num_gpu_blocks=4, block_size=8, max_model_len=24, max_steps_in_flight=3)
    rig.add(make_request("a", 10, max_tokens=None))
    rig.add(make_request("bb", 10, max_tokens=None))
    rig.run()
    rig.check_solo("a")
    rig.check_solo("bb")
    assert len(rig.branch("a").token_ids) == 14


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(ModelRunnerOutput(5, [1]), id="another step's"),
        pytest.param(ModelRunnerOutput(0, [1, 2]), id="too many tokens"),
        pytest.param(ModelRunnerOutput(0, []), id="too few tokens"),
    ],
)
def test_an_answer_that_does_not_fit_its_plan_is_refused(answer: ModelRunnerOutput) -> None:
    rig = Rig()
    rig.add(make_request("a", 4))
    rig.core.submit_steps()
    with pytest.raises(ProtocolError, match="step 0 samples 1 rows"):
        rig.core.take_output(answer, ())


def collect(rig: Rig) -> list[EngineOutput]:
    return [output for _, message, _ in rig.core.step() for output in message.outputs]


@pytest.mark.parametrize("max_steps_in_flight", [1, 2, 3])
def test_a_request_with_nan_fails_alone_and_leaves_nothing_to_find(
    max_steps_in_flight: int,
) -> None:
    poisoned: dict[str, Any] = {"seed": 13}
    rig = Rig(
        Setup(
            max_steps_in_flight=max_steps_in_flight,
            is_nan=lambda params, position: params.seed == 13 and position == 20,
        )
    )
    rig.add(make_request("good", 18, max_tokens=9))
    rig.add(make_request("poison", 18, max_tokens=9, n=2, **poisoned))
    rig.run()
    rig.check_solo("good")
    for index in range(2):
        branch = rig.branch("poison", index)
        assert branch.finish_reason is FinishReason.ERROR
        assert "NaN" in (branch.error or "")
    assert len(rig.branch("poison", 0).token_ids) == 2
    rig.add(make_request("poison", 18, max_tokens=9, seed=1))
    rig.run()
    assert rig.branch("poison").num_cached_tokens == 0


def test_a_prompt_aborted_between_chunks_leaves_only_whole_blocks_behind() -> None:
    rig = Rig(max_num_batched_tokens=20, max_num_seqs=4, block_size=8, max_steps_in_flight=1)
    rig.add(make_request("a", 40))
    rig.step()  # 20 of 40 tokens: the third block is half full
    rig.core.abort_requests(CLIENT, ["a"])
    rig.add(make_request("b", 40))
    rig.run()
    rig.check_solo("b")
    assert rig.branch("b").num_cached_tokens == 16


def test_nobody_is_preempted_for_blocks_that_are_about_to_be_given_back() -> None:
    rig = Rig(num_gpu_blocks=5, block_size=8, max_steps_in_flight=2, growth_tokens=0)
    rig.add(make_request("old", 15))
    rig.add(make_request("newer", 15))
    rig.core.submit_steps()
    rig.core.abort_requests(CLIENT, ["newer"])  # its row is in both steps in flight
    rig.run()
    rig.check_solo("old")
    assert rig.core.stats().num_preemptions == 0
