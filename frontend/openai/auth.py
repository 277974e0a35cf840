"""Who may ask: Bearer keys, checked on the raw path, closed by default.

Pure ASGI: nothing here looks at a Host header or at a URL built from one, and no route is open
because somebody forgot to close it.
"""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.openai.errors import json_response

OPEN_PATHS = frozenset(
    {"/health", "/health/live", "/health/ready", "/ping", "/metrics", "/version"}
)


class Authentication:
    """Lets a request through when it carries one of the keys, or asks for an open path.

    Keys are kept and compared as digests, all of them each time, so that the time an answer takes
    says nothing about how close a guess was.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Sequence[str],
        root_path: str = "",
        *,
        shares_prefixes: bool = False,
    ) -> None:
        """``shares_prefixes``: what one key's requests left in the cache may serve another's."""
        self._app = app
        self._root_path = root_path.rstrip("/")
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._has_tenants = len(self._digests) > 1
        self._salts: dict[bytes, str] = {}
        if not shares_prefixes:
            self._salts = {digest: _salt(digest) for digest in self._digests}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 401, or pass on, with the tenant's name where there are several."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        digest = self._matching_digest(scope)
        if digest is not None and self._has_tenants:
            notes = scope.setdefault("state", {})
            notes["tenant"] = digest.hex()[:32]
            notes["tenant_index"] = 1 + self._digests.index(digest)  # 0 is nobody
        if digest in self._salts:
            scope.setdefault("state", {})["key_salt"] = self._salts[digest]
        if digest is not None or self._is_open(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await json_response({"error": "Unauthorized"}, 401)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        path: str = scope["path"]
        if self._root_path and path.startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        return scope["method"] == "OPTIONS" or path in OPEN_PATHS

    def _matching_digest(self, scope: Scope) -> bytes | None:
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return None
        scheme, _, key = values[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        digest = _digest(key.strip())
        found = None
        for own in self._digests:
            if hmac.compare_digest(own, digest):
                found = own
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _salt(digest: bytes) -> str:
    """The cache salt of a key: tells nothing of the key, nor of what keys are compared by."""
    return hashlib.sha256(b"cache salt of " + digest).hexdigest()
