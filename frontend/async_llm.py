"""AsyncLLM: the engine inside a service's event loop. One class, two names: AsyncLLMEngine.

The engine runs in processes of its own; this object is a connection to it, bound to the event
loop of its first use. Any number may live in one process. No threads but for user code, no signal
handlers. All names and arguments are the public contract of 2024 and its successors.
"""

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, NoReturn

from frontend import async_control as control
from frontend import refusals
from frontend.async_session import AsyncSession, OutputStream
from frontend.async_start import (
    EngineStart,
    attach_to_engine,
    is_in_event_loop,
    name_arguments,
    start_engine,
    with_ray_workers,
)
from frontend.engine_args import EngineArgs
from frontend.inputs import NewRequest
from frontend.lora_request import LoRARequest
from frontend.output_processor import copy_error
from frontend.outputs import RequestOutput
from frontend.pooling_params import PoolingParams
from frontend.prompts import Prompt
from frontend.request_log import log_request
from frontend.stat_loggers import StatLoggerFactory
from frontend.tokenizer import Tokenizer
from frontend.usage_context import UsageContext
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError, EngineError
from ipc.operations import AnyOperation
from ipc.sampling_params import SamplingParams

AsyncEngineDeadError = EngineDeadError

logger = logging.getLogger(__name__)


