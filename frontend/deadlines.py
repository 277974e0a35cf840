"""How long a caller will wait: from a number of seconds to the moment on the engine's clock.

On one host every process has the same ``time.monotonic()``, so a deadline travels as it is, and
holds through queues and restarts. To another host what is left travels.
"""

import time
from math import isfinite

import msgspec

from ipc.errors import RequestError
from ipc.messages import AddRequest

MAX_TIMEOUT_S = 7 * 86400.0


def check_timeout(seconds: float | None, name: str = "timeout") -> float | None:
    """A time limit as a caller gave it.

    Raises:
        RequestError: no number, or not above 0; names the field.
    """
    if seconds is None:
        return None
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not isfinite(seconds) or not 0 < seconds <= MAX_TIMEOUT_S:
        raise RequestError(
            f"{name} must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}, "
            f"got {str(seconds)[:40]}",
            name,
        )
    return float(seconds)


def for_other_host(message: AddRequest) -> AddRequest:
    """The message with what is left of its time in place of a moment on our clock."""
    if message.deadline_s is None:
        return message
    left_s = message.deadline_s - time.monotonic()
    return msgspec.structs.replace(message, deadline_s=None, timeout_s=left_s)
