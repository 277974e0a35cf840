"""The synchronous session: steps, aborts, room in the core, death."""

from typing import Any

import pytest

from frontend.engine_session import EngineSession
from frontend.outputs import RequestOutput
from frontend.stat_loggers import IterationStats, StatLoggerGroup
from ipc.errors import EngineDeadError
from ipc.messages import AbortBranches, AbortRequests, SchedulerStats
from ipc.operations import GetStats
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import (
    FakeClient,
    FakeCore,
    always,
    make_config,
    make_limits,
    make_request,
    make_tokenizer,
)


def make_session(core: FakeCore, loggers: list[Any] | None = None) -> EngineSession:
    config = make_config()
    group = StatLoggerGroup(config, loggers or [])
    return EngineSession(FakeClient(core), config, make_tokenizer(), group)


def run(session: EngineSession) -> dict[str, RequestOutput]:
    """Step until nothing is open; the last output of each request."""
    last = {}
    while session.num_unfinished:
        last |= {output.request_id: output for output in session.step()}
    return last


def test_requests_run_to_their_ends() -> None:
    session = make_session(FakeCore(always("hello")))
    session.add(make_request("a"))
    session.add(make_request("b", max_tokens=2))
    outputs = run(session)
    assert outputs["a"].outputs[0].text == "hello"
    assert outputs["a"].outputs[0].finish_reason == "stop"
    assert outputs["b"].outputs[0].text == "he"
    assert outputs["b"].outputs[0].finish_reason == "length"
    assert session.step() == []


def test_text_grows_step_by_step() -> None:
    session = make_session(FakeCore(always("abc")))
    session.add(make_request("a"))
    seen = [session.step()[0].outputs[0].text for _ in range(3)]
    assert seen == ["a", "ab", "abc"]


def test_a_stop_string_ends_the_branch_in_the_core() -> None:
    core = FakeCore(always("one two three"))
    session = make_session(core)
    session.add(make_request("a", stop=" t"))
    assert run(session)["a"].outputs[0].text == "one"
    assert isinstance(core.sent[-1], AbortBranches)
    assert not core.has_unfinished


def test_more_requests_than_the_core_lets_wait_follow_as_room_appears() -> None:
    core = FakeCore(always("ab"), make_limits(max_num_seqs=2, max_waiting_requests=5))
    session = make_session(core)
    for number in range(40):
        session.add(make_request(str(number)))
    assert len(core.requests) == 5
    assert len(run(session)) == 40
    assert core.max_seen < 20


def test_an_aborted_request_in_the_backlog_never_reaches_the_core() -> None:
    core = FakeCore(always("ab"), make_limits(max_num_seqs=1, max_waiting_requests=2))
    session = make_session(core)
    for name in "abc":
        session.add(make_request(name))
    session.abort(["c", "a", "unknown"])
    assert set(run(session)) == {"b"}
    assert [message for message in core.sent if isinstance(message, AbortRequests)] == [
        AbortRequests(["1"])
    ]
    assert set(core.requests) == {"1", "2"}


def test_final_only_requests_give_one_output() -> None:
    session = make_session(FakeCore(always("ab")))
    session.add(make_request("a", output_kind=RequestOutputKind.FINAL_ONLY))
    counts = []
    while session.num_unfinished:
        counts.append(len(session.step()))
    assert counts == [0, 0, 1]


def test_a_name_in_use_is_refused_and_does_not_disturb_the_first() -> None:
    core = FakeCore(always("ab"))
    session = make_session(core)
    session.add(make_request("a"))
    with pytest.raises(KeyError):
        session.add(make_request("a"))
    assert len(core.requests) == 1
    assert run(session)["a"].outputs[0].text == "ab"


def test_death_ends_everything_and_stays() -> None:
    core = FakeCore(always("hello"))
    session = make_session(core)
    session.add(make_request("a"))
    session._client.dies_at_step = 2
    session.step()
    session.step()
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        session.step()
    assert session.num_unfinished == 0
    for use in (session.step, lambda: session.add(make_request("b"))):
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            use()


class CountingLogger:
    """Adds up what it is told."""

    def __init__(self, config: object, engine_index: int) -> None:
        self.num_tokens = self.num_finished = self.num_closed = 0
        instances.append(self)

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        self.num_tokens += iteration.num_generation_tokens
        self.num_finished += len(iteration.finished)

    def log(self) -> None:
        pass

    def close(self) -> None:
        self.num_closed += 1


class RaisingLogger(CountingLogger):
    """Fails at the first record."""

    def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
        raise RuntimeError("no disk")


instances: list[CountingLogger] = []


def test_loggers_see_every_token_and_one_that_raises_harms_nobody() -> None:
    instances.clear()
    session = make_session(FakeCore(always("hello")), [RaisingLogger, CountingLogger])
    session.add(make_request("a"))
    session.add(make_request("b"))
    outputs = run(session)
    session.close()
    _, counting = instances
    assert counting.num_tokens == sum(len(o.outputs[0].token_ids) for o in outputs.values())
    assert (counting.num_finished, counting.num_closed) == (2, 1)


def test_control_operations_reach_the_core() -> None:
    core = FakeCore(always("a"), results={GetStats: SchedulerStats(num_running=3)})
    assert make_session(core).call(GetStats()).num_running == 3
