"""AsyncLLM's questions, control operations and refusals, apart to keep its own file short.

Each function is a method: its first argument is the engine.
"""

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from frontend import refusals
from frontend.async_session import OutputStream
from frontend.async_start import EngineStart
from frontend.engine_setup import profile_directory
from frontend.lora_request import LoRARequest
from frontend.tokenizer import Tokenizer
from ipc.config import DecodingConfig, EngineConfig, ModelConfig
from ipc.errors import EngineDeadError, UnsupportedError
from ipc.messages import ReclaimedRequest, SchedulerStats
from ipc.operations import (
    AnyOperation,
    GetStats,
    IsPaused,
    IsSleeping,
    PauseGeneration,
    ReclaimRequest,
    ResetPrefixCache,
    ResumeGeneration,
    Sleep,
    StartProfile,
    StopProfile,
    WakeUp,
)
from ipc.sampling_params import SamplingParams

PAUSE_MODES = ("abort", "wait", "keep")


class Controlled(Protocol):
    """What these methods need of their engine."""

    _start: EngineStart

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None with ``skip_tokenizer_init``."""

    @property
    def is_stopped(self) -> bool:
        """Whether the engine was shut down, died or failed to start."""

    @property
    def dead_error(self) -> EngineDeadError:
        """Why it is stopped."""

    async def call(self, operation: AnyOperation) -> Any:
        """Run a control operation in the core."""

    async def get_vllm_config(self) -> EngineConfig:
        """The whole configuration, once it is known."""

    async def wait_for_requests_to_drain(self, drain_timeout: float = ...) -> None:
        """Return when every open request has ended."""


async def check_health(self: Controlled) -> None:
    """Return when the engine lives, as far as is known now; this never waits for it.

    Raises:
        EngineDeadError: the engine stopped, or has been silent for a minute.
    """
    if self.is_stopped:
        raise self.dead_error
    if self._start.session is not None:  # else it is still being started
        self._start.session.check_health()


async def do_log_stats(self: Controlled) -> None:
    """Make every stat logger write its line now."""
    if self._start.session is not None:
        self._start.session.stat_loggers.log()


async def get_tokenizer(self: Controlled, lora_request: LoRARequest | None = None) -> Tokenizer:
    """The tokenizer; one for all adapters. ValueError with ``skip_tokenizer_init``."""
    await self.get_vllm_config()
    if self.tokenizer is None:
        raise ValueError("the tokenizer was not loaded (skip_tokenizer_init)")
    return self.tokenizer


async def get_model_config(self: Controlled) -> ModelConfig:
    """The model's configuration."""
    return (await self.get_vllm_config()).model_config


async def get_decoding_config(self: Controlled) -> DecodingConfig:
    """The decoding configuration."""
    return (await self.get_vllm_config()).decoding_config


async def get_supported_tasks(self: Controlled) -> tuple[str, ...]:
    """What this engine can do with its model."""
    return ("generate",)


async def pause_generation(
    self: Controlled, *, mode: str = "abort", clear_cache: bool = True
) -> None:
    """Plan no more steps: "abort" ends open requests, "wait" finishes them, "keep" holds them.

    Requests that arrive meanwhile wait for ``resume_generation``. The prefix cache is cleared
    with ``clear_cache``, unless requests are kept.
    """
    if mode not in PAUSE_MODES:
        raise ValueError(f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}")
    await self.call(PauseGeneration(mode))
    if mode == "wait":
        await self.wait_for_requests_to_drain()
    if clear_cache and mode != "keep":
        await self.call(ResetPrefixCache())


async def resume_generation(self: Controlled) -> None:
    """Undo ``pause_generation``."""
    await self.call(ResumeGeneration())


async def is_paused(self: Controlled) -> bool:
    """Whether generation is paused."""
    return bool(await self.call(IsPaused()))


async def sleep(self: Controlled, level: int = 1, mode: str = "abort") -> None:
    """Free device memory: level 1 keeps the weights on the host, level 2 drops them."""
    refusals.check_sleep_mode(mode)
    await self.call(Sleep(level))


async def wake_up(self: Controlled, tags: list[str] | None = None) -> None:
    """Undo ``sleep``, as a whole."""
    if tags is not None:
        raise UnsupportedError("waking up in parts (tags) is not available", "tags")
    await self.call(WakeUp())


async def is_sleeping(self: Controlled) -> bool:
    """Whether the engine sleeps."""
    return bool(await self.call(IsSleeping()))


async def reset_prefix_cache(
    self: Controlled, reset_running_requests: bool = False, reset_connector: bool = False
) -> bool:
    """Forget cached prefixes; False when blocks are still held. There is no connector to reset."""
    refusals.check_cache_reset(reset_running_requests=reset_running_requests)
    return bool(await self.call(ResetPrefixCache()))


async def start_profile(self: Controlled, directory: str | None = None) -> None:
    """Start the workers' profiler; traces go to ``directory``, or to ./profile."""
    await self.call(StartProfile(profile_directory(directory)))


async def stop_profile(self: Controlled) -> list[str]:
    """Stop the profiler; the names of the trace files."""
    return list(await self.call(StopProfile()))


async def get_stats(self: Controlled) -> SchedulerStats:
    """The scheduler's state now."""
    stats: SchedulerStats = await self.call(GetStats())
    return stats


async def reclaim_stream(
    self: Controlled, stream_id: str, num_taken: Sequence[int]
) -> ReclaimedRequest:
    """Make the engine let go of a lingering request; ``resume_stream`` goes on with it.

    Args:
        num_taken: tokens of each sequence that the stream's reader has.

    Raises:
        UnknownStreamError: there is no such stream.
        RequestError: the reader cannot have so much of it; the stream stays as it is.
    """
    operation = ReclaimRequest(stream_id, list(num_taken))
    reclaimed: ReclaimedRequest = await self.call(operation)
    return reclaimed


async def resume_stream(
    self: Controlled,
    reclaimed: ReclaimedRequest,
    request_id: str,
    params: SamplingParams,
    num_taken: Sequence[int],
) -> OutputStream:
    """Go on with a reclaimed request, behind what its reader has.

    Args:
        params: those that it was opened with.
    """
    if self._start.session is None:
        raise self.dead_error
    return self._start.session.resume(reclaimed, request_id, params, num_taken)


async def list_loras(self: Controlled) -> set[int]:
    """Empty: there are no adapters in this version."""
    return set()


async def remove_lora(self: Controlled, lora_id: int) -> bool:
    """False: there is no adapter to remove."""
    return False


async def refuse_lora(self: Controlled, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse adapters."""
    raise UnsupportedError("LoRA adapters are not available in this version")


def refuse_pooling(self: Controlled, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse pooling."""
    raise UnsupportedError("pooling and embeddings are not available in this version")


async def refuse_stepping(self: Controlled, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse being driven by hand."""
    raise UnsupportedError(
        "an AsyncLLM cannot be stepped by hand: its engine runs in a process of its own; "
        "LLMEngine.step() is for that"
    )


async def refuse_code(self: Controlled, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse calls into the workers."""
    raise UnsupportedError(
        "collective_rpc is not available: calls to workers are typed operations, and no code "
        "travels between processes"
    )
