"""What a failed worker says, and the error that its executor raises for it. Imports no torch."""

import traceback

from ipc.errors import (
    ConfigError,
    DeviceDeadError,
    DeviceStartError,
    EngineDeadError,
    EngineStartError,
    ExitCode,
)
from ipc.messages import WorkerError

DEVICE_STAGE = "device"
_CONFIG_PREFIX = f"{ConfigError.__name__}: "


def worker_error(rank: int, stage: str, err: BaseException) -> WorkerError:
    """The last words of a rank: where it was, what happened, and the traceback."""
    reason = f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
    return WorkerError(rank, stage, reason, "".join(traceback.format_exception(err)))


def start_error(error: WorkerError) -> ConfigError | EngineStartError:
    """What a start raises: a wrong value stays a ``ConfigError``."""
    if error.reason.startswith(_CONFIG_PREFIX):
        return ConfigError(error.reason.removeprefix(_CONFIG_PREFIX))
    cause = error.reason.removeprefix(f"{EngineStartError.__name__}: ")
    text = f"worker {error.rank} failed at stage {error.stage!r}: {cause}"
    return DeviceStartError(text) if error.stage == DEVICE_STAGE else EngineStartError(text)


def dead_error(error: WorkerError) -> EngineDeadError:
    """What a running engine raises: the group is dead."""
    text = f"worker {error.rank} died at stage {error.stage!r}: {error.reason}"
    return DeviceDeadError(text) if error.stage == DEVICE_STAGE else EngineDeadError(text)


def exit_code(error: WorkerError, *, is_ready: bool) -> ExitCode:
    """The code with which the worker's process ends."""
    if error.reason.startswith(_CONFIG_PREFIX):
        return ExitCode.CONFIG
    if error.stage == DEVICE_STAGE:
        return ExitCode.DEVICE_UNUSABLE
    return ExitCode.WORKER_DIED if is_ready else ExitCode.START_FAILED
