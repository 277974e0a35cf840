"""The core over a simulated executor: what clients get, whatever the schedule."""

import re
import time
from typing import Any

import pytest

from engine_core.core import EngineCore
from ipc.errors import EngineError, RequestError
from ipc.messages import EngineOutput, FinishReason, ProcessedLogits, ResumedBranch, SchedulerStats
from ipc.operations import (
    CheckWorkers,
    GetStats,
    IsPaused,
    IsSleeping,
    PauseGeneration,
    ResetPrefixCache,
    ResumeGeneration,
    Sleep,
    StartProfile,
    StopProfile,
    WakeUp,
)
from ipc.records import TensorRef
from tests.engine_core import simulated_executor
from tests.engine_core.builders import CLIENT, Rig, make_request
from tests.engine_core.simulated_executor import VOCAB_SIZE, solo_run


def invert(logits: list[float]) -> list[float]:
    return [-value for value in logits]


def outputs_of(core: EngineCore) -> list[EngineOutput]:
    return [output for _, message, _ in core.drain_outputs() for output in message.outputs]


def test_outputs_are_those_of_solo_runs() -> None:
    rig = Rig()
    for i in range(6):
        rig.add(make_request(f"r{i}", 5 + 9 * i, seed=i, max_tokens=12))
    rig.run()
    for req_id in rig.requests:
        rig.check_solo(req_id)


def test_a_refusal_is_an_error_output_and_disturbs_nobody() -> None:
    rig = Rig()
    rig.add(make_request("good", 5))
    rig.add(make_request("bad", [VOCAB_SIZE]))
    rig.run()
    rig.check_solo("good")
    assert rig.branch("bad").finish_reason is FinishReason.ERROR
    assert "between 0 and 60" in (rig.branch("bad").error or "")


def test_a_refusal_says_which_kind_of_error_it_is() -> None:
    rig = Rig()
    rig.core.add_request(CLIENT, make_request("r", []))
    assert [output.error_kind for output in outputs_of(rig.core)] == ["RequestError"]


def test_a_prompt_longer_than_the_cache_is_refused_with_the_numbers() -> None:
    rig = Rig(num_gpu_blocks=6, block_size=8)
    assert rig.core.limits.max_model_len == 40
    rig.add(make_request("large", 40))
    rig.run()
    assert "40 tokens" in (rig.branch("large").error or "")
    assert "5 blocks of 8 tokens" in (rig.branch("large").error or "")


def test_a_request_id_that_is_in_use_does_not_end_the_one_that_has_it() -> None:
    rig = Rig()
    rig.add(make_request("r", 5))
    rig.core.add_request(CLIENT, make_request("r", 9))
    rig.run()
    rig.check_solo("r")


def test_clients_may_use_the_same_request_id() -> None:
    rig = Rig()
    for client in (b"one", b"two"):
        rig.core.add_request(client, make_request("r", 5, max_tokens=3))
    told: dict[bytes, list[int]] = {b"one": [], b"two": []}
    while rig.core.has_unfinished:
        for client, message, _ in rig.core.step():
            for output in message.outputs:
                told[client] += output.new_token_ids
    expected = solo_run(make_request("r", 5, max_tokens=3), 0, 128).token_ids
    assert told == {b"one": expected, b"two": expected}


def test_a_client_that_leaves_takes_its_requests_along() -> None:
    rig = Rig()
    rig.core.add_request(b"gone", make_request("r", 5, max_tokens=90, n=3))
    rig.core.submit_steps()
    rig.add(make_request("stays", 5))
    rig.core.remove_client(b"gone")
    rig.run()
    rig.check_solo("stays")


def test_the_first_output_tells_when_it_began_and_what_was_cached() -> None:
    rig = Rig(max_steps_in_flight=1)
    before_s = time.time()
    rig.add(make_request("a", 20))
    rig.run()
    rig.add(make_request("b", 20))
    rig.run()
    for req_id, num_cached in (("a", 0), ("b", 16)):
        branch = rig.branch(req_id)
        assert branch.num_cached_tokens == num_cached
        assert branch.first_scheduled_time_s is not None
        assert before_s - 1 < branch.first_scheduled_time_s < time.time() + 1
    stats = rig.core.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (40, 16)


def test_stats_add_up() -> None:
    rig = Rig()
    rig.add(make_request("a", 20, max_tokens=5))
    rig.add(make_request("bb", 10, max_tokens=3, n=2))
    rig.run()
    stats = rig.client.stats
    assert stats is not None
    assert stats.generation_tokens == 5 + 2 * 3
    assert stats.prompt_tokens == 20 + 10 + 1  # the second branch computes the last one again
    assert stats.num_free_gpu_blocks == stats.num_gpu_blocks == 40
    assert stats.num_leaked_blocks == 0
    assert stats.num_steps == len(rig.executor.plans)


