"""What a frontend may ask of the core besides requests, and the core of its workers.

An operation travels inside a ``Call`` of ``ipc.messages``, answered by one ``CallResult``; its
docstring names the type of the result. Operations are plain data, as messages are.
"""

from ipc.records import Message


class ResetPrefixCache(Message, frozen=True):
    """Forget every cached prefix. Result: bool, False when blocks are still held."""


class GetStats(Message, frozen=True):
    """Result: SchedulerStats."""


class Sleep(Message, frozen=True):
    """Free device memory: level 1 keeps weights on the host, level 2 drops them. Result: None."""

    level: int = 1


class WakeUp(Message, frozen=True):
    """Undo Sleep. Result: None."""


class IsSleeping(Message, frozen=True):
    """Result: bool."""


class StartProfile(Message, frozen=True):
    """Start torch's profiler in the workers; traces go to ``directory``. Result: None."""

    directory: str


class StopProfile(Message, frozen=True):
    """Stop the profiler and write the traces. Result: list of file names."""


class PauseGeneration(Message, frozen=True):
    """Plan no more steps: "abort", "wait" for or "keep" what is open. Result: None."""

    mode: str = "abort"


class ResumeGeneration(Message, frozen=True):
    """Undo PauseGeneration. Result: None."""


class IsPaused(Message, frozen=True):
    """Result: bool."""


class CheckWorkers(Message, frozen=True):
    """Ask every rank for a sign of life. Result: list[WorkerInfo]."""


class ReclaimRequest(Message, frozen=True):
    """Let go of a lingering request, so that the caller can add it anew. Result: ReclaimedRequest.

    Whoever had it sees it aborted. One that has finished stays until its time is over.
    """

    stream_id: str
    num_taken: list[int] = []  # tokens of each branch that its reader has


AnyOperation = (
    ResetPrefixCache
    | GetStats
    | Sleep
    | WakeUp
    | IsSleeping
    | StartProfile
    | StopProfile
    | PauseGeneration
    | ResumeGeneration
    | IsPaused
    | CheckWorkers
    | ReclaimRequest
)
