"""GET and DELETE /v1/streams/{id}: take up a lingering stream again, or end it."""

import secrets

from starlette.requests import Request
from starlette.responses import Response

from frontend.openai import completions
from frontend.openai.chat import ChatAnswer
from frontend.openai.errors import NotFoundError, json_response
from frontend.openai.generation import Job
from frontend.openai.linger import Origin, parse_event_id, read_presentation, stream_name
from frontend.openai.protocol import ChatCompletionRequest, CompletionRequest
from frontend.openai.sse import EventStream
from frontend.openai.state import ServerState
from ipc.errors import UnknownStreamError
from ipc.messages import ReclaimedRequest


async def resume_stream(state: ServerState, request: Request, response_id: str) -> Response:
    """The rest of a stream, behind the event that ``after`` or ``Last-Event-ID`` names.

    Without either the stream is told from its beginning.
    """
    state.check_admission()
    last_event_id = request.query_params.get("after") or request.headers.get("last-event-id")
    num_taken = parse_event_id(last_event_id)
    reclaimed = await _reclaim(state, request, response_id, num_taken or [])
    presentation = read_presentation(reclaimed.request.linger)
    body = presentation.read_body()
    params = reclaimed.request.params.clone()
    params.stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    req_id = f"{response_id}-{secrets.token_hex(8)}"
    stream = await state.engine.resume_stream(reclaimed, req_id, params, num_taken or [])
    job = Job(
        req_id,
        reclaimed.request.prompt_token_ids,
        params,
        reclaimed.request.priority,
        reclaimed.request.cache_salt,
        add_special_tokens=False,
        field_names={},
        linger=reclaimed.request.linger,
        resumed=stream,
    )
    origin = Origin(
        presentation.response_id,
        presentation.created,
        num_taken or [],
        has_begun=num_taken is not None,
    )
    if isinstance(body, ChatCompletionRequest):
        return EventStream(ChatAnswer(state, body, job, origin).stream)
    assert isinstance(body, CompletionRequest)
    return EventStream(completions.resume_answer(state, body, job, origin).stream)


async def end_stream(state: ServerState, request: Request, response_id: str) -> Response:
    """Abort a lingering stream for good; one that has ended stays until its time is over."""
    reclaimed = await _reclaim(state, request, response_id, [])
    is_ended = all(branch.finish_reason is not None for branch in reclaimed.branches)
    return json_response({"id": response_id, "deleted": not is_ended})


async def _reclaim(
    state: ServerState, request: Request, response_id: str, num_taken: list[int]
) -> ReclaimedRequest:
    name = stream_name(request, response_id)
    try:
        reclaimed = await state.engine.reclaim_stream(name, num_taken)
    except UnknownStreamError as err:
        raise NotFoundError(str(err)) from err
    state.lingerers.drop(name)  # if it was ours, it has just been aborted
    return reclaimed
