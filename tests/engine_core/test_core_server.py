"""The core's loop in front of a fake core: handshakes, requests, credits, calls, departures."""

import time
from array import array

import pytest

from engine_core import core_server
from ipc.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    Ack,
    AddRequest,
    Call,
    EngineDraining,
    EngineFailed,
    EngineOutputs,
    FinishReason,
    Goodbye,
    Heartbeat,
    ProcessedLogits,
    Refused,
    Welcome,
    encoder,
    schema_hash,
)
from ipc.operations import GetStats, IsPaused, ResetPrefixCache, Sleep
from ipc.records import TensorRef
from ipc.sampling_params import SamplingParams
from tests.engine_core.server_rig import BareFrontend, make_hello, running_server, wait_until


def make_request(req_id: str, num_tokens: int = 3) -> AddRequest:
    return AddRequest(req_id, [1], SamplingParams(max_tokens=num_tokens, seed=1), 0.0)


def read_tokens(frontend: BareFrontend, *req_ids: str) -> dict[str, list[int]]:
    """Tokens of these requests, each checked to continue where the last message ended."""
    found: dict[str, list[int]] = {req_id: [] for req_id in req_ids}
    unfinished = set(req_ids)
    while unfinished:
        message = frontend.hear()
        assert isinstance(message, EngineOutputs)
        frontend.say(Ack(1))
        for output in message.outputs:
            assert output.first_index == len(found[output.req_id])
            found[output.req_id] += output.new_token_ids
            if output.finish_reason is FinishReason.LENGTH:
                unfinished.remove(output.req_id)
    return found


def test_a_frontend_is_welcomed_with_what_it_must_know() -> None:
    with running_server(credits=7) as rig, BareFrontend(rig.address) as frontend:
        welcome = frontend.greet()

        assert isinstance(welcome, Welcome)
        assert (welcome.protocol_version, welcome.schema_hash) == (PROTOCOL_VERSION, schema_hash())
        assert (welcome.epoch, welcome.model_digest, welcome.limits.credits) == (3, "digest", 7)


@pytest.mark.parametrize(
    ("version", "digest", "values"),
    [
        pytest.param(99, None, f"protocol version 99 there, {PROTOCOL_VERSION} here", id="version"),
        pytest.param(PROTOCOL_VERSION, "0123", f"schema 0123 there, {schema_hash()}", id="schema"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(
    version: int, digest: str | None, values: str
) -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.say(make_hello(version, digest))
        answer = frontend.hear()
        assert isinstance(answer, Refused)
        assert values in answer.reason

        frontend.say(make_request("a"))
        assert isinstance(frontend.hear(), Refused)
        assert not rig.core.open


def test_a_stranger_is_told_to_introduce_itself() -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.say(make_request("a"), Goodbye(), Heartbeat(1.0))

        assert [type(frontend.hear()) for _ in range(2)] == [Refused, Refused]
        assert frontend.hears_nothing()
        assert not rig.core.open


def test_more_frontends_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_server, "MAX_FRONTENDS", 1)
    with (
        running_server() as rig,
        BareFrontend(rig.address) as first,
        BareFrontend(rig.address) as second,
    ):
        assert isinstance(first.greet(), Welcome)
        assert isinstance(second.greet(), Refused)
        first.say(Goodbye())
        wait_until(lambda: rig.core.removed_clients)
        assert isinstance(second.greet(), Welcome)


def test_departed_frontends_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_server, "MAX_FRONTENDS", 2)
    with running_server() as rig:
        for _ in range(5):
            with BareFrontend(rig.address) as frontend:
                while not isinstance(frontend.greet(), Welcome):
                    pass  # the others' connections are not known to be gone yet


def test_tokens_reach_the_frontend_that_asked() -> None:
    with (
        running_server() as rig,
        BareFrontend(rig.address) as first,
        BareFrontend(rig.address) as second,
    ):
        first.greet()
        second.greet()
        first.say(make_request("a", 20), make_request("b", 5))
        second.say(make_request("a", 10))

        assert read_tokens(first, "a", "b") == {"a": list(range(20)), "b": list(range(5))}
        assert read_tokens(second, "a") == {"a": list(range(10))}


def test_a_frontend_that_does_not_acknowledge_loses_nothing() -> None:
    with running_server(credits=2) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 300))
        wait_until(lambda: not rig.core.open)
        messages = [frontend.hear(), frontend.hear()]
        assert frontend.hears_nothing()
        frontend.say(Ack(2))
        messages.append(frontend.hear())

        tokens = [t for m in messages for output in m.outputs for t in output.new_token_ids]
        assert tokens == list(range(300))
        assert messages[-1].outputs[0].finish_reason is FinishReason.LENGTH


def test_an_abort_stops_the_request() -> None:
    with running_server(credits=1) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 10**9), AbortRequests(["a", "unknown"]))

        wait_until(lambda: not rig.core.open)


def test_calls_are_answered_with_their_id_and_failures_stay_with_the_caller() -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(Call(7, IsPaused()), Call(8, Sleep()), Call(9, ResetPrefixCache()))
        answers = [frontend.hear() for _ in range(3)]

        assert [answer.call_id for answer in answers] == [7, 8, 9]
        assert answers[0].result == encoder.encode(False)
        assert (answers[1].error, answers[1].error_kind) == (
            "this core cannot sleep",
            "RequestError",
        )
        assert answers[2].error == "ZeroDivisionError: a bug in an operation"
        frontend.say(Call(10, GetStats()))
        assert frontend.hear().error is None


