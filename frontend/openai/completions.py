"""POST /v1/completions: prompts in, choices numbered prompt times n out, whole or streamed."""

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

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
    run_all,
)
from frontend.openai.linger import EventIds, Origin, make_linger
from frontend.openai.logprobs import CompletionLogprobs, Position, prompt_logprobs_body
from frontend.openai.protocol import (
    MAX_BRANCHES_PER_BODY,
    CompletionRequest,
    prompts_of,
    refuse_unserved,
    sampling_params,
    streams_deltas,
)
from frontend.openai.sse import (
    ChunkFormat,
    EventStream,
    EventWriter,
    event,
    stream_head,
    unless_disconnected,
    usage_chunk,
)
from frontend.openai.state import COMPLETION_DEFAULTS, ServerState
from frontend.outputs import CompletionOutput, RequestOutput
from ipc.errors import RequestError

if TYPE_CHECKING:
    from frontend.tokenizer import Tokenizer

# How the engine's names of fields are called in this body.
FIELD_NAMES = {"prompt_token_ids": "prompt"}


async def create_completion(state: ServerState, request: Request) -> Response:
    """Serve one request."""
    state.check_admission()
    body = await read_body(request, CompletionRequest, state)
    state.check_model(body.model)
    answer = make_answer(state, request, body)
    if streams_deltas(body):
        return EventStream(answer.stream)
    if body.stream:
        return EventStream(answer.stream_whole)
    return json_response(await unless_disconnected(request.receive, answer.whole()))


def make_answer(state: ServerState, request: Request, body: CompletionRequest) -> "Answer":
    """Check everything that can be checked before the engine sees the request."""
    refuse_unserved(body)
    check_stream_options(body)
    prompts = prompts_of(body.prompt)
    num_branches = len(prompts) * (body.best_of or body.n or 1)
    if num_branches > MAX_BRANCHES_PER_BODY:
        raise RequestError(
            f"prompt: {num_branches} sequences in one request; the cap is {MAX_BRANCHES_PER_BODY}",
            param="prompt",
        )
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    is_prompt_only = bool(body.echo) and max_tokens == 0
    params = sampling_params(body, COMPLETION_DEFAULTS, 1 if is_prompt_only else max_tokens)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    jobs = make_jobs(request, body, prompts, params, FIELD_NAMES)
    origin = Origin(f"cmpl-{jobs[0].req_id[:32]}", int(time.time()))
    if (linger := make_linger(request, body, origin)) is not None:
        jobs = [replace(jobs[0], linger=linger)]
    return Answer(state, body, jobs, origin, is_prompt_only=is_prompt_only)


def resume_answer(
    state: ServerState, body: CompletionRequest, job: Job, origin: Origin
) -> "Answer":
    """A stream that goes on."""
    is_prompt_only = bool(body.echo) and body.max_tokens == 0
    return Answer(state, body, [job], origin, is_prompt_only=is_prompt_only)


