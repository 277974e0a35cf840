"""Credits: a slow frontend gets fewer, larger messages, and nothing is lost or out of order."""

import random

from engine_core.outbox import FrontendState, merge
from ipc.messages import (
    EngineOutput,
    EngineOutputs,
    FinishReason,
    LogitsRow,
    SchedulerStats,
    TokenLogprobs,
)
from ipc.records import TensorRef


def make_frontend(credits: int) -> FrontendState:
    return FrontendState(b"peer", "test", 1, credits, 0.0)


def make_outputs(step_id: int, *outputs: EngineOutput) -> EngineOutputs:
    return EngineOutputs(0, step_id, list(outputs))


def token(req_id: str, position: int, *, last: bool = False) -> EngineOutput:
    return EngineOutput(req_id, 0, position, [position], FinishReason.STOP if last else None)


def test_outputs_pass_at_once_while_there_are_credits() -> None:
    frontend = make_frontend(credits=2)
    outputs = [make_outputs(step, token("a", step)) for step in range(3)]

    assert [frontend.offer(item, []) for item in outputs] == [outputs[0], outputs[1], None]


def test_outputs_without_credits_become_one_message_that_waits() -> None:
    frontend = make_frontend(credits=0)
    for step in range(5):
        assert frontend.offer(make_outputs(step, token("a", step)), []) is None

    due = frontend.acknowledge(1, max_credits=1)
    assert due is not None
    assert due.step_id == 4
    assert due.outputs == [EngineOutput("a", 0, 0, [0, 1, 2, 3, 4])]
    assert frontend.acknowledge(1, max_credits=1) is None


def test_merging_keeps_what_only_the_first_output_carries() -> None:
    logprobs = [TokenLogprobs([1], [-1.0], 1)]
    first = EngineOutput(
        "a", 0, 0, [1], None, None, logprobs, logprobs, num_cached_tokens=16,
        first_scheduled_time_s=5.0,
    )  # fmt: skip
    last = EngineOutput("a", 0, 1, [2], FinishReason.STOP, 2, logprobs)
    merged = merge(make_outputs(1, first), make_outputs(2, last)).outputs

    assert merged == [
        EngineOutput(
            "a", 0, 0, [1, 2], FinishReason.STOP, 2, logprobs * 2, logprobs,
            num_cached_tokens=16, first_scheduled_time_s=5.0,
        )
    ]  # fmt: skip


def test_branches_and_requests_are_merged_apart() -> None:
    earlier = make_outputs(1, EngineOutput("a", 0, 0, [1]), EngineOutput("a", 1, 0, [2]))
    later = make_outputs(2, EngineOutput("a", 1, 1, [3]), EngineOutput("b", 0, 0, [4]))

    assert merge(earlier, later).outputs == [
        EngineOutput("a", 0, 0, [1]),
        EngineOutput("a", 1, 0, [2, 3]),
        EngineOutput("b", 0, 0, [4]),
    ]


def test_an_id_used_again_replaces_the_finished_request() -> None:
    merged = merge(make_outputs(1, token("a", 7, last=True)), make_outputs(2, token("a", 0)))

    assert merged.outputs == [token("a", 0)]


def test_the_latest_stats_win_and_are_not_forgotten() -> None:
    old = EngineOutputs(0, 1, [], stats=SchedulerStats(num_steps=1))
    new = EngineOutputs(0, 2, [], stats=SchedulerStats(num_steps=2))
    bare = EngineOutputs(0, 3, [])

    assert merge(old, new).stats == SchedulerStats(num_steps=2)
    assert merge(old, bare).stats == SchedulerStats(num_steps=1)


def test_rows_of_logits_never_wait_and_take_along_what_does() -> None:
    frontend = make_frontend(credits=0)
    assert frontend.offer(make_outputs(1, token("a", 0)), []) is None
    row = LogitsRow("a", 0, 5, TensorRef(0, "float32", [1]))
    due = frontend.offer(EngineOutputs(0, 2, [], logits_rows=[row]), [b"abcd"])

    assert due == EngineOutputs(0, 2, [token("a", 0)], logits_rows=[row])
    assert frontend.pending is None


def test_credits_never_exceed_what_the_engine_grants() -> None:
    frontend = make_frontend(credits=1)
    frontend.acknowledge(2**62, max_credits=4)
    frontend.acknowledge(-5, max_credits=4)

    assert frontend.credits == 4


def test_any_mixture_of_sending_and_acknowledging_delivers_every_token_once_in_order() -> None:
    rng = random.Random(1)
    frontend = make_frontend(credits=3)
    delivered: dict[str, list[int]] = {}
    given = dict.fromkeys("abc", 0)
    num_unacknowledged = 0

    def deliver(outputs: EngineOutputs | None) -> None:
        nonlocal num_unacknowledged
        if outputs is None:
            return
        num_unacknowledged += 1
        for output in outputs.outputs:
            known = delivered.setdefault(output.req_id, [])
            assert output.first_index == len(known)
            known.extend(output.new_token_ids)

    for step in range(1000):
        moved = [name for name in given if rng.random() < 0.7]
        outputs = make_outputs(step, *[token(name, given[name]) for name in moved])
        for name in moved:
            given[name] += 1
        deliver(frontend.offer(outputs, []))
        assert num_unacknowledged <= 3
        if rng.random() < 0.3:
            count = rng.randint(0, num_unacknowledged)
            num_unacknowledged -= count
            deliver(frontend.acknowledge(count, max_credits=3))
    deliver(frontend.acknowledge(3, max_credits=3))

    assert delivered == {name: list(range(count)) for name, count in given.items()}