def test_heartbeats_are_echoed() -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(Heartbeat(12.5))

        assert frontend.hear() == Heartbeat(12.5)


def test_a_tensor_that_does_not_fit_harms_nobody() -> None:
    logits = array("f", [1.0, 2.0]).tobytes()
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        lie = ProcessedLogits("a", 0, 3, TensorRef(5, "float32", [2]))
        frontend.say(lie, frames=(logits,))
        good = ProcessedLogits("a", 0, 3, TensorRef(0, "float32", [2]))
        frontend.say(good, frames=(logits,))

        wait_until(lambda: rig.core.processed_logits == [logits])


def test_the_loop_wakes_up_when_a_step_is_to_be_planned() -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        due_s = time.monotonic() + 0.05
        rig.core.pipeline.plan_due_s = due_s
        frontend.say(Heartbeat(1.0))  # the last thing that it hears

        wait_until(lambda: rig.core.planned_s is not None)

        assert rig.core.planned_s is not None
        assert due_s <= rig.core.planned_s < due_s + 1.0  # else it would sleep for seconds


def test_the_loop_sleeps_when_there_was_nothing_to_plan_at_that_time() -> None:
    with running_server() as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        rig.core.pipeline.plan_due_s = time.monotonic() + 0.02
        rig.core.has_nothing_to_plan = True
        frontend.say(Heartbeat(1.0))
        frontend.hear()
        wait_until(lambda: time.monotonic() > rig.core.pipeline.plan_due_s + 0.1)

        assert rig.core.num_tries < 20


def test_a_goodbye_frees_the_requests() -> None:
    with running_server(credits=1) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 10**9), Goodbye())

        wait_until(lambda: len(rig.core.removed_clients) == 1)
        assert not rig.core.open


def test_a_second_hello_starts_over() -> None:
    with running_server(credits=1) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 10**9))
        wait_until(lambda: rig.core.open)
        frontend.say(make_hello())
        while not isinstance(frontend.hear(), Welcome):
            pass

        assert not rig.core.open


def test_a_vanished_frontend_loses_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_server, "SILENCE_S", 0.05)
    monkeypatch.setattr(core_server, "_IDLE_S", 0.05)
    with running_server(credits=1) as rig:
        with BareFrontend(rig.address) as frontend:
            frontend.greet()
            frontend.say(make_request("a", 10**9))
            wait_until(lambda: rig.core.open)

        wait_until(lambda: rig.core.removed_clients)
        assert not rig.core.open


def test_a_silent_frontend_that_is_still_there_keeps_its_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_server, "SILENCE_S", 0.02)
    monkeypatch.setattr(core_server, "_IDLE_S", 0.02)
    with running_server(credits=1) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 10**9))
        probes = 0
        while probes < 3:
            probes += isinstance(frontend.hear(), Heartbeat)

        assert rig.core.open
        assert not rig.core.removed_clients


def test_a_stopped_engine_says_so_to_everybody() -> None:
    with (
        running_server() as rig,
        BareFrontend(rig.address) as first,
        BareFrontend(rig.address) as second,
    ):
        first.greet()
        second.greet()
        rig.signals.send(15)

        for frontend in (first, second):
            last_words = frontend.hear()
            assert isinstance(last_words, EngineFailed)
            assert (last_words.epoch, last_words.exit_code) == (3, 0)
            assert last_words.reason == "the engine was stopped by SIGTERM"


def test_a_drain_lets_requests_finish_and_tells_everybody() -> None:
    with (
        running_server(drain_s=30.0) as rig,
        BareFrontend(rig.address) as frontend,
        BareFrontend(rig.address) as idle,
    ):
        frontend.greet()
        idle.greet()
        frontend.say(make_request("a", 5000))
        wait_until(lambda: rig.core.open)
        rig.signals.send(15)

        assert isinstance(idle.hear(), EngineDraining)
        assert rig.core.gate.is_draining
        given: list[int] = []
        while not isinstance(message := frontend.hear(), EngineFailed):
            if isinstance(message, EngineOutputs):
                frontend.say(Ack(1))
                given += message.outputs[0].new_token_ids
        assert given == list(range(5000))
        assert message.exit_code == 0
        assert isinstance(idle.hear(), EngineFailed)


@pytest.mark.parametrize("drain_s", [30.0, 0.05], ids=["second signal", "time is up"])
def test_what_is_open_at_the_end_of_a_drain_is_aborted(drain_s: float) -> None:
    with running_server(drain_s=drain_s) as rig, BareFrontend(rig.address) as frontend:
        frontend.greet()
        frontend.say(make_request("a", 10**9))
        wait_until(lambda: rig.core.open)
        rig.signals.send(15)
        if drain_s > 1.0:
            wait_until(lambda: rig.core.gate.is_draining)
            rig.signals.send(15)

        reasons = []
        while not isinstance(message := frontend.hear(), EngineFailed):
            if isinstance(message, EngineOutputs):
                frontend.say(Ack(1))
                reasons.append(message.outputs[0].finish_reason)
        assert reasons[-1] is FinishReason.ABORT
        assert message.exit_code == 0


def test_a_frontend_that_comes_during_a_drain_is_told() -> None:
    with (
        running_server(drain_s=30.0) as rig,
        BareFrontend(rig.address) as frontend,
        BareFrontend(rig.address) as late,
    ):
        frontend.greet()
        frontend.say(make_request("a", 10**9))
        wait_until(lambda: rig.core.open)
        rig.signals.send(15)
        wait_until(lambda: rig.core.gate.is_draining)
        late.greet()

        assert isinstance(late.hear(), EngineDraining)