class AsyncLLM:
    """Requests in, streams of outputs out, inside any running event loop.

    Closing a stream, or cancelling the task that reads it, aborts its request in the engine.
    When the engine dies every open stream raises EngineDeadError.
    """

    _PUBLIC_CONTRACT = True  # the names are given, and so is their number

    def __init__(
        self,
        worker_use_ray: bool | EngineConfig = False,
        engine_use_ray: bool = False,
        *args: Any,
        log_requests: bool = True,
        max_log_len: int | None = None,
        start_engine_loop: bool = True,
        **kwargs: Any,
    ) -> None:
        """Start an engine.

        Outside an event loop this returns when the engine is ready. Inside a running loop it must
        not block: it returns at once, and ``wait_until_ready`` or the first request waits.

        Args:
            worker_use_ray: carry plans to the workers with Ray. A whole config may stand here.
            engine_use_ray: accepted; the engine has a process of its own anyway.
            args, kwargs: as LLMEngine takes them: ``vllm_config``, or its parts by name;
                ``executor_class``, ``log_stats``, ``usage_context``, ``stat_loggers``; or
                ``engine_start``, a way to an engine that the caller prepared.
            log_requests: one line per request at INFO; prompts only at DEBUG.
            max_log_len: longest prompt text and longest list of ids in the log.
            start_engine_loop: False serves nothing until ``start_background_loop``.

        Raises:
            ConfigError: a value cannot work; nothing was started.
            EngineStartError: a process could not start; carries the stage and the real cause.
        """
        if isinstance(worker_use_ray, EngineConfig):
            kwargs["vllm_config"], worker_use_ray = worker_use_ray, False
        if engine_use_ray:
            logger.info("engine_use_ray: the engine has a process of its own, without Ray")
        options = name_arguments(args, kwargs)
        if worker_use_ray:
            options = with_ray_workers(options)
        self.log_requests = log_requests
        self.max_log_len = max_log_len
        self._starts_by_itself = start_engine_loop
        self._connecting: asyncio.Task[None] | None = None
        self._dead: Exception | None = None  # what ended the engine, before or after its start
        self._was_shut_down = False
        self._start: EngineStart = options.pop("engine_start", None) or start_engine(options)
        self._finalizer = weakref.finalize(self, self._start.close)
        if start_engine_loop and is_in_event_loop():
            self.start_background_loop()

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
    ) -> "AsyncLLM":
        """An engine from its arguments. Raises as the constructor does."""
        return cls(
            vllm_config=engine_args.create_engine_config(usage_context),
            log_stats=not engine_args.disable_log_stats,
            usage_context=usage_context,
            stat_loggers=stat_loggers,
            start_engine_loop=start_engine_loop,
            log_requests=not getattr(engine_args, "disable_log_requests", False),
            max_log_len=getattr(engine_args, "max_log_len", None),
        )

    @classmethod
    def from_vllm_config(
        cls,
        vllm_config: EngineConfig,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
        disable_log_requests: bool = False,
        disable_log_stats: bool = False,
    ) -> "AsyncLLM":
        """An engine from a finished config. Raises as the constructor does."""
        return cls(
            vllm_config=vllm_config,
            log_stats=not disable_log_stats,
            usage_context=usage_context,
            stat_loggers=stat_loggers,
            start_engine_loop=start_engine_loop,
            log_requests=not disable_log_requests,
        )

    @classmethod
    def attach(
        cls,
        address: str,
        keys: Any = None,
        *,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
        log_stats: bool = True,
        log_requests: bool = True,
        max_log_len: int | None = None,
    ) -> "AsyncLLM":
        """Use the engine that runs at ``address`` (``python -m engine_core``).

        The connection is made by ``wait_until_ready`` or by the first request, which raise
        EngineStartError or ProtocolError when there is none to be had.

        Args:
            address: ``ipc:///…`` or ``tcp://…``.
            keys: ``CurveClientKeys``, needed for other machines.
        """
        return cls(
            engine_start=attach_to_engine(address, keys, stat_loggers, log_stats=log_stats),
            log_requests=log_requests,
            max_log_len=max_log_len,
        )

    def __reduce__(self) -> NoReturn:
        """Refuse: an engine is a tree of processes, and does not travel."""
        raise RuntimeError("an engine cannot be pickled")

    # ------------------------------------------------------------ life

    def start_background_loop(self) -> None:
        """Begin to serve, in the running event loop.

        Raises:
            RuntimeError: it serves already, or no loop runs.
            EngineDeadError: the engine stopped.
        """
        if self._dead is not None:
            raise self.dead_error
        if self._connecting is not None:
            raise RuntimeError("the background loop runs already")
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def wait_until_ready(self) -> None:
        """Return when requests can be served.

        Raises:
            ConfigError, EngineStartError, ProtocolError: there is no engine to be had.
            EngineDeadError: it stopped, or ``start_background_loop`` is still to be called.
        """
        await self._ready()

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine's processes, or detach from an engine that is not ours.

        Open requests get EngineDeadError. Processes that do not end are killed after 15 s,
        whatever ``timeout`` says. Harmless when repeated.
        """
        self._was_shut_down = True
        self._dead = self._dead or EngineDeadError("the engine was shut down")
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
        self._finalizer()

    @property
    def is_running(self) -> bool:
        """Whether requests are served, or will be once the engine is ready."""
        return self._connecting is not None and not self.is_stopped

    @property
    def is_stopped(self) -> bool:
        """Whether the engine was shut down, died or failed to start."""
        return self._death is not None

    @property
    def errored(self) -> bool:
        """Whether the engine died or failed to start."""
        return self._death is not None and not self._was_shut_down

    @property
    def dead_error(self) -> EngineDeadError:
        """Why it is stopped."""
        death = self._death
        if isinstance(death, EngineDeadError):
            return copy_error(death)
        return EngineDeadError(str(death or "the engine is not running"))

    def set_errored(self, error: Exception) -> None:
        """Treat the engine as dead: every open stream raises."""
        self._dead = error
        if self._start.session is not None:
            self._start.session.die(EngineDeadError(str(error)))

    # ------------------------------------------------------------ requests

    async def generate(
        self,
        inputs: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
        *,
        prompt: Prompt | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs until the request ends; leaving early aborts it in the engine.

        ``sampling_params.output_kind`` chooses CUMULATIVE, DELTA or FINAL_ONLY. A consumer that
        is slow gets several steps merged in one output, never a growing queue. Wrap the call in
        ``contextlib.aclosing``, or leaving takes effect only when the generator is collected.

        Args:
            inputs, prompt: the prompt, under its older and its newer name.
            options: ``priority``, ``cache_salt``, ``arrival_time``, ``prompt_text``,
                ``tokenization_kwargs``, ``trace_headers``, ``data_parallel_rank``.

        Raises:
            RequestError, UnsupportedError: the request cannot be served as asked.
            KeyError: ``request_id`` is in use.
            EngineOverloadedError: too much is in flight; nothing was started.
            EngineGenerateError: this request failed inside the engine.
            EngineDeadError: the engine stopped.
        """
        given = prompt if inputs is None else inputs
        if given is None or sampling_params is None or request_id is None:
            raise TypeError("generate needs a prompt, sampling_params and a request_id")
        stream = await self.add_request(
            request_id, given, sampling_params, lora_request=lora_request, **options
        )
        try:
            async for output in stream:
                yield output
        finally:  # no await here: clean-up must also work while being cancelled
            stream.close()

    async def add_request(
        self,
        request_id: str,
        inputs: Prompt,
        params: SamplingParams | PoolingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        **options: Any,
    ) -> OutputStream:
        """Admit a request; its stream is an async iterator. Raises as ``generate`` does."""
        refusals.check_request_options(options)
        new = NewRequest(request_id, inputs, params, arrival_time, lora_request, **options)
        stream = await (await self._ready()).open(new)
        if self.log_requests:
            log_request(stream.state, self.max_log_len)
        return stream

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests: their streams finish with reason "abort". Unknown ids are no error."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        if self._start.session is not None:
            self._start.session.abort(request_ids)

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300.0) -> None:
        """Return when every request that is open now has ended; TimeoutError after a while."""
        if self._start.session is not None:
            await asyncio.wait_for(self._start.session.wait_until_drained(), drain_timeout)

    # ------------------------------------------------------------ what it is

    @property
    def vllm_config(self) -> EngineConfig:
        """The whole configuration. After ``attach`` it is known once the engine is ready."""
        if self._start.config is None:
            raise EngineDeadError("the engine is not connected yet: await wait_until_ready()")
        return self._start.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None with ``skip_tokenizer_init``."""
        return self._start.tokenizer

    async def get_vllm_config(self) -> EngineConfig:
        """The whole configuration, once it is known."""
        if self._start.config is None:
            await self._ready()
        return self.vllm_config

    # ------------------------------------------------------------ written in async_control.py

    check_health = control.check_health
    do_log_stats = control.do_log_stats
    get_tokenizer = control.get_tokenizer
    get_model_config = control.get_model_config
    get_decoding_config = control.get_decoding_config
    get_supported_tasks = control.get_supported_tasks
    pause_generation = control.pause_generation
    resume_generation = control.resume_generation
    is_paused = control.is_paused
    sleep = control.sleep
    wake_up = control.wake_up
    is_sleeping = control.is_sleeping
    reset_prefix_cache = control.reset_prefix_cache
    start_profile = control.start_profile
    stop_profile = control.stop_profile
    get_stats = control.get_stats
    reclaim_stream, resume_stream = control.reclaim_stream, control.resume_stream
    list_loras = control.list_loras
    remove_lora = control.remove_lora
    add_lora = pin_lora = control.refuse_lora
    encode = control.refuse_pooling
    engine_step = run_engine_loop = control.refuse_stepping
    collective_rpc = control.refuse_code
    apply_model = refusals.refuse_apply_model
    init_weight_transfer_engine = start_weight_update = update_weights = refusals.refuse_weights
    finish_weight_update = get_weight_version = update_weight_version = refusals.refuse_weights
    scale_elastic_ep = refusals.refuse_scaling
    checkpoint_prepare = checkpoint_restore = refusals.refuse_checkpoints
    handle_fault = get_status = refusals.refuse_faults
    is_tracing_enabled = refusals.is_tracing_enabled
    reset_mm_cache = reset_encoder_cache = refusals.reset_empty_cache

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation in the core. Raises EngineError when it fails."""
        return await (await self._ready()).call(operation)

    # ------------------------------------------------------------ inside

    @property
    def _death(self) -> Exception | None:
        if self._dead is None and self._start.session is not None:
            return self._start.session.dead
        return self._dead

    async def _ready(self) -> AsyncSession:
        """The session, once there is one. Raises as ``wait_until_ready``."""
        if self._connecting is None and self._death is None:
            if not self._starts_by_itself:
                raise EngineDeadError(
                    "the background loop does not run: call start_background_loop()"
                )
            self.start_background_loop()
        if self._connecting is not None and self._death is None:
            if self._connecting.get_loop() is not asyncio.get_running_loop():
                raise RuntimeError("this engine belongs to the event loop of its first use")
            await asyncio.shield(self._connecting)
        if self._death is not None:
            is_start_error = self._start.session is None and not self._was_shut_down
            raise self._death if is_start_error else self.dead_error
        assert self._start.session is not None
        return self._start.session

    async def _connect(self) -> None:
        """Connect; a failure is kept for those who ask, as nobody may be waiting now."""
        try:
            await self._start.connect()
        except (EngineError, OSError) as err:
            self._dead = err


AsyncLLMEngine = AsyncLLM