def test_resumed_tokens_count_as_output() -> None:
    request = make_request("r", 6, n=3, max_tokens=9)
    runs = [solo_run(request, index, 128) for index in range(3)]
    rig = Rig()
    rig.add(
        make_request(
            "r",
            6,
            n=3,
            max_tokens=9,
            resumed=[
                ResumedBranch(0, runs[0].token_ids, is_finished=True),
                ResumedBranch(1, runs[1].token_ids[:4]),
            ],
        )
    )
    rig.run()
    for index in (1, 2):
        assert rig.branch("r", index).token_ids == runs[index].token_ids
        assert rig.branch("r", index).finish_reason is FinishReason.LENGTH
    assert rig.branch("r", 0).finish_reason is None  # the frontend knew that already


def test_a_resumed_branch_that_is_complete_is_told_its_end() -> None:
    run = solo_run(make_request("r", 6), 0, 128)
    rig = Rig()
    rig.add(make_request("r", 6, resumed=[ResumedBranch(0, run.token_ids)]))
    assert not rig.core.has_unfinished
    assert [o.finish_reason for o in outputs_of(rig.core)] == [FinishReason.LENGTH]


def test_a_core_that_can_never_move_again_dies_loudly() -> None:
    rig = Rig()
    rig.add(make_request("r", 20))
    rig.gpu_pool.allocate(40)  # a leak that leaves nothing
    with pytest.raises(EngineError, match="no step can be planned for 1 open requests"):
        rig.step()


# ---------------------------------------------------------------- the user's logits processors


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_logits_visit_the_user_once_per_token_even_when_preempted(preemption_mode: str) -> None:
    rig = Rig(
        num_gpu_blocks=9,
        num_cpu_blocks=20,
        preemption_mode=preemption_mode,
        growth_tokens=0,
        max_steps_in_flight=3,
    )
    rig.add(make_request("old", 9, max_tokens=30))  # grows while the user thinks
    for i in range(3):
        rig.add(make_request(f"r{i}", 9 + i, seed=i, max_tokens=14, has_logits_processors=True))
    seen: list[tuple[str, int, int]] = []
    num_seen = num_steps = 0
    while rig.core.has_unfinished:
        rig.step()
        new = rig.client.logits_rows[num_seen:]
        seen += [(row.req_id, row.index, row.position) for row, _ in new]
        if (num_steps := num_steps + 1) % 4 == 0:  # a slow user: rows are preempted meanwhile
            rig.answer_logits(invert)
        num_seen = len(rig.client.logits_rows)
    rig.check_solo("old")
    for i in range(3):
        rig.check_solo(f"r{i}", invert)
    assert len(seen) == len(set(seen)) == 3 * 14
    assert rig.core.stats().num_preemptions > 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param({"error": "it raised KeyError"}, "it raised KeyError", id="it failed"),
        pytest.param({"logits": TensorRef(0, "float32", [3])}, r"got float32\[3\]", id="shape"),
        pytest.param({"logits": TensorRef(0, "float64", [VOCAB_SIZE])}, "got float64", id="type"),
        pytest.param({"logits": TensorRef(4, "float32", [VOCAB_SIZE])}, "frame 4", id="frame"),
    ],
)
def test_a_failure_of_the_users_processor_is_the_requests_own(
    answer: dict[str, Any], reason: str
) -> None:
    rig = Rig()
    rig.add(make_request("r", 5, n=2, has_logits_processors=True))
    rig.add(make_request("good", 5))
    while not rig.client.logits_rows:
        rig.step()
    fields = {"logits": None, **answer}
    rig.core.add_processed_logits(CLIENT, ProcessedLogits("r", 0, 5, **fields), [b"\0" * 12])
    rig.run()
    rig.check_solo("good")
    for index in range(2):
        assert rig.branch("r", index).finish_reason is FinishReason.ERROR
        assert re.search(reason, rig.branch("r", index).error or "")


def test_answers_for_what_is_not_open_or_not_asked_are_ignored() -> None:
    rig = Rig()
    rig.add(make_request("r", 5, max_tokens=3, has_logits_processors=True))
    ref, frame = TensorRef(0, "float32", [VOCAB_SIZE]), bytes(4 * VOCAB_SIZE)
    while rig.core.has_unfinished:
        for req_id, index, position in (("x", 0, 5), ("r", 7, 5), ("r", 0, 99), ("r", 0, 0)):
            answer = ProcessedLogits(req_id, index, position, ref)
            rig.core.add_processed_logits(CLIENT, answer, [frame])
        rows = rig.client.logits_rows
        rig.answer_logits(invert)
        for row, _ in rows:  # the same answer again, now late
            answer = ProcessedLogits(row.req_id, row.index, row.position, ref)
            rig.core.add_processed_logits(CLIENT, answer, [frame])
        rig.step()
    rig.check_solo("r", invert)


