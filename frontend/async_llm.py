"""AsyncLLM: the engine inside a service's event loop. One class, two names: AsyncLLMEngine.

Public signatures; the class body is being filled in.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from frontend.lora_request import LoRARequest
from frontend.outputs import RequestOutput
from frontend.usage_context import UsageContext
from ipc.config import DecodingConfig, EngineConfig, ModelConfig
from ipc.errors import EngineDeadError
from ipc.messages import SchedulerStats
from ipc.sampling_params import SamplingParams

AsyncEngineDeadError = EngineDeadError

Prompt = str | list[int] | Mapping[str, Any]  # text, ids, {"prompt", "prompt_token_ids", ...}


class AsyncLLM:
    """Requests in, streams of outputs out, inside any running event loop."""

    _PUBLIC_CONTRACT = True

    @classmethod
    def from_engine_args(
        cls,
        engine_args: Any,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: list[Any] | None = None,
    ) -> "AsyncLLM":
        """Start an engine's process tree.

        Outside an event loop this returns when the engine is ready, and raises
        ``EngineStartError`` when it cannot start. Inside a running loop it must not block: it
        returns at once, and ``await wait_until_ready()`` (or the first request) waits instead.
        """
        raise NotImplementedError

    @classmethod
    def from_vllm_config(
        cls,
        vllm_config: EngineConfig,
        start_engine_loop: bool = True,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: list[Any] | None = None,
        **options: Any,
    ) -> "AsyncLLM":
        """As ``from_engine_args``, from a finished config."""
        raise NotImplementedError

    @classmethod
    def attach(cls, address: str, keys: Any = None, **options: Any) -> "AsyncLLM":
        """Use a running engine (``python -m engine_core``) at ``address``."""
        raise NotImplementedError

    async def wait_until_ready(self) -> None:
        """Return when requests can be served. Raises EngineStartError with the real cause."""
        raise NotImplementedError

    @property
    def vllm_config(self) -> EngineConfig:
        """The effective configuration (after readiness: the core's)."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Any:
        """``frontend.tokenizer.Tokenizer``, or None with ``skip_tokenizer_init``."""
        raise NotImplementedError

    def generate(
        self,
        inputs: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        lora_request: LoRARequest | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        prompt: Prompt | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs until the request finishes; leaving early aborts it in the engine.

        ``sampling_params.output_kind`` chooses CUMULATIVE, DELTA or FINAL_ONLY. A consumer that
        is slow gets several steps merged in one output, never a growing queue.

        Raises, at the first ``__anext__``:
            RequestError, UnsupportedError: the request cannot be served as asked. HTTP 400.
            KeyError: ``request_id`` is in use.
            EngineOverloadedError: too much is in flight. HTTP 429.
            EngineGenerateError: this request failed inside the engine. HTTP 500.
            EngineDeadError: the engine stopped. HTTP 503.
        """
        raise NotImplementedError

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests; their streams finish with finish_reason "abort". Unknown ids: no-op."""
        raise NotImplementedError

    async def get_tokenizer(self, lora_request: LoRARequest | None = None) -> Any:
        """The tokenizer. ValueError with ``skip_tokenizer_init``."""
        raise NotImplementedError

    async def get_model_config(self) -> ModelConfig:
        """The model's configuration; ``max_model_len`` is resolved."""
        raise NotImplementedError

    async def get_decoding_config(self) -> DecodingConfig:
        """The decoding configuration."""
        raise NotImplementedError

    async def get_stats(self) -> SchedulerStats:
        """The scheduler's state now."""
        raise NotImplementedError

    async def check_health(self) -> None:
        """Return when the engine serves; raise EngineDeadError when it does not."""
        raise NotImplementedError

    async def do_log_stats(self) -> None:
        """Make every stat logger write its line now."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """Whether requests are served."""
        raise NotImplementedError

    @property
    def is_stopped(self) -> bool:
        """Whether the engine was shut down or died."""
        raise NotImplementedError

    @property
    def errored(self) -> bool:
        """Whether the engine died."""
        raise NotImplementedError

    @property
    def dead_error(self) -> EngineDeadError:
        """Why it died."""
        raise NotImplementedError

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Plan no more steps: "abort" ends open requests, "wait" finishes them, "keep" holds."""
        raise NotImplementedError

    async def resume_generation(self) -> None:
        """Undo ``pause_generation``."""
        raise NotImplementedError

    async def is_paused(self) -> bool:
        """Whether generation is paused."""
        raise NotImplementedError

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300.0) -> None:
        """Return when no request is open; TimeoutError after ``drain_timeout`` seconds."""
        raise NotImplementedError

    async def sleep(self, level: int = 1) -> None:
        """Free device memory."""
        raise NotImplementedError

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Undo ``sleep``."""
        raise NotImplementedError

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps."""
        raise NotImplementedError

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when blocks are still held."""
        raise NotImplementedError

    async def start_profile(self, directory: str | None = None) -> None:
        """Start the workers' profiler."""
        raise NotImplementedError

    async def stop_profile(self) -> list[str]:
        """Stop it; the names of the trace files."""
        raise NotImplementedError

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine's processes (or detach). Open requests get EngineDeadError."""
        raise NotImplementedError


AsyncLLMEngine = AsyncLLM
