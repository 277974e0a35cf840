"""What our commands say on stderr: log lines, and the last one when something is wrong."""

import logging

from ipc.errors import ConfigError, EngineError, ExitCode, RequestError
from ipc.log_lines import FloodGate, log_to_stderr


def report(error: EngineError) -> int:
    """Say what went wrong in one line, last on stderr; the exit code that goes with it."""
    code = getattr(error, "exit_code", None)
    if code is None:
        is_config = isinstance(error, (ConfigError, RequestError))
        code = ExitCode.CONFIG if is_config else ExitCode.START_FAILED
    logging.getLogger("heliograph").error("%s", " ".join(str(error).split()))
    return int(code)


def set_up_logging(level: str) -> None:
    """Log lines of this process and its libraries go to stderr."""
    name = "DEBUG" if level == "trace" else level.upper()
    fmt = "%(levelname)s %(asctime)s %(name)s: %(message)s"
    log_to_stderr(getattr(logging, name), fmt, "%H:%M:%S")
    # Whoever can reach the port can make it warn of requests that are none.
    logging.getLogger("uvicorn.error").addFilter(FloodGate())
    for noisy in ("asyncio", "httpcore", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.INFO, getattr(logging, name)))
