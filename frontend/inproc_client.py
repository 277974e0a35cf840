"""A core and its executor in the caller's own process: the same vocabulary, without a wire.

The core's code is imported only when such a client is made.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from frontend.core_link import read_result
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError
from ipc.messages import (
    Ack,
    Call,
    CoreToFrontend,
    FrontendToCore,
    Goodbye,
    Heartbeat,
    Hello,
    Welcome,
)
from ipc.operations import AnyOperation
from ipc.tensors import Frames

_INPROC_PEER = b"inproc"


class InprocCoreClient:
    """The core and its executor in this process; steps run inside ``receive``."""

    def __init__(
        self, config: EngineConfig, executor_class: Callable[[EngineConfig], Any] | None = None
    ) -> None:
        from engine_core.dispatch import answer_call, dispatch
        from engine_core.start import start_core

        started = start_core(
            config, on_progress=lambda _progress: None, executor_class=executor_class
        )
        self._answer_call, self._dispatch = answer_call, dispatch
        self._core = started.core
        self._finalizer = weakref.finalize(self, started.executor.shutdown)
        self.welcome: Welcome = started.welcome
        self._received: deque[tuple[CoreToFrontend, Frames]] = deque()
        self._dead: EngineDeadError | None = None

    def __reduce__(self) -> str:
        raise RuntimeError("an engine cannot be pickled: it holds a model and its cache")

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Hand a message to the core."""
        self._check_alive()
        if isinstance(message, Goodbye):
            self._core.remove_client(_INPROC_PEER)
        elif not isinstance(message, Hello | Ack | Heartbeat | Call):
            self._dispatch(self._core, _INPROC_PEER, message, frames)

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        """The next message, stepping until there is one; None when idle or out of time.

        Raises:
            EngineDeadError: a step failed; this engine is done for.
        """
        self._check_alive()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._take(self._core.drain_outputs())
        while not self._received and self._core.has_unfinished:
            try:
                self._take(self._core.step(timeout_s))
            except Exception as err:
                self._dead = as_dead(err)
                raise self._dead from err
            if deadline is not None and time.monotonic() >= deadline:
                break
        return self._received.popleft() if self._received else None

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation."""
        self._check_alive()
        return read_result(operation, self._answer_call(self._core, Call(0, operation)))

    def close(self) -> None:
        """Free everything. May be repeated."""
        self._dead = EngineDeadError("the engine was closed")
        self._finalizer()

    def _take(self, results: Sequence[tuple[bytes, CoreToFrontend, Frames]]) -> None:
        self._received.extend((message, frames) for _, message, frames in results)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(str(self._dead)) from self._dead


def as_dead(error: Exception) -> EngineDeadError:
    """Any error as the end of an engine."""
    if isinstance(error, EngineDeadError):
        return error
    dead = EngineDeadError(f"{type(error).__name__}: {error}")
    dead.__cause__ = error
    return dead
