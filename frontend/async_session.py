"""Requests over one asynchronous core client, in one event loop. AsyncLLM is its face.

One message of the core is taken in by one call, for all streams; then each waiting consumer whose
request moved is told: its listener where it has one, else its task is woken. Both happen when all
messages that have come are taken in, so a loop that lags hands out several steps at once. A
consumer that does not wait is not disturbed: what it has not taken yet merges in its request's
state, so nothing queues.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from frontend.inputs import InputProcessor, NewRequest
from frontend.liveness import Liveness
from frontend.logits_processors import ProcessorThread
from frontend.output_processor import OutputProcessor, copy_error
from frontend.outputs import RequestOutput
from frontend.prompts import parse_prompt
from frontend.recovery import Recovery
from frontend.request_state import RequestState
from frontend.stat_loggers import StatLoggerGroup
from frontend.stream_replay import replay
from frontend.tokenizer import Tokenizer
from frontend.tokenizer_pool import TokenizerPool
from ipc.config import EngineConfig
from ipc.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineRestartingError,
)
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    CoreToFrontend,
    EngineFailed,
    EngineOutputs,
    FrontendToCore,
    ReclaimedRequest,
    Welcome,
)
from ipc.operations import AnyOperation, GetStats
from ipc.sampling_params import RequestOutputKind, SamplingParams
from ipc.tensors import Frames

logger = logging.getLogger(__name__)

# Takes what is new of a request's state, without waiting; False leaves it to the consumer.
Listener = Callable[[RequestState], bool]


class AsyncClient(Protocol):
    """What a session asks of its connection to a core."""

    @property
    def welcome(self) -> Welcome:
        """The latest core's answer to the handshake."""

    @property
    def restarting(self) -> EngineRestartingError | None:
        """Set while there is no core, and another one is awaited."""

    def start(
        self,
        on_message: Callable[[CoreToFrontend, Frames], None],
        on_dead: Callable[[EngineDeadError], None],
    ) -> None:
        """Deliver messages from now on, in the running loop.

        A ``Welcome`` is another core's, which knows of nothing that was sent before.
        """

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send; never blocks. Raises EngineDeadError when there is no core any more."""

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation."""

    def close(self) -> None:
        """Leave the core, and end it when it is ours. Harmless when repeated."""


@dataclass(slots=True, eq=False)
class StreamRecord:
    """An open stream as the session knows it."""

    state: RequestState
    waiter: "asyncio.Future[None] | None" = None  # set while its consumer waits
    listener: Listener | None = None  # is offered the news before the consumer is woken

    def wake(self) -> None:
        """Let the consumer go on, where it waits."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class OutputStream:
    """A consumer's end of one request: an async iterator of its outputs.

    Closing it, or dropping it, aborts a request that still runs.
    """

    def __init__(self, session: "AsyncSession", record: StreamRecord) -> None:
        self._session = session
        self._record = record
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> "OutputStream":
        return self

    def __del__(self) -> None:
        if self._session.knows(self._record) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._session.leave, self._record)

    @property
    def request_id(self) -> str:
        """The caller's name of the request."""
        return self._record.state.request_id

    @property
    def state(self) -> RequestState:
        """The request's state; for reading only."""
        return self._record.state

    @property
    def finished(self) -> bool:
        """Whether the request has ended; outputs may still be there to take."""
        return self._record.state.is_finished

    def offer_news_to(self, listener: Listener) -> None:
        """While a consumer waits, let ``listener`` take news: no task is woken for what it takes.

        It is called between the consumer's turns, never during one.
        """
        self._record.listener = listener

    async def __anext__(self) -> RequestOutput:
        """The next output.

        Raises:
            EngineGenerateError and its kin: this request failed.
            EngineDeadError: the engine stopped.
        """
        record, state = self._record, self._record.state
        while True:
            output = state.take()
            if state.failure is not None:
                failure, state.failure = state.failure, None  # told once
                self.close()
                raise failure
            if output is not None:
                return output
            if state.is_finished:
                self.close()
                raise StopAsyncIteration
            record.waiter = self._loop.create_future()
            try:
                await record.waiter
            finally:
                record.waiter = None

    def close(self) -> None:
        """Leave: a request that still runs is aborted. Harmless when repeated."""
        self._session.leave(self._record)


