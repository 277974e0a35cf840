"""What each message means to a core: every kind reaches its method, with its client's name."""

from typing import Any

import pytest

from engine_core.dispatch import RequestMessage, answer_call, dispatch
from ipc.errors import EngineDeadError
from ipc.messages import AbortBranches, AbortRequests, AddRequest, Call, ProcessedLogits
from ipc.operations import CheckWorkers, GetStats
from ipc.sampling_params import SamplingParams


class RecordingCore:
    """Notes every call of a method."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))

    def call(self, operation: Any) -> Any:
        """A worker is found dead by the one operation that asks."""
        if isinstance(operation, CheckWorkers):
            raise EngineDeadError("worker 0 is gone")
        return {"asked": type(operation).__name__}


REQUEST = AddRequest("a", [1], SamplingParams(seed=1), 0.0)
LOGITS = ProcessedLogits("a", 0, 1, None, "failed")


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (REQUEST, ("add_request", b"client", REQUEST)),
        (AbortRequests(["a", "b"]), ("abort_requests", b"client", ["a", "b"])),
        (AbortBranches([("a", 1)]), ("abort_branches", b"client", [("a", 1)])),
        (LOGITS, ("add_processed_logits", b"client", LOGITS, [b"frame"])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_message_reaches_its_method(message: RequestMessage, call: tuple[Any, ...]) -> None:
    core: Any = RecordingCore()
    dispatch(core, b"client", message, [b"frame"])

    assert core.calls == [call]


def test_an_answer_carries_the_result_as_msgpack() -> None:
    core: Any = RecordingCore()
    answer = answer_call(core, Call(3, GetStats()))

    assert (answer.call_id, answer.error) == (3, None)
    assert answer.result == b"\x81\xa5asked\xa8GetStats"


def test_a_dead_worker_is_everybodys_problem() -> None:
    core: Any = RecordingCore()
    with pytest.raises(EngineDeadError, match="worker 0 is gone"):
        answer_call(core, Call(3, CheckWorkers()))
