"""POST /v1/chat/completions: messages in, an answer of the response role out."""

import time
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from frontend.chat_template import check_template_kwargs, flatten_messages, render
from frontend.openai.errors import json_response
from frontend.openai.generation import (
    Job,
    UsageCounter,
    asks_continuous_usage,
    asks_final_usage,
    check_stream_options,
    consume,
    final_output,
    make_jobs,
    read_body,
)
from frontend.openai.linger import EventIds, Origin, make_linger
from frontend.openai.logprobs import chat_logprobs, prompt_logprobs_body
from frontend.openai.protocol import (
    ChatCompletionRequest,
    TokenizeRequest,
    refuse_unserved,
    sampling_params,
    streams_deltas,
)
from frontend.openai.sse import (
    ChunkFormat,
    EventStream,
    EventWriter,
    event,
    role_chunk,
    stream_head,
    unless_disconnected,
    usage_chunk,
)
from frontend.openai.state import ServerState
from frontend.outputs import CompletionOutput, RequestOutput
from frontend.untrusted_template import render_untrusted
from ipc.errors import RequestError

# How the engine's names of fields are called in this body.
FIELD_NAMES = {
    "prompt": "messages",
    "prompt_token_ids": "messages",
    "logprobs": "top_logprobs",
}


async def create_chat_completion(state: ServerState, request: Request) -> Response:
    """Serve one request."""
    state.check_admission()
    body = await read_body(request, ChatCompletionRequest, state)
    state.check_model(body.model)
    answer = await make_answer(state, request, body)
    if streams_deltas(body):
        return EventStream(answer.stream)
    if body.stream:
        return EventStream(answer.stream_whole)
    return json_response(await unless_disconnected(request.receive, answer.whole()))


async def make_answer(
    state: ServerState, request: Request, body: ChatCompletionRequest
) -> "ChatAnswer":
    """Check everything that can be checked before the engine sees the request."""
    refuse_unserved(body)
    check_stream_options(body)
    max_tokens, field_names = body.max_tokens, FIELD_NAMES
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        field_names = FIELD_NAMES | {"max_tokens": "max_completion_tokens"}
    params = sampling_params(body, state.chat_defaults, max_tokens)
    prompt = await chat_prompt(state, body)
    (job,) = make_jobs(request, body, [prompt], params, field_names)
    origin = Origin(f"chatcmpl-{job.req_id[:32]}", int(time.time()))
    job = replace(job, linger=make_linger(request, body, origin))
    return ChatAnswer(state, body, job, origin)


async def chat_prompt(state: ServerState, body: ChatCompletionRequest | TokenizeRequest) -> str:
    """The prompt that the chat template makes of the messages.

    Raises:
        RequestError: there is no template, or it refuses the messages.
    """
    template = body.chat_template or state.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template; start the server with --chat-template",
            param="messages",
        )
    tokenizer = state.need_tokenizer()
    names = ("add_generation_prompt", "continue_final_message", "tools", "documents")
    options: dict[str, Any] = {name: getattr(body, name, None) for name in names}
    options["add_generation_prompt"] = options["add_generation_prompt"] is not False
    options["continue_final_message"] = bool(options["continue_final_message"])
    options |= {"special_tokens": dict(tokenizer.special_tokens_map)}
    kwargs = body.chat_template_kwargs or {}
    check_template_kwargs(kwargs)
    if body.chat_template is None:
        return render(template, body.messages or [], **options, **kwargs)
    if not state.options.trust_request_chat_template:
        raise RequestError(
            "chat_template in a request is off; --trust-request-chat-template turns it on",
            param="chat_template",
        )
    async with state.template_slots:
        return await render_untrusted(template, body.messages or [], options | kwargs)