class Answer:
    """One completion answer in the making, whole or as a stream."""

    def __init__(
        self,
        state: ServerState,
        body: CompletionRequest,
        jobs: list[Job],
        origin: Origin,
        *,
        is_prompt_only: bool,
    ) -> None:
        self._state = state
        self._body = body
        self._jobs = jobs
        self._is_prompt_only = is_prompt_only
        self._origin = origin
        self._id, self._created = origin.response_id, origin.created
        self._usage = UsageCounter(len(jobs), sum(origin.num_taken))
        self._as_ids = bool(body.return_tokens_as_token_ids)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        work = [partial(final_output, self._state, job) for job in self._jobs]
        outputs = await run_all(work, self._state.max_prompts_at_once)
        choices = []
        for number, output in enumerate(outputs):
            self._count(number, output)
            choices += [self._choice(number, output, sequence) for sequence in output.outputs]
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._state.model_name,
            "choices": choices,
            "usage": self._usage.body(),
        }

    async def stream_whole(self, write: EventWriter) -> None:
        """The whole answer as one event: nobody knows before the end which sequences win."""
        await write(event(await self.whole()))

    async def stream(self, write: EventWriter) -> None:
        """The answer as deltas."""
        head = stream_head(self._id, "text_completion", self._created, self._state.model_name)
        usage_null = asks_final_usage(self._body)
        num_choices = self._body.n or 1
        streams = []
        for number, job in enumerate(self._jobs):
            formats = [
                ChunkFormat(head, number * num_choices + i, is_chat=False, usage_null=usage_null)
                for i in range(num_choices)
            ]
            streams.append(partial(self._stream_job, number, job, formats, write))
        await run_all(streams, self._state.max_prompts_at_once)
        if usage_null:
            await write(usage_chunk(head, self._usage.body()))

    async def _stream_job(
        self, number: int, job: Job, formats: list[ChunkFormat], write: EventWriter
    ) -> None:
        body = self._body
        logprobs = [self._make_logprobs() for _ in formats]
        has_begun = [self._origin.has_begun] * len(formats)
        ids = EventIds(len(formats), self._origin.num_taken, is_on=job.linger is not None)
        is_plain = not (
            body.echo
            or body.return_token_ids
            or body.logprobs is not None
            or asks_continuous_usage(body)
        )

        async def take(output: RequestOutput) -> None:
            self._count(number, output)
            for sequence in output.outputs:
                index, event_id = sequence.index, ids.of(sequence)
                if is_plain and sequence.finish_reason is None:
                    if sequence.text:
                        await write(event_id + formats[index].text_chunk(sequence.text))
                    continue
                is_first = not has_begun[index]
                has_begun[index] = True
                chunk = self._rich_chunk(
                    formats[index], output, sequence, logprobs[index], is_first
                )
                await write(event_id + chunk)

        shortcut = write.shortcut(formats) if is_plain and job.linger is None else None
        await consume(self._state, job, take, shortcut)

    def _rich_chunk(
        self,
        chunk_format: ChunkFormat,
        output: RequestOutput,
        sequence: CompletionOutput,
        logprobs: CompletionLogprobs | None,
        is_first: bool,
    ) -> bytes:
        body = self._body
        is_echo = bool(body.echo) and is_first
        extra: dict[str, Any] = {}
        if body.return_token_ids:
            if is_first:
                extra["prompt_token_ids"] = output.prompt_token_ids
            extra["token_ids"] = [] if self._is_prompt_only else sequence.token_ids
        return chunk_format.chunk(
            self._text(output, sequence, is_echo=is_echo),
            logprobs=self._logprobs(output, sequence, logprobs, is_echo=is_echo),
            finish_reason=self._finish_reason(sequence),
            stop_reason=None if self._is_prompt_only else sequence.stop_reason,
            usage=self._usage.body() if asks_continuous_usage(body) else None,
            extra=extra,
        )

    def _choice(
        self, number: int, output: RequestOutput, sequence: CompletionOutput
    ) -> dict[str, Any]:
        is_echo = bool(self._body.echo)
        choice: dict[str, Any] = {
            "index": number * (self._body.n or 1) + sequence.index,
            "text": self._text(output, sequence, is_echo=is_echo),
            "logprobs": self._logprobs(output, sequence, self._make_logprobs(), is_echo=is_echo),
            "finish_reason": self._finish_reason(sequence),
            "stop_reason": None if self._is_prompt_only else sequence.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(output.prompt_logprobs or [])
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
            choice["token_ids"] = [] if self._is_prompt_only else sequence.token_ids
        return choice

    def _count(self, number: int, output: RequestOutput) -> None:
        self._usage.take(number, output)
        if self._is_prompt_only:  # the engine generates one token at least; nobody asked for it
            self._usage.drop_completion()

    def _text(self, output: RequestOutput, sequence: CompletionOutput, *, is_echo: bool) -> str:
        text = "" if self._is_prompt_only else sequence.text
        if not is_echo:
            return text
        if output.prompt is not None:
            return output.prompt + text
        tokenizer = self._state.need_tokenizer()
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False) + text

    def _make_logprobs(self) -> CompletionLogprobs | None:
        num_top = self._body.logprobs
        if num_top is None:
            return None
        tokenizer = self._state.tokenizer
        text_of = None if tokenizer is None else partial(_text_of_token, tokenizer)
        return CompletionLogprobs(num_top, as_ids=self._as_ids, text_of=text_of)

    def _logprobs(
        self,
        output: RequestOutput,
        sequence: CompletionOutput,
        logprobs: CompletionLogprobs | None,
        *,
        is_echo: bool,
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        token_ids: list[int] = []
        positions: list[Position] = []
        if is_echo and output.prompt_logprobs is not None:
            token_ids += output.prompt_token_ids
            positions += output.prompt_logprobs
        if not self._is_prompt_only and sequence.logprobs is not None:
            token_ids += sequence.token_ids
            positions += sequence.logprobs
        return logprobs.take(token_ids, positions)

    def _finish_reason(self, sequence: CompletionOutput) -> str | None:
        if self._is_prompt_only and sequence.finish_reason is not None:
            return "length"
        return sequence.finish_reason


def _text_of_token(tokenizer: "Tokenizer", token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)
