"""The exception tree of the whole house. Messages hold the numbers: what was asked, what was there.

EngineError
├── ConfigError             a value cannot work; names the flag              exit code 2 at start
├── RequestError            the caller's fault; says what to change          HTTP 400
│   └── UnsupportedError    a real feature that this version does not have   HTTP 400
├── EngineOverloadedError   too much in flight; nothing was started          HTTP 429
├── EngineGenerateError     one request failed inside the engine             HTTP 500
├── EngineStartError        a process could not start; carries the cause     exit code 3
│   └── DeviceStartError    the device does not work                         exit code 6
├── EngineRestartingError   the core was lost and another one is starting    HTTP 503
├── EngineDeadError         a process is gone and was given up               HTTP 503, exit 4 or 5
│   └── DeviceDeadError     the device stopped working                       exit code 6
├── ProtocolError           a peer speaks another protocol or schema         connection refused
└── OutOfBlocksError        a caller broke the block pool's rule             kills the core, loudly
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How an engine's process ended; a service manager can tell failures apart."""

    CLEAN = 0
    CONFIG = 2
    START_FAILED = 3
    CORE_DIED = 4
    WORKER_DIED = 5
    DEVICE_UNUSABLE = 6


class EngineError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A configuration value cannot work. The message names the flag to change."""


class RequestError(EngineError, ValueError):
    """A request cannot be served as asked. The message says what to change.

    Args:
        message: the sentence for the caller.
        param: the request field at fault, when one field is.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedError(RequestError):
    """The request uses a feature of the contract that this version does not have."""


class UnknownStreamError(RequestError):
    """No stream of that name lingers: it never did, or its time is over."""


class EngineOverloadedError(EngineError):
    """Too much is in flight; nothing was started, so retrying later is safe."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineGenerateError(EngineError):
    """One accepted request failed inside the engine; the engine lives on."""


class EngineStartError(EngineError, RuntimeError):
    """A process of the engine could not start. The message names the stage and the real cause."""

    exit_code = ExitCode.START_FAILED

    def __init__(self, message: str, *, killed_by: int = 0) -> None:
        super().__init__(message)
        self.killed_by = killed_by  # the signal that ended a worker, if that was the cause


class EngineRestartingError(EngineError):
    """The engine core was lost and another one is starting; open requests go on by themselves."""


class EngineDeadError(EngineError, RuntimeError):
    """The engine stopped and was given up; every open request got this error.

    Args:
        message: what happened.
        exit_code: the engine's own, where it left one.
        killed_by: the signal that ended a worker, if that was the cause.
    """

    exit_code = ExitCode.WORKER_DIED

    def __init__(self, message: str, exit_code: int | None = None, killed_by: int = 0) -> None:
        super().__init__(message)
        self.killed_by = killed_by
        if exit_code is not None:
            self.exit_code = ExitCode(exit_code)


class DeviceStartError(EngineStartError):
    """A worker's device does not work, so no start can succeed on this machine."""

    exit_code = ExitCode.DEVICE_UNUSABLE


class DeviceDeadError(EngineDeadError):
    """A worker's device stopped working; a new process on it would fail too."""

    exit_code = ExitCode.DEVICE_UNUSABLE


class ProtocolError(EngineError):
    """A peer's handshake differs from ours. The message holds both values."""


class OutOfBlocksError(EngineError):
    """More KV blocks were wanted than are free: a bug in the caller, never a client's fault."""