class ChatAnswer:
    """One chat answer in the making, whole or as a stream."""

    def __init__(
        self, state: ServerState, body: ChatCompletionRequest, job: Job, origin: Origin
    ) -> None:
        self._state = state
        self._body = body
        self._job = job
        self._origin = origin
        self._id, self._created = origin.response_id, origin.created
        self._usage = UsageCounter(1, sum(origin.num_taken))
        last = flatten_messages(body.messages[-1:])[0]
        asks_role = body.add_generation_prompt is not False
        self._role = state.options.response_role if asks_role else last["role"]
        # With echo, an answer of the last message's own role begins with that message.
        is_same = bool(body.echo) and last["role"] == self._role
        self._echo: str = last["content"] if is_same else ""

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        output = await final_output(self._state, self._job)
        self._usage.take(0, output)
        answer: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._state.model_name,
            "choices": [self._choice(sequence) for sequence in output.outputs],
            "usage": self._usage.body(),
        }
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs or [])
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        return answer

    async def stream_whole(self, write: EventWriter) -> None:
        """The whole answer as one event: nobody knows before the end which sequences win."""
        await write(event(await self.whole()))

    async def stream(self, write: EventWriter) -> None:
        """The answer as deltas; a role chunk per choice comes first."""
        body = self._body
        head = stream_head(self._id, "chat.completion.chunk", self._created, self._state.model_name)
        usage_null = asks_final_usage(body)
        indexes = range(body.n or 1)
        formats = [ChunkFormat(head, i, is_chat=True, usage_null=usage_null) for i in indexes]
        is_plain = not (body.logprobs or body.return_token_ids or asks_continuous_usage(body))
        has_begun = self._origin.has_begun
        ids = EventIds(len(formats), self._origin.num_taken, is_on=self._job.linger is not None)

        async def take(output: RequestOutput) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                fields = self._opening_fields(output)
                opening = [role_chunk(head, i, self._role, fields) for i in indexes]
                if self._echo:
                    usage = fields.get("usage")
                    opening += [chunks.chunk(self._echo, usage=usage) for chunks in formats]
                await write(b"".join(ids.before() + chunk for chunk in opening))
            self._usage.take(0, output)
            for sequence in output.outputs:
                chunks, event_id = formats[sequence.index], ids.of(sequence)
                if not is_plain or sequence.finish_reason is not None:
                    await write(event_id + self._rich_chunk(chunks, output, sequence))
                elif sequence.text:
                    await write(event_id + chunks.text_chunk(sequence.text))

        shortcut = write.shortcut(formats) if is_plain and self._job.linger is None else None
        await consume(self._state, self._job, take, shortcut)
        if usage_null:
            await write(usage_chunk(head, self._usage.body()))

    def _opening_fields(self, output: RequestOutput) -> dict[str, Any]:
        """What the role chunks carry beside their choice."""
        fields: dict[str, Any] = {}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = output.prompt_token_ids
        if asks_continuous_usage(self._body):
            self._usage.take_prompt(0, output)
            fields["usage"] = self._usage.body()
        elif asks_final_usage(self._body):
            fields["usage"] = None
        return fields

    def _rich_chunk(
        self, chunks: ChunkFormat, output: RequestOutput, sequence: CompletionOutput
    ) -> bytes:
        extra: dict[str, Any] = {}
        if self._body.return_token_ids:
            extra["token_ids"] = sequence.token_ids
        return chunks.chunk(
            sequence.text,
            logprobs=self._logprobs(sequence),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            usage=self._usage.body() if asks_continuous_usage(self._body) else None,
            extra=extra,
        )

    def _choice(self, sequence: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": sequence.index,
            "message": {"role": self._role, "content": self._echo + sequence.text},
            "logprobs": self._logprobs(sequence),
            "finish_reason": sequence.finish_reason,
            "stop_reason": sequence.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = sequence.token_ids
        return choice

    def _logprobs(self, sequence: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs or sequence.logprobs is None:
            return None
        return chat_logprobs(
            sequence.token_ids,
            sequence.logprobs,
            self._body.top_logprobs or 0,
            as_ids=bool(self._body.return_tokens_as_token_ids),
        )
