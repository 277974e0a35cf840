"""The HTTP application: its routes, its middleware, and where errors become statuses.

Knows nothing of sockets, signals or start-up (``server.py``), nor how an answer is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from frontend import __version__
from frontend.metrics import render_metrics
from frontend.openai.auth import Authentication
from frontend.openai.chat import create_chat_completion
from frontend.openai.completions import create_completion
from frontend.openai.envelope import Envelope
from frontend.openai.errors import (
    STATUSES,
    DrainingError,
    error_response,
    json_response,
    on_error,
    on_http_error,
)
from frontend.openai.models import list_models, show_model
from frontend.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    openapi_schema,
)
from frontend.openai.state import ServerState
from frontend.openai.streams import end_stream, resume_stream
from frontend.openai.tokens import detokenize, tokenize
from frontend.openai.user_middleware import UserMiddleware
from ipc.errors import EngineError, UnsupportedError

BODIES: tuple[type[msgspec.Struct], ...] = (
    CompletionRequest,
    ChatCompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

router = APIRouter()


@dataclass(frozen=True, slots=True)
class CorsOptions:
    """What browsers on other origins may do; each field is a flag of the same name."""

    allow_credentials: bool = False
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)


def build_app(
    state: ServerState,
    cors: CorsOptions | None = None,
    middleware: Sequence[UserMiddleware] = (),
) -> FastAPI:
    """The application on a ready engine. The user's own middleware is outermost."""
    app = FastAPI(title="Heliograph", version=__version__, redirect_slashes=False, redoc_url=None)
    app.state.server = state
    app.include_router(router)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    for kind, _, _ in STATUSES:
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_error)
    if state.options.api_keys:
        app.add_middleware(
            Authentication, api_keys=state.options.api_keys, root_path=state.options.root_path
        )
    cors = cors or CorsOptions()
    app.add_middleware(
        CORSMiddleware,
        allow_origins=cors.allowed_origins,
        allow_credentials=cors.allow_credentials,
        allow_methods=cors.allowed_methods,
        allow_headers=cors.allowed_headers,
    )
    app.add_middleware(Envelope, state=state, is_outermost=not middleware)
    for own in middleware:
        own.add_to(app)
    return app


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the schemas of the bodies that the server decodes itself."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for kind in BODIES:
            schemas |= openapi_schema(kind)[1]
        app.openapi_schema = schema
    return app.openapi_schema


def _body_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    content = {"application/json": {"schema": openapi_schema(kind)[0]}}
    errors = {
        status: {"description": text}
        for status, text in (
            ("400", "The request cannot be served as asked"),
            ("401", "No valid key"),
            ("404", "No such model"),
            ("413", "The body is too large"),
            ("415", "The body is not declared as JSON"),
            ("429", "Too much is in flight; retry later"),
            ("503", "The server is stopping, or its engine is dead"),
        )
    }
    return {"requestBody": {"required": True, "content": content}, "responses": errors}


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


@router.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    return await create_completion(_state(request), request)


@router.post("/v1/chat/completions", openapi_extra=_body_of(ChatCompletionRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await create_chat_completion(_state(request), request)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models that can be asked."""
    return json_response(list_models(_state(request)))


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One model."""
    return json_response(show_model(_state(request), name))


@router.post("/tokenize", openapi_extra=_body_of(TokenizeRequest))
async def tokenize_prompt(request: Request) -> Response:
    """Token ids of a prompt or of messages."""
    return json_response(await tokenize(_state(request), request))


@router.post("/detokenize", openapi_extra=_body_of(DetokenizeRequest))
async def detokenize_tokens(request: Request) -> Response:
    """The text of token ids."""
    return json_response(await detokenize(_state(request), request))


@router.post("/v1/embeddings", include_in_schema=False)
async def embeddings(request: Request) -> Response:
    """Refused: this version generates text only."""
    raise UnsupportedError("pooling and embeddings are not supported by this version")


@router.get("/v1/streams/{response_id}")
async def stream(request: Request, response_id: str) -> Response:
    """Go on with a stream that was asked to linger, behind ``after`` or ``Last-Event-ID``."""
    return await resume_stream(_state(request), request, response_id)


@router.delete("/v1/streams/{response_id}")
async def delete_stream(request: Request, response_id: str) -> Response:
    """End a stream that was asked to linger."""
    return await end_stream(_state(request), request, response_id)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine lives, however busy; 503 when it is dead or the server stops."""
    state = _state(request)
    try:
        if state.is_draining:
            raise DrainingError("the server is shutting down")
        await state.engine.check_health()
    except EngineError as err:
        response = error_response(err)
        response.status_code = 503
        return response
    return Response()


@router.get("/ping")
async def ping(request: Request) -> Response:
    """As /health."""
    return await health(request)


@router.post("/ping")
async def post_ping(request: Request) -> Response:
    """As /health."""
    return await health(request)


@router.get("/version")
async def version() -> Response:
    """The version of this server."""
    return json_response({"version": __version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """How many generations are open."""
    return json_response({"server_load": len(_state(request).open_req_ids)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What Prometheus scrapes."""
    body, content_type = render_metrics(_state(request).metrics)
    return Response(body, headers={"Content-Type": content_type})


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """People with a browser want the documentation."""
    return RedirectResponse(request.scope.get("root_path", "") + "/docs")
