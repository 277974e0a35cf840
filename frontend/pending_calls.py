"""Control operations that wait for the core's answer, in an event loop."""

import asyncio
from typing import Any

from frontend.core_link import read_result
from ipc.errors import EngineError
from ipc.messages import Call, CallResult
from ipc.operations import AnyOperation


class PendingCalls:
    """Owns a future for each call that was sent and is not answered."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[AnyOperation, asyncio.Future[Any]]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def open(self, call: Call) -> "asyncio.Future[Any]":
        """What to wait for; ``close`` the call afterwards."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call.call_id] = call.operation, answer
        return answer

    def close(self, call: Call) -> None:
        """Forget a call."""
        self._calls.pop(call.call_id, None)

    def answer(self, result: CallResult) -> None:
        """Hand a result to its caller, unless that was cancelled."""
        operation, answer = self._calls.pop(result.call_id, (None, None))
        if operation is None or answer is None or answer.done():
            return
        try:
            answer.set_result(read_result(operation, result))
        except EngineError as err:
            answer.set_exception(err)

    def fail_all(self, error: EngineError) -> None:
        """No call that is open will be answered."""
        for _, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(type(error)(*error.args))
