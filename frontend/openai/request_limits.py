"""What a request may take beside its tokens: time, and a share of the engine.

Time is the client's wish (``X-Request-Timeout``, seconds from the arrival of its body) within the
server's cap; the engine holds it. The share is its API key's: of the key only a number goes on.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from frontend.deadlines import check_timeout
from frontend.openai.state import ServerOptions
from ipc.errors import DeadlineExceededError, RequestError

TIMEOUT_HEADER = "X-Request-Timeout"
GRACE_S = 1.0  # for the engine to end a request by itself; then it is not waited for


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of one HTTP request, for all of its prompts."""

    deadline_s: float | None = None  # time.monotonic()
    tenant: int = 0
    tenant_weight: float = 1.0

    def options(self) -> dict[str, Any]:
        """As the engine takes them; what is not limited is left out."""
        options: dict[str, Any] = {}
        if self.deadline_s is not None:
            options["deadline"] = self.deadline_s
        if self.tenant:
            options |= {"tenant": self.tenant, "tenant_weight": self.tenant_weight}
        return options

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Wait for an engine no longer than that, should it not keep the deadline itself.

        Raises:
            DeadlineExceededError: it did not.
        """
        if self.deadline_s is None:
            yield
            return
        left_s = self.deadline_s - time.monotonic() + GRACE_S
        timer = asyncio.timeout(left_s)
        try:
            async with timer:
                yield
        except TimeoutError as err:
            if not timer.expired():
                raise
            raise DeadlineExceededError(
                "the request's time was up, and the engine did not answer"
            ) from err


NO_LIMITS = RequestLimits()


def read_limits(request: Request) -> RequestLimits:
    """The limits of a request.

    Raises:
        RequestError: the header holds no time.
    """
    options: ServerOptions = request.app.state.server.options
    timeout_s = _timeout(request, options.max_request_timeout)
    tenant: int = getattr(request.state, "tenant_index", 0)
    if timeout_s is None and not tenant:
        return NO_LIMITS
    weights = options.api_key_weights
    return RequestLimits(
        deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
        tenant=tenant,
        tenant_weight=weights[tenant - 1] if tenant and weights else 1.0,
    )


def _timeout(request: Request, cap_s: float | None) -> float | None:
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return cap_s
    try:
        seconds = float(text)
    except ValueError as err:
        message = f"{TIMEOUT_HEADER} must be a number of seconds, got {text[:40]!r}"
        raise RequestError(message, TIMEOUT_HEADER) from err
    timeout_s = check_timeout(seconds, TIMEOUT_HEADER)
    assert timeout_s is not None
    return timeout_s if cap_s is None else min(timeout_s, cap_s)
