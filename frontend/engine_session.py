"""Requests over one synchronous core client: admission, steps, aborts. LLMEngine is its face.

More requests may be open than the core lets wait: the rest stay here, in the order in which the
core would take them, and follow as room appears. So a batch of any size is no overload.
"""

import heapq
import itertools
import time
from collections.abc import Iterable
from typing import Any, Protocol

from frontend.inputs import AdmittedRequest, InputProcessor, NewRequest
from frontend.logits_processors import run_processors
from frontend.output_processor import OutputProcessor, StepResult, copy_error
from frontend.outputs import RequestOutput
from frontend.recovery import Recovery
from frontend.stat_loggers import StatLoggerGroup
from frontend.tokenizer import Tokenizer
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    AddRequest,
    CoreToFrontend,
    EngineFailed,
    EngineOutputs,
    FrontendToCore,
    Welcome,
)
from ipc.operations import AnyOperation
from ipc.tensors import Frames

STEP_WAIT_S = 1.0  # longest silence within one step()


class CoreClient(Protocol):
    """What a session asks of its connection to a core."""

    @property
    def welcome(self) -> Welcome:
        """The core's answer to the handshake."""

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send; EngineDeadError when there is no core any more."""

    def receive(self, timeout_s: float | None) -> tuple[CoreToFrontend, Frames] | None:
        """The next message; None after ``timeout_s``. Raises EngineDeadError."""

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation and wait for its result."""

    def close(self) -> None:
        """End the connection, and the engine when it is ours. Harmless when repeated."""


class EngineSession:
    """Owns a core client and the open requests on it.

    Invariant: ``_unstarted`` is part of ``_in_core``, and no larger than the core's queue may be,
    yet large enough to fill a whole batch.
    """

    def __init__(
        self,
        client: CoreClient,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        stat_loggers: StatLoggerGroup,
    ) -> None:
        limits = client.welcome.limits
        self._client = client
        self._stat_loggers = stat_loggers
        self._dead: EngineDeadError | None = None
        self.inputs = InputProcessor(config.model_config, limits, tokenizer)
        self.outputs = OutputProcessor(tokenizer, log_stats=bool(stat_loggers.loggers))
        self._recovery = Recovery(client.welcome, self.outputs)
        self._max_unstarted = max(limits.max_waiting_requests, limits.max_num_seqs)
        self._uses_priority = config.scheduler_config.policy == "priority"
        self._arrivals = itertools.count()
        self._backlog: list[tuple[int, int, AddRequest]] = []  # a heap: priority, arrival
        self._in_core: set[str] = set()  # req_ids that were sent
        self._unstarted: set[str] = set()  # of those, the ones without any output yet

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return self.outputs.num_open

    def add(self, new: NewRequest) -> AdmittedRequest:
        """Admit a request.

        Raises:
            RequestError, UnsupportedError: it cannot be served as asked.
            KeyError: its name is in use.
            EngineDeadError: there is no engine any more.
        """
        self._check_alive()
        self.outputs.check_is_free(new.request_id)
        admitted = self.inputs.admit(new)
        message = admitted.message
        self.outputs.open(admitted, self._client.welcome.epoch)
        order = message.priority if self._uses_priority else 0
        heapq.heappush(self._backlog, (order, next(self._arrivals), message))
        self._feed()
        return admitted

    def step(self) -> list[RequestOutput]:
        """Wait for the next results; the outputs of the requests that they moved."""
        self._check_alive()
        if self.outputs.num_open == 0:
            return []
        try:
            received = self._client.receive(STEP_WAIT_S)
        except EngineDeadError as err:
            self._die(err)
            raise
        if received is None:
            return []
        message, frames = received
        if isinstance(message, EngineFailed):
            raise self._die(EngineDeadError(message.reason))
        if isinstance(message, Welcome):
            return self._resume(message)
        if not isinstance(message, EngineOutputs):
            return []
        self._recovery.note_outputs()
        result = self.outputs.process(message, frames, time.time())
        self._answer(result)
        self._feed()
        if result.iteration is not None:
            self._stat_loggers.record(message.stats, result.iteration)
        return [output for state in result.moved if (output := state.take()) is not None]

    def _resume(self, welcome: Welcome) -> list[RequestOutput]:
        """Another core: it gets again what the lost one had; the backlog waits as before."""
        self.inputs.set_limits(welcome.limits)
        messages, failed = self._recovery.resume(welcome)
        for message in messages:
            if message.req_id in self._in_core:
                self._client.send(message)
        if failed:
            self._backlog.clear()
            self._in_core.clear()
            self._unstarted.clear()
        return [output for state in failed if (output := state.take()) is not None]

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; unknown names are passed over."""
        ended = self.outputs.abort(request_ids, time.time())
        self._abort_in_core([state.req_id for state in ended])
        self._feed()

    def call(self, operation: AnyOperation) -> Any:
        """Run a control operation in the core."""
        self._check_alive()
        try:
            return self._client.call(operation)
        except EngineDeadError as err:
            raise self._die(err) from err

    def log_stats(self) -> None:
        """Make every stat logger say what it has."""
        self._stat_loggers.log()

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Use another tokenizer for requests added from now on."""
        self.inputs.set_tokenizer(tokenizer)
        self.outputs.set_tokenizer(tokenizer)

    def close(self) -> None:
        """End the engine. Harmless when repeated."""
        self._dead = self._dead or EngineDeadError("the engine was shut down")
        self._stat_loggers.close()
        self._client.close()

    def _answer(self, result: StepResult) -> None:
        """Tell the core what a step's results led to."""
        for state in result.moved:
            self._unstarted.discard(state.req_id)
            if state.is_finished:
                self._in_core.discard(state.req_id)
        if result.stopped_branches:
            self._client.send(AbortBranches(result.stopped_branches))
        if result.failed_req_ids:
            self._client.send(AbortRequests(result.failed_req_ids))
        for work in result.row_work:
            self._client.send(*run_processors(work))

    def _abort_in_core(self, req_ids: list[str]) -> None:
        sent = [req_id for req_id in req_ids if req_id in self._in_core]
        if sent:
            self._in_core.difference_update(sent)
            self._unstarted.difference_update(sent)
            self._client.send(AbortRequests(sent))

    def _feed(self) -> None:
        """Send what waits here while the core has room; requests aborted meanwhile fall out."""
        while self._backlog and len(self._unstarted) < self._max_unstarted:
            message = heapq.heappop(self._backlog)[2]
            if message.req_id in self.outputs.journal:
                self._in_core.add(message.req_id)
                self._unstarted.add(message.req_id)
                self._client.send(message)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise copy_error(self._dead)

    def _die(self, error: EngineDeadError) -> EngineDeadError:
        """Note the end of the engine; every open request ended with it."""
        self._dead = error
        self._backlog.clear()
        self._in_core.clear()
        self._unstarted.clear()
        self.outputs.fail_all(error, time.time())
        return error
