"""LLMEngine: the engine stepped by hand. Requests in by ``add_request``, outputs out of ``step``.

The core runs in the caller's process, or with ``multiprocess_mode`` as a process tree of its own;
nothing else differs. All names and arguments are the public contract of 2024 and its successors.
"""

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from frontend.engine_args import EngineArgs
from frontend.engine_session import CoreClient, EngineSession
from frontend.engine_setup import (
    CONFIG_NAMES,
    ExecutorClass,
    assemble_config,
    load_engine_tokenizer,
    make_stat_loggers,
    profile_directory,
    with_executor_path,
)
from frontend.inputs import NewRequest
from frontend.lora_request import LoRARequest
from frontend.outputs import RequestOutput
from frontend.pooling_params import PoolingParams
from frontend.prompts import Prompt, parse_prompt
from frontend.refusals import check_cache_reset, check_sleep_mode
from frontend.stat_loggers import StatLoggerFactory
from frontend.tokenizer import Tokenizer, as_tokenizer
from frontend.usage_context import UsageContext
from ipc.config import DecodingConfig, EngineConfig, ModelConfig
from ipc.errors import UnsupportedError
from ipc.messages import SchedulerStats
from ipc.operations import (
    CheckWorkers,
    GetStats,
    IsSleeping,
    ResetPrefixCache,
    Sleep,
    StartProfile,
    StopProfile,
    WakeUp,
)
from ipc.sampling_params import SamplingParams

LOG_INTERVAL_S = 10.0  # of do_log_stats_with_interval


