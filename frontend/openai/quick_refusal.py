"""The quick no: what cannot be served now is refused before anybody reads or routes it.

A flood is answered at the rate at which this runs, so it stands before the web framework, and
behind the check of keys: strangers learn nothing about the load.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.openai.errors import error_response
from frontend.openai.state import ServerState
from ipc.errors import EngineError

GENERATION_PATHS = ("/v1/completions", "/v1/chat/completions")


class QuickRefusal:
    """Refuses generations while the server cannot take any; lets everything else through."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with 429 or 503 at once, or pass on."""
        if (refusal := self._refusal(scope)) is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> EngineError | None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return None
        if not scope["path"].endswith(GENERATION_PATHS):
            return None
        try:
            self._state.check_admission()
        except EngineError as refusal:
            return refusal
        return None
