"""What surrounds every HTTP answer: its request id, the names of ignored fields, the open count.

Pure ASGI, one wrapped ``send`` per request, which after the head does nothing but pass on.
"""

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontend.openai.http_protocol import DIRECT_BODY
from frontend.openai.state import ServerState

MAX_HEADER_CHARS = 1000


class Envelope:
    """Adds ``X-Request-Id`` and ``X-Ignored-Fields``, and counts requests being answered.

    A client's own id is echoed when it is short and printable. It names nothing inside.
    ``--root-path`` is set here, for proxies that strip the prefix and for those that do not.
    """

    def __init__(self, app: ASGIApp, state: ServerState, *, is_outermost: bool = True) -> None:
        """``is_outermost``: no middleware of the user's is further out and wants to see bodies."""
        self._app = app
        self._state = state
        self._is_outermost = is_outermost
        self._root_path = state.options.root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and complete the head of the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _client_request_id(scope) or secrets.token_hex(16).encode()
        if self._root_path:
            scope["root_path"] = self._root_path
        notes = scope.setdefault("state", {})
        # Between here and a stream nothing of ours looks at the body: its chunks may skip the
        # wrapped sends in between. The user's own middleware is further out, and sees them.
        notes["send_body"] = send
        if self._is_outermost:
            notes["direct_body"] = scope.get("extensions", {}).get(DIRECT_BODY, {}).get("body")
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                headers = list(message.get("headers", ()))
                own_id = notes.get("request_id")
                headers.append((b"x-request-id", own_id.encode() if own_id else request_id))
                if ignored := notes.get("ignored_fields"):
                    headers.append((b"x-ignored-fields", _header_value(ignored)))
                message["headers"] = headers
            await send(message)

        self._state.num_open += 1
        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            self._state.num_open -= 1


def _client_request_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            is_plain = 0 < len(value) <= 256 and value.isascii() and value.decode().isprintable()
            return bytes(value) if is_plain else None
    return None


def _header_value(names: list[str]) -> bytes:
    """Field names for a header: what is not plain ASCII, or a comma, is replaced."""
    text = ", ".join(
        "".join(c if c.isascii() and c.isprintable() and c != "," else "?" for c in name[:100])
        for name in names[:64]
    )
    return text[:MAX_HEADER_CHARS].encode()