class LLMEngine:
    """One engine, driven step by step. Not picklable; collecting it ends its processes.

    Besides the attributes below it answers to the names of its sub-configs: ``model_config``,
    ``cache_config`` and so on.
    """

    _PUBLIC_CONTRACT = True  # the names are given, and so is their number

    def __init__(
        self,
        vllm_config: EngineConfig | None = None,
        executor_class: ExecutorClass | None = None,
        log_stats: bool = False,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
        multiprocess_mode: bool = False,
        core_client: CoreClient | None = None,
        **sub_configs: Any,
    ) -> None:
        """Start an engine and wait until it is ready.

        Args:
            vllm_config: the whole config; or pass its parts by keyword (``model_config=...``).
            executor_class: takes the place of our executor.
            log_stats: write a line of throughput and load while stepping.
            usage_context: a label for the log.
            stat_loggers: factories ``(config, engine index) -> StatLogger``.
            multiprocess_mode: run the core in a process tree of its own.
            core_client: a connection that the caller made, in place of an engine of our own.

        Raises:
            ConfigError: a value cannot work; nothing was started.
            EngineStartError: a process could not start; carries the stage and the real cause.
        """
        config = assemble_config(vllm_config, sub_configs)
        self.vllm_config = config
        self.usage_context = usage_context
        self.log_stats = log_stats
        self._next_log_s = 0.0
        loggers = make_stat_loggers(config, stat_loggers, log_stats=log_stats)
        self.tokenizer: Tokenizer | None
        if core_client is not None:
            self.tokenizer, client = load_engine_tokenizer(config), core_client
        elif multiprocess_mode:
            self.tokenizer, client = _launch(with_executor_path(config, executor_class))
        else:
            self.tokenizer = load_engine_tokenizer(config)
            client = _connect_in_process(config, executor_class)
        self._session = EngineSession(client, config, self.tokenizer, loggers)
        self._finalizer = weakref.finalize(self, self._session.close)

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
        enable_multiprocessing: bool = False,
    ) -> "LLMEngine":
        """An engine from its arguments. Raises as the constructor does."""
        return cls(
            vllm_config=engine_args.create_engine_config(usage_context),
            log_stats=not engine_args.disable_log_stats,
            usage_context=usage_context,
            stat_loggers=stat_loggers,
            multiprocess_mode=enable_multiprocessing,
        )

    @classmethod
    def from_vllm_config(
        cls,
        vllm_config: EngineConfig,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[StatLoggerFactory] | None = None,
        disable_log_stats: bool = False,
        enable_multiprocessing: bool = False,
    ) -> "LLMEngine":
        """An engine from a finished config. Raises as the constructor does."""
        return cls(
            vllm_config=vllm_config,
            log_stats=not disable_log_stats,
            usage_context=usage_context,
            stat_loggers=stat_loggers,
            multiprocess_mode=enable_multiprocessing,
        )

    def __getattr__(self, name: str) -> Any:
        """The sub-configs by their names."""
        if name in CONFIG_NAMES:
            return getattr(self.vllm_config, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __reduce__(self) -> NoReturn:
        """Refuse: an engine is a process or holds a model; neither travels."""
        raise RuntimeError("an engine cannot be pickled")

    # ------------------------------------------------------------ requests

    def add_request(  # noqa: PLR0913
        self,
        request_id: str,
        inputs: Prompt,
        params: SamplingParams | PoolingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
    ) -> None:
        """Admit a request; its outputs come out of ``step``.

        Raises:
            RequestError, UnsupportedError: it cannot be served as asked (both are ValueErrors).
            KeyError: ``request_id`` is in use.
            EngineDeadError: the engine stopped.
        """
        self._session.add(
            NewRequest(
                request_id,
                inputs,
                params,
                arrival_time,
                lora_request,
                priority,
                prompt_text=prompt_text,
                tokenization_kwargs=tokenization_kwargs,
                trace_headers=trace_headers,
            )
        )

    def step(self) -> list[RequestOutput]:
        """Run or await one step; the outputs of the requests that progressed.

        A request that failed alone comes out with finish_reason "error" and ``error`` set.

        Raises:
            EngineDeadError: the engine stopped; every open request ended with it.
        """
        return self._session.step()

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """End requests without further output. Unknown ids are no error."""
        self._session.abort([request_id] if isinstance(request_id, str) else list(request_id))

    def has_unfinished_requests(self) -> bool:
        """Whether a further ``step`` can bring something."""
        return self._session.num_unfinished > 0

    def get_num_unfinished_requests(self) -> int:
        """Requests that have not ended."""
        return self._session.num_unfinished

    # ------------------------------------------------------------ what it is

    def get_model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self.vllm_config.model_config

    def get_decoding_config(self) -> DecodingConfig:
        """The decoding configuration."""
        return self.vllm_config.decoding_config

    def get_supported_tasks(self) -> tuple[str, ...]:
        """What this engine can do with its model."""
        return ("generate",)

    @classmethod
    def validate_outputs(cls, outputs: Sequence[object], output_type: type[Any]) -> list[Any]:
        """The outputs as a list; TypeError when one is of another type."""
        for output in outputs:
            if not isinstance(output, output_type):
                raise TypeError(f"expected {output_type.__name__}, got {type(output).__name__}")
        return list(outputs)

    def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Tokenizer:
        """The tokenizer; one for all adapters. ValueError with ``skip_tokenizer_init``."""
        if self.tokenizer is None:
            raise ValueError("the tokenizer was not loaded (skip_tokenizer_init)")
        return self.tokenizer

    def get_tokenizer_group(self) -> "TokenizerGroup":
        """The tokenizer behind the interface of 2024. Raises as ``get_tokenizer``."""
        return TokenizerGroup(self.get_tokenizer())

    def get_tokenizer_for_seq(self, sequence: object) -> Tokenizer:
        """The tokenizer of a sequence; they all share one. Raises as ``get_tokenizer``."""
        return self.get_tokenizer()

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Tokenise and detokenise requests from now on with another tokenizer."""
        tokenizer = as_tokenizer(tokenizer)
        self._session.set_tokenizer(tokenizer)
        self.tokenizer = tokenizer

    def process_model_inputs(
        self, request_id: str, inputs: Prompt, lora_request: LoRARequest | None = None
    ) -> dict[str, Any]:
        """A prompt's tokenised form: ``prompt_token_ids``, ``prompt`` and ``multi_modal_data``."""
        prompt = parse_prompt(inputs)
        if prompt.token_ids is None:
            assert prompt.text is not None
            prompt.token_ids = self._session.inputs.tokenize(prompt.text)
        return {
            "prompt_token_ids": prompt.token_ids,
            "prompt": prompt.text,
            "multi_modal_data": None,
        }

    # ------------------------------------------------------------ control

    def do_log_stats(self) -> None:
        """Make every stat logger write its line now."""
        self._session.log_stats()

    def get_stats(self) -> SchedulerStats:
        """The scheduler's state now."""
        stats: SchedulerStats = self._session.call(GetStats())
        return stats

    def get_metrics(self) -> SchedulerStats:
        """The engine's counters and gauges now: ``get_stats`` by its newer name."""
        return self.get_stats()

    def check_health(self) -> None:
        """Return when every worker gives a sign of life; raise EngineDeadError otherwise."""
        self._session.call(CheckWorkers())

    def do_log_stats_with_interval(self) -> None:
        """Make every stat logger write its line, unless that was done less than 10 s ago."""
        now_s = time.monotonic()
        if now_s >= self._next_log_s:
            self._next_log_s = now_s + LOG_INTERVAL_S
            self.do_log_stats()

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Forget cached prefixes; False when blocks are still held. There is no connector."""
        check_cache_reset(reset_running_requests=reset_running_requests)
        return bool(self._session.call(ResetPrefixCache()))

    def reset_mm_cache(self) -> bool:
        """True at once: images, which this cache would hold, are not served."""
        return True

    def reset_encoder_cache(self) -> bool:
        """True at once: encoder outputs, which this cache would hold, do not exist."""
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free device memory: level 1 keeps the weights on the host, level 2 drops them."""
        check_sleep_mode(mode)
        self._session.call(Sleep(level))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo ``sleep``, as a whole."""
        if tags is not None:
            raise UnsupportedError("waking up in parts (tags) is not available", "tags")
        self._session.call(WakeUp())

    def is_sleeping(self) -> bool:
        """Whether the engine sleeps."""
        return bool(self._session.call(IsSleeping()))

    def start_profile(self, directory: str | None = None) -> None:
        """Start the workers' profiler; traces go to ``directory``, or to ./profile."""
        self._session.call(StartProfile(profile_directory(directory)))

    def stop_profile(self) -> list[str]:
        """Stop the profiler; the names of the trace files."""
        return list(self._session.call(StopProfile()))

    def shutdown(self) -> None:
        """End the engine and its processes. Harmless when repeated."""
        self._finalizer()

    # ------------------------------------------------------------ not in this version

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Refused: LoRA adapters are not available in this version."""
        raise UnsupportedError("LoRA adapters are not available in this version")

    def remove_lora(self, lora_id: int) -> bool:
        """False: there is no adapter to remove."""
        return False

    def list_loras(self) -> set[int]:
        """Empty: there are no adapters."""
        return set()

    def pin_lora(self, lora_id: int) -> bool:
        """Refused: there is no adapter to pin."""
        raise UnsupportedError("LoRA adapters are not available in this version")

    def collective_rpc(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no code travels between our processes."""
        raise UnsupportedError(
            "collective_rpc is not available: calls to workers are typed operations, and no code "
            "travels between processes"
        )

    def apply_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no code travels between our processes."""
        raise UnsupportedError(
            "apply_model is not available: no code travels to the workers' processes"
        )


class TokenizerGroup:
    """A tokenizer behind the interface of 2024: one for every adapter."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(
        self,
        prompt: str,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(prompt)

    async def encode_async(
        self,
        prompt: str,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(prompt)

    def get_lora_tokenizer(self, lora_request: LoRARequest | None = None) -> Tokenizer:
        """The tokenizer of an adapter: the base model's."""
        return self.tokenizer

    async def get_lora_tokenizer_async(self, lora_request: LoRARequest | None = None) -> Tokenizer:
        """The tokenizer of an adapter: the base model's."""
        return self.tokenizer


def _launch(config: EngineConfig) -> tuple[Tokenizer | None, CoreClient]:
    """A process tree of our own, and the tokenizer, which is loaded while it starts."""
    from frontend.core_client import ProcessCoreClient
    from frontend.launcher import Launch

    launch = Launch(config)
    try:
        tokenizer = load_engine_tokenizer(config)
    except BaseException:
        launch.terminate()
        raise
    return tokenizer, ProcessCoreClient(launch)


def _connect_in_process(config: EngineConfig, executor_class: ExecutorClass | None) -> CoreClient:
    from frontend.inproc_client import InprocCoreClient

    if isinstance(executor_class, str):
        return InprocCoreClient(with_executor_path(config, executor_class))
    return InprocCoreClient(config, executor_class)