class AsyncSession:
    """Owns an asynchronous core client and the open streams on it.

    Every stream that was opened ends: by its last output, by leaving it, or by the engine's
    death, which reaches all of them in one call. A core that is lost and replaced ends none.
    """

    def __init__(
        self,
        client: AsyncClient,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        stat_loggers: StatLoggerGroup,
        pool: TokenizerPool | None = None,
    ) -> None:
        limits = client.welcome.limits
        self._loop = asyncio.get_running_loop()
        self._client = client
        self.stat_loggers = stat_loggers
        self._streams: dict[str, StreamRecord] = {}  # by req_id
        self._news: list[StreamRecord] = []  # whose listeners are to be told in a moment
        self._drains: list[tuple[list[str], asyncio.Future[None]]] = []  # req_ids waited for
        self._processors = ProcessorThread(self._send)
        self._liveness = Liveness(partial(client.call, GetStats()))
        self.dead: EngineDeadError | None = None
        self.inputs = InputProcessor(config.model_config, limits, tokenizer, pool)
        self.outputs = OutputProcessor(tokenizer, log_stats=bool(stat_loggers.loggers))
        self._recovery = Recovery(client.welcome, self.outputs)
        client.start(self.take_in, self.die)

    async def open(self, new: NewRequest) -> OutputStream:
        """Admit a request and send it.

        Raises:
            RequestError, UnsupportedError: it cannot be served as asked.
            KeyError: its name is in use.
            EngineOverloadedError: too much is in flight; nothing was sent.
            EngineDeadError: there is no engine any more.
        """
        self._check_can_open(new)
        prompt = parse_prompt(new.inputs)
        if prompt.token_ids is None:
            assert prompt.text is not None
            text, options = prompt.text, new.tokenization_kwargs
            prompt.token_ids = await self.inputs.tokenize_async(text, options)
            self._check_can_open(new)  # the world went on meanwhile
        admitted = self.inputs.admit(new, prompt)
        self._client.send(admitted.message)
        state = self.outputs.open(admitted, self._client.welcome.epoch)
        record = self._streams[admitted.message.req_id] = StreamRecord(state)
        return OutputStream(self, record)

    def resume(
        self,
        reclaimed: ReclaimedRequest,
        request_id: str,
        params: SamplingParams,
        num_taken: Sequence[int],
    ) -> OutputStream:
        """Go on with a request that the core has let go of, behind what its reader has.

        Args:
            params: the caller's own, as the request was opened with them.
            num_taken: tokens of each branch that the reader has.

        Raises:
            KeyError, EngineOverloadedError, EngineDeadError: as ``open``.
        """
        admitted = self.inputs.readmit(reclaimed.request, request_id, params)
        state = self.outputs.open(admitted, self._client.welcome.epoch)
        resumed = replay(state, reclaimed.branches, num_taken, time.time())
        record = StreamRecord(state)
        if state.is_finished:
            self.outputs.close(state, time.time())
        else:
            self._streams[state.req_id] = record
            self._client.send(
                msgspec.structs.replace(admitted.message, resumed=resumed, num_attempts=2)
            )
        return OutputStream(self, record)

    def knows(self, record: StreamRecord) -> bool:
        """Whether a stream is open still."""
        return record.state.req_id in self._streams

    def leave(self, record: StreamRecord) -> None:
        """Forget a stream; a request that still runs is aborted in the core."""
        req_id = record.state.req_id
        if self._streams.pop(req_id, None) is None:
            return
        if self.outputs.close(record.state, time.time()):
            self._send(AbortRequests([req_id]))
            self._note_ended()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests by their names; their streams finish with reason "abort"."""
        ended = self.outputs.abort(request_ids, time.time())
        if ended:
            self._send(AbortRequests([state.req_id for state in ended]))
            self._wake(ended)
            self._note_ended()

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation in the core."""
        self._check_alive()
        return await self._client.call(operation)

    def check_health(self) -> None:
        """Raise when the engine is dead, restarting, or silent for too long; never wait."""
        self._check_alive()
        if (restarting := self.restarting) is not None:
            raise restarting
        self._liveness.check()

    @property
    def restarting(self) -> EngineRestartingError | None:
        """Set while there is no core, and another one is awaited: streams are silent."""
        return self._client.restarting

    async def wait_until_drained(self) -> None:
        """Return when every request that is open now has ended."""
        waited_for = list(self._streams)
        if any(req_id in self.outputs.journal for req_id in waited_for):
            future = asyncio.get_running_loop().create_future()
            self._drains.append((waited_for, future))
            await future

    def take_in(self, message: CoreToFrontend, frames: Frames) -> None:
        """Take in one message of the core."""
        if isinstance(message, EngineFailed):
            self.die(EngineDeadError(message.reason, message.exit_code))
            return
        if isinstance(message, Welcome):
            self._resume(message)
        if not isinstance(message, EngineOutputs):
            return
        self._recovery.note_outputs()
        result = self.outputs.process(message, frames, time.time())
        self._wake(result.moved)
        if self._drains:
            self._note_ended()
        if result.stopped_branches:
            self._send(AbortBranches(result.stopped_branches))
        if result.failed_req_ids:
            self._send(AbortRequests(result.failed_req_ids))
        for work in result.row_work:
            self._processors.run(work)
        if result.iteration is not None:
            self.stat_loggers.record(message.stats, result.iteration)

    def _resume(self, welcome: Welcome) -> None:
        """Another core: it gets everything that is open, oldest first."""
        self.inputs.set_limits(welcome.limits)
        messages, failed = self._recovery.resume(welcome)
        for message in messages:
            self._send(message)
        self._wake(failed)
        self._note_ended()

    def die(self, error: EngineDeadError) -> None:
        """The engine stopped: every open stream is told now."""
        self.dead = self.dead or error
        ended = self.outputs.fail_all(error, time.time())
        if not self._loop.is_closed():  # else nobody is left who could wait
            self._wake(ended)
            self._note_ended()

    def close(self) -> None:
        """Leave the core. Open streams get EngineDeadError. Harmless when repeated."""
        if self.dead is None:
            self.die(EngineDeadError("the engine was shut down"))
        self.stat_loggers.close()
        self._processors.close()
        self.inputs.close()
        self._client.close()

    def _wake(self, states: Iterable[RequestState]) -> None:
        streams, news = self._streams, self._news
        for state in states:
            record = streams.get(state.req_id)
            if record is None:
                continue
            if record.listener is not None:
                if not news:
                    self._loop.call_soon(self._tell_listeners)
                news.append(record)
            elif state.kind is not RequestOutputKind.FINAL_ONLY or state.is_finished:
                record.wake()

    def _tell_listeners(self) -> None:
        news, self._news = self._news, []
        for record in news:
            state = record.state
            if not state.is_news or record.waiter is None or record.waiter.done():
                continue  # told already, or its consumer has its turn
            assert record.listener is not None
            try:
                if not record.listener(state):
                    record.wake()
            except Exception as error:  # raised where the consumer waits; the others get their news
                record.waiter.set_exception(error)

    def _send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send what nobody waits for; a core that is gone has nothing to be told."""
        try:
            if self.dead is None:
                self._client.send(message, frames)
        except EngineError as err:
            logger.warning("could not tell the engine: %s", err)

    def _check_can_open(self, new: NewRequest) -> None:
        self._check_alive()
        self.outputs.check_is_free(new.request_id)
        limits = self._client.welcome.limits
        max_open = limits.max_num_seqs + limits.max_waiting_requests
        if len(self._streams) >= max_open:
            raise EngineOverloadedError(
                f"{len(self._streams)} requests are in flight, at most {max_open}"
            )

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise copy_error(self.dead)

    def _note_ended(self) -> None:
        """Tell those who wait for requests to end, as far as these have."""
        waiting = []
        for req_ids, future in self._drains:
            if any(req_id in self.outputs.journal for req_id in req_ids):
                waiting.append((req_ids, future))
            elif not future.done():
                future.set_result(None)
        self._drains = waiting
