"""Requests that outlive their frontend: who gets what, and that nothing is held for ever."""

import pytest

from engine_core.core import EngineCore
from engine_core.lingering import MAX_LINGERING, NOBODY, Lingering
from engine_core.request import RequestGroup
from ipc.errors import RequestError, UnknownStreamError
from ipc.messages import AddRequest, EngineOutput, FinishReason, Linger, ReclaimedRequest
from ipc.operations import ReclaimRequest
from tests.engine_core.builders import CLIENT, Rig, make_request
from tests.engine_core.simulated_executor import solo_run

OTHER = b"another client"


def lingering(req_id: str = "a", seconds: float = 60.0, **fields: object) -> AddRequest:
    linger = Linger(f"stream of {req_id}", seconds, b"how it looks")
    return make_request(req_id, 9, linger=linger, max_tokens=20, **fields)


def told(core: EngineCore, client: bytes) -> list[EngineOutput]:
    messages = [message for peer, message, _ in core.drain_outputs() if peer == client]
    return [output for message in messages for output in message.outputs]


def reclaim(core: EngineCore, stream_id: str, num_taken: list[int]) -> ReclaimedRequest:
    reclaimed = core.call(ReclaimRequest(stream_id, num_taken))
    assert isinstance(reclaimed, ReclaimedRequest)
    return reclaimed


def test_a_request_runs_on_when_its_frontend_goes_and_comes_back_with_its_tokens() -> None:
    rig = Rig()
    request = lingering()
    rig.add(request)
    for _ in range(6):
        rig.step()
    rig.core.remove_client(CLIENT)
    assert rig.core.num_open == 1
    for _ in range(3):
        for peer, _, _ in rig.core.step():
            assert peer not in (CLIENT, NOBODY)
        rig.core.check_invariants()

    reclaimed = reclaim(rig.core, "stream of a", [4])

    assert rig.core.num_open == 0
    assert reclaimed.request == request
    (branch,) = reclaimed.branches
    expected = solo_run(request, 0, rig.core.limits.max_model_len).token_ids
    assert 4 <= len(branch.new_token_ids) < 20
    assert branch.new_token_ids == expected[: len(branch.new_token_ids)]
    assert branch.finish_reason is None
    with pytest.raises(UnknownStreamError):
        reclaim(rig.core, "stream of a", [])


def test_who_reads_it_elsewhere_takes_it_from_who_has_it() -> None:
    rig = Rig()
    rig.add(lingering())
    for _ in range(4):
        rig.step()

    reclaim(rig.core, "stream of a", [])

    assert [output.finish_reason for output in told(rig.core, CLIENT)] == [FinishReason.ABORT]
    while rig.core.has_unfinished:
        rig.core.step()
    rig.check_idle()


def test_one_that_has_finished_is_told_until_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1000.0
    rig = Rig()
    monkeypatch.setattr(rig.core, "_clock", lambda: now_s)
    request = lingering(seconds=5.0)
    rig.add(request)
    rig.run()
    for _ in range(2):
        (branch,) = reclaim(rig.core, "stream of a", [20]).branches
        assert branch.new_token_ids == solo_run(request, 0, rig.core.limits.max_model_len).token_ids
        assert branch.finish_reason is FinishReason.LENGTH
    now_s += 5.1
    rig.core.submit_steps()
    with pytest.raises(UnknownStreamError):
        reclaim(rig.core, "stream of a", [])


def test_nobody_comes_for_it_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    rig = Rig()
    monkeypatch.setattr(rig.core, "_clock", lambda: now_s)
    rig.add(lingering(seconds=5.0))
    for _ in range(4):
        rig.step()
    rig.core.remove_client(CLIENT)
    now_s += 4.9
    rig.core.step()
    assert rig.core.num_open == 1
    now_s += 0.5
    rig.core.step()
    assert rig.core.num_open == 0
    while rig.core.has_unfinished:
        rig.core.step()
    rig.check_idle()


@pytest.mark.parametrize("num_taken", [[21], [-1], [1, 1], [5]])
def test_a_reader_that_claims_too_much_changes_nothing(num_taken: list[int]) -> None:
    rig = Rig()
    rig.add(lingering())
    for _ in range(3):
        rig.step()
    with pytest.raises(RequestError, match="after"):
        reclaim(rig.core, "stream of a", num_taken)
    rig.run()
    rig.check_solo("a")


def test_what_was_aborted_or_does_not_linger_is_forgotten() -> None:
    rig = Rig()
    for request in (lingering("a"), make_request("b", 9, max_tokens=20)):
        rig.add(request)
    rig.step()
    rig.core.abort_requests(CLIENT, ["a"])
    rig.core.remove_client(CLIENT)
    assert rig.core.num_open == 0
    with pytest.raises(UnknownStreamError):
        reclaim(rig.core, "stream of a", [])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"logprobs": 1}, "cannot linger"), ({"has_logits_processors": True}, "cannot linger")],
)
def test_what_could_not_be_told_again_is_refused(fields: dict[str, object], reason: str) -> None:
    rig = Rig()
    rig.core.add_request(CLIENT, lingering(**fields))
    (output,) = told(rig.core, CLIENT)
    assert output.finish_reason is FinishReason.ERROR
    assert reason in (output.error or "")


def test_a_name_is_used_once_at_a_time() -> None:
    rig = Rig()
    rig.add(lingering())
    rig.core.add_request(OTHER, lingering())
    (output,) = told(rig.core, OTHER)
    assert "open already" in (output.error or "")
    rig.run()


def test_one_that_runs_for_nobody_is_not_pushed_out_by_those_that_ended() -> None:
    streams = Lingering()
    rig = Rig()
    rig.add(lingering())
    (running,) = rig.core._open_groups()
    streams.add(rig.requests["a"], running)
    streams.orphan(running, -100.0)
    for i in range(MAX_LINGERING + 2):
        request = make_request(f"{i}", linger=Linger(f"s{i}", 60.0))
        group = RequestGroup(CLIENT, f"{i}", [1], request.params, frozenset(), 0.0, b"")
        streams.add(request, group)
        streams.note_end(group, float(i))
    streams.note_end(running, 5000.0)
    streams.reclaim("stream of a", [])


def test_finished_streams_are_bounded_in_number() -> None:
    streams = Lingering()
    for i in range(MAX_LINGERING + 10):
        request = make_request(f"{i}", linger=Linger(f"s{i}", 60.0))
        group = RequestGroup(CLIENT, f"{i}", [1], request.params, frozenset(), 0.0, b"")
        streams.add(request, group)
        streams.note_end(group, float(i))
    assert len(streams) == MAX_LINGERING
    with pytest.raises(UnknownStreamError):
        streams.reclaim("s9", [])
    streams.reclaim("s10", [])
