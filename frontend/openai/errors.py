"""Errors as clients see them: the one table exception -> HTTP status, and the two body shapes.

Each body carries the nested form of today's SDKs and, beside it, the flat keys of 2024.
"""

import logging
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ipc.errors import (
    EngineDeadError,
    EngineGenerateError,
    EngineOverloadedError,
    EngineRestartingError,
    RequestError,
)

logger = logging.getLogger(__name__)


class NotFoundError(RequestError):
    """The model, or the path, does not exist here."""


class TooLargeError(RequestError):
    """The body is above the limit."""


class MediaTypeError(RequestError):
    """The body is declared as something other than plain JSON."""


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""


class DrainingError(EngineOverloadedError):
    """The server is shutting down and admits nothing new."""


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads the answer."""


# First match wins, so subclasses stand before their parents.
STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFoundError, 404, "NotFoundError"),
    (TooLargeError, 413, "RequestTooLargeError"),
    (MediaTypeError, 415, "UnsupportedMediaTypeError"),
    (BodyTimeoutError, 408, "RequestTimeoutError"),
    (RequestError, 400, "BadRequestError"),
    (DrainingError, 503, "ServiceUnavailableError"),
    (EngineOverloadedError, 429, "RateLimitError"),
    (EngineRestartingError, 503, "ServiceUnavailableError"),
    (EngineDeadError, 503, "ServiceUnavailableError"),
    (EngineGenerateError, 500, "InternalServerError"),
    (ClientGoneError, 499, "ClientClosedRequest"),
    # Input validation of the engine that predates RequestError raises plain ValueErrors.
    (ValueError, 400, "BadRequestError"),
)


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an exception and its JSON body. An unknown one says nothing of its inside."""
    for kind, status, name in STATUSES:
        if isinstance(error, kind):
            return status, _body(status, name, str(error), getattr(error, "param", None))
    return 500, _body(500, "InternalServerError", "internal server error", None)


def error_response(error: Exception) -> Response:
    """The response to an exception; retry advice where waiting helps."""
    status, body = error_body(error)
    response = json_response(body, status)
    if isinstance(error, EngineOverloadedError):
        seconds = min(60, max(1, round(error.retry_after_s)))
        response.headers["Retry-After"] = str(seconds)
    elif status == 503:
        response.headers["Retry-After"] = "5"
    if status in (408, 413):  # the rest of the body is not waited for
        response.headers["Connection"] = "close"
    return response


def json_response(body: Any, status: int = 200) -> Response:
    """A JSON response, encoded by msgspec."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def on_error(_: Request, error: Exception) -> Response:
    """Exception handler of the application, for every class in the table and for bugs."""
    if error_body(error)[0] == 500:
        logger.error("a request failed inside the server", exc_info=error)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    name, message = "HTTPError", str(error.detail)
    if error.status_code == 404:
        name, message = "NotFoundError", f"this server has no {request.scope['path'][:200]!r}"
    elif error.status_code == 405:
        name, message = "MethodNotAllowedError", f"not with {request.method[:20]!r}"
    body = _body(error.status_code, name, message, None)
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _body(status: int, name: str, message: str, param: str | None) -> dict[str, Any]:
    fields = {"message": message, "type": name, "param": param, "code": status}
    return {"error": fields, "object": "error", **fields}