# ---------------------------------------------------------------- control operations


def test_pausing_by_abort_ends_what_is_open_and_holds_what_comes() -> None:
    rig = Rig()
    rig.add(make_request("old", 5, max_tokens=50))
    rig.step()
    rig.core.call(PauseGeneration("abort"))
    rig.add(make_request("newer", 5))
    rig.run()
    assert rig.branch("old").finish_reason is FinishReason.ABORT
    assert rig.branch("newer").token_ids == []
    assert rig.core.call(IsPaused()) is True
    rig.core.call(ResumeGeneration())
    rig.run()
    rig.check_solo("newer")
    assert rig.core.call(IsPaused()) is False


def test_pausing_by_wait_finishes_what_is_open_and_holds_what_comes() -> None:
    rig = Rig()
    rig.add(make_request("old", 5, max_tokens=9, n=2))
    rig.step()
    rig.core.call(PauseGeneration("wait"))
    rig.add(make_request("newer", 5))
    assert rig.core.call(IsPaused()) is False
    for _ in range(20):
        rig.step()
    rig.check_solo("old")
    assert rig.core.call(IsPaused()) is True
    assert rig.branch("newer").token_ids == []
    rig.core.call(ResumeGeneration())
    rig.run()
    rig.check_solo("newer")


def test_pausing_by_keep_holds_everything_where_it_is() -> None:
    rig = Rig()
    rig.add(make_request("old", 5, max_tokens=9))
    rig.step()
    rig.core.call(PauseGeneration("keep"))
    while rig.core.has_unfinished:
        rig.step()
    num_tokens = len(rig.branch("old").token_ids)
    assert 0 < num_tokens < 9
    assert not rig.core.submit_steps()
    rig.core.call(ResumeGeneration())
    rig.run()
    rig.check_solo("old")


def test_an_unknown_way_to_pause_is_refused() -> None:
    with pytest.raises(RequestError, match="'quickly'"):
        Rig().core.call(PauseGeneration("quickly"))


def test_the_engine_sleeps_only_when_idle_and_forgets_its_cache() -> None:
    rig = Rig()
    rig.add(make_request("a", 20))
    with pytest.raises(RequestError, match="1 requests are open"):
        rig.core.call(Sleep(1))
    rig.run()
    rig.core.call(Sleep(1))
    assert rig.core.call(IsSleeping()) is True
    assert rig.core.stats().num_cached_blocks == 0
    rig.add(make_request("b", 20))
    assert not rig.core.submit_steps()
    with pytest.raises(RequestError, match="asleep already"):
        rig.core.call(Sleep(1))
    rig.core.call(WakeUp())
    rig.core.call(WakeUp())
    rig.run()
    rig.check_solo("b")
    assert rig.executor.operations == [Sleep(1), WakeUp()]


def test_levels_of_sleep_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RequestError, match="level must be 1 or 2, got 3"):
        Rig().core.call(Sleep(3))


def test_the_prefix_cache_is_reset_when_nothing_runs() -> None:
    rig = Rig()
    rig.add(make_request("a", 20))
    rig.step()
    assert rig.core.call(ResetPrefixCache()) is False
    rig.run()
    assert rig.core.stats().num_cached_blocks > 0
    assert rig.core.call(ResetPrefixCache()) is True
    assert rig.core.stats().num_cached_blocks == 0


def test_other_operations_reach_the_workers() -> None:
    rig = Rig()
    assert isinstance(rig.core.call(GetStats()), SchedulerStats)
    assert rig.core.call(StartProfile("/tmp/x")) is None
    assert rig.core.call(StopProfile()) == ["trace.json"]
    assert rig.core.call(CheckWorkers()) == [None]
    assert rig.executor.operations == [StartProfile("/tmp/x"), StopProfile(), CheckWorkers()]


@pytest.mark.parametrize(("decode_s", "expected"), [(0.0005, 3), (0.004, 2)])
def test_a_third_step_is_planned_while_steps_are_very_short(
    decode_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_executor, "DECODE_S", decode_s)
    rig = Rig(max_steps_in_flight=None)
    rig.add(make_request("a", max_tokens=20))
    for _ in range(5):
        rig.step()
    rig.core.submit_steps()
    assert rig.scheduler.num_steps_in_flight == expected
