"""The exception tree of the whole house. Messages hold the numbers: what was asked, what was there.

EngineError
├── ConfigError             a value cannot work; names the flag              exit code 2 at start
├── RequestError            the caller's fault; says what to change          HTTP 400
│   └── UnsupportedError    a real feature that this version does not have   HTTP 400
├── EngineOverloadedError   too much in flight; nothing was started          HTTP 429
├── EngineGenerateError     one request failed inside the engine             HTTP 500
├── EngineStartError        a process could not start; carries the cause     exit code 3
├── EngineDeadError         a process is gone and was given up               HTTP 503
├── ProtocolError           a peer speaks another protocol or schema         connection refused
└── OutOfBlocksError        a caller broke the block pool's rule             kills the core, loudly
"""


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


class EngineOverloadedError(EngineError):
    """Too much is in flight; nothing was started, so retrying later is safe."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineGenerateError(EngineError):
    """One accepted request failed inside the engine; the engine lives on."""


class EngineStartError(EngineError, RuntimeError):
    """A process of the engine could not start. The message names the stage and the real cause."""


class EngineDeadError(EngineError, RuntimeError):
    """The engine stopped and was given up; every open request got this error."""


class ProtocolError(EngineError):
    """A peer's handshake differs from ours. The message holds both values."""


class OutOfBlocksError(EngineError):
    """More KV blocks were wanted than are free: a bug in the caller, never a client's fault."""
