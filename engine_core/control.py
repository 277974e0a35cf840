"""Control operations: what they do to the core, and which go on to the workers."""

from typing import TYPE_CHECKING

from executor.executor import Executor
from ipc.errors import RequestError
from ipc.messages import FinishReason
from ipc.operations import (
    AnyOperation,
    CheckWorkers,
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

if TYPE_CHECKING:
    from engine_core.core import EngineCore

PAUSE_MODES = ("abort", "wait", "keep")


class Control:
    """Owns whether the engine is paused or asleep."""

    def __init__(self, core: "EngineCore", executor: Executor) -> None:
        self._core = core
        self._executor = executor
        self._pause_mode: str | None = None  # None: not paused
        self._is_sleeping = False

    @property
    def is_holding(self) -> bool:
        """Whether no step may be planned. Waiting for what is open to finish is planning on."""
        return self._is_sleeping or self._pause_mode in ("abort", "keep")

    def run(self, operation: AnyOperation) -> object:
        """Do it; the result is what the operation's docstring says."""
        match operation:
            case ResetPrefixCache():
                return self._core.scheduler.kv_cache.reset_prefix_cache()
            case GetStats():
                return self._core.stats()
            case PauseGeneration() | ResumeGeneration() | IsPaused():
                return self._run_pause(operation)
            case Sleep() | WakeUp() | IsSleeping():
                return self._run_sleep(operation)
            case StartProfile():
                self._executor.call(operation)
                return None
            case StopProfile():
                return [name for names in self._executor.call(operation) for name in names or ()]
            case CheckWorkers():
                return self._executor.call(operation)
            case ReclaimRequest(stream_id=stream_id, num_taken=num_taken):
                reclaimed, group = self._core.lingering.reclaim(stream_id, num_taken)
                if not group.is_finished:
                    self._core.end_group(group, FinishReason.ABORT)
                return reclaimed

    def _run_pause(self, operation: PauseGeneration | ResumeGeneration | IsPaused) -> bool | None:
        scheduler = self._core.scheduler
        match operation:
            case IsPaused():
                if self._pause_mode == "wait":
                    return not scheduler.has_requests
                return self._pause_mode is not None
            case PauseGeneration(mode=mode):
                if mode not in PAUSE_MODES:
                    raise RequestError(
                        f"mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}", "mode"
                    )
                self._pause_mode = mode
                if mode == "abort":
                    self._core.abort_all()
                if mode == "wait":
                    scheduler.lifecycle.waiting.hold()
            case ResumeGeneration():
                self._pause_mode = None
                scheduler.lifecycle.waiting.release()
        return None

    def _run_sleep(self, operation: Sleep | WakeUp | IsSleeping) -> bool | None:
        match operation:
            case IsSleeping():
                return self._is_sleeping
            case Sleep(level=level):
                self._fall_asleep(operation, level)
            case WakeUp():
                if self._is_sleeping:
                    self._executor.call(operation)
                    self._is_sleeping = False
        return None

    def _fall_asleep(self, operation: Sleep, level: int) -> None:
        """Free device memory. What the cache remembers is lost with it."""
        if level not in (1, 2):
            raise RequestError(f"level must be 1 or 2, got {level}", "level")
        if self._is_sleeping:
            raise RequestError("the engine is asleep already; wake it up first")
        scheduler = self._core.scheduler
        if scheduler.has_requests or scheduler.num_steps_in_flight:
            raise RequestError(
                f"{self._core.num_open} requests are open: the engine sleeps only when idle"
            )
        scheduler.kv_cache.reset_prefix_cache()
        self._executor.call(operation)
        self._is_sleeping = True
