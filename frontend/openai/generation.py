"""From a checked body to the engine's streams, and back to usage: what both APIs share."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from frontend.async_session import OutputStream
from frontend.openai.errors import (
    BodyTimeoutError,
    ClientGoneError,
    MediaTypeError,
    TooLargeError,
)
from frontend.openai.protocol import Body, Prompt, Tuning, check_plain, decode_body
from frontend.openai.sse import TextShortcut, first_error
from frontend.openai.state import ServerState
from frontend.outputs import RequestOutput
from ipc.errors import EngineGenerateError, RequestError
from ipc.messages import Linger
from ipc.sampling_params import SamplingParams

MAX_BODY_BYTES = 32 << 20
BODY_TIMEOUT_S = 30.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt on its way to the engine. ``req_id`` is ours alone: clients cannot choose it."""

    req_id: str
    prompt: Prompt
    params: SamplingParams
    priority: int
    cache_salt: str | None
    add_special_tokens: bool
    field_names: Mapping[str, str]  # the engine's name of a field -> the body's
    linger: Linger | None = None
    resumed: OutputStream | None = None  # the engine has it already


async def read_body(request: Request, kind: type[Body], state: ServerState) -> Body:
    """Read, decode and check a body; ignored fields are noted for the response's header.

    Raises:
        RequestError: too large, too slow, not JSON, or not of this form.
    """
    content_type = request.headers.get("content-type", "application/json")
    if content_type.split(";", 1)[0].strip().lower() not in ("application/json", "text/json"):
        raise MediaTypeError(f"send the body as application/json, not as {content_type[:100]!r}")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise MediaTypeError(f"send the body as it is, not in Content-Encoding {coding[:100]!r}")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            data = await _read_bounded(request)
    except TimeoutError as err:
        raise BodyTimeoutError(f"the body took longer than {BODY_TIMEOUT_S:.0f} s") from err
    body, ignored = decode_body(data, kind)
    if ignored and state.options.strict_fields:
        raise RequestError(f"unknown field {ignored[0][:100]!r}", param=ignored[0][:100])
    if ignored:
        request.state.ignored_fields = ignored
    return body


async def _read_bounded(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdigit() else 0
    chunks: list[bytes] = []
    received = 0
    while True:
        if max(size, received) > MAX_BODY_BYTES:
            raise TooLargeError(f"the body is above {MAX_BODY_BYTES} bytes")
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left while sending its body")
        chunks.append(message.get("body", b""))
        received += len(chunks[-1])
        if not message.get("more_body", False):
            return b"".join(chunks)


def make_jobs(
    request: Request,
    body: Tuning,
    prompts: list[Prompt],
    params: SamplingParams,
    field_names: Mapping[str, str],
) -> list[Job]:
    """One job per prompt, with ids that nobody can guess.

    With several API keys, only requests of one key use one another's prefixes, so that response
    times tell nobody what others asked.
    """
    check_plain("request_id", body.request_id)
    check_plain("cache_salt", body.cache_salt)
    check_plain("user", body.user)
    if body.request_id is not None:
        request.state.request_id = body.request_id  # echoed in a header, used for nothing else
    tenant = getattr(request.state, "tenant", None)
    salts = [salt for salt in (tenant, body.cache_salt) if salt is not None]
    group = secrets.token_hex(16)
    add_special_tokens = getattr(body, "add_special_tokens", True)
    return [
        Job(
            req_id=f"{group}-{i}",
            prompt=prompt,
            params=params,
            priority=body.priority or 0,
            cache_salt=":".join(salts) or None,
            add_special_tokens=True if add_special_tokens is None else add_special_tokens,
            field_names=field_names,
        )
        for i, prompt in enumerate(prompts)
    ]


async def consume(
    state: ServerState,
    job: Job,
    take: Callable[[RequestOutput], Awaitable[None]],
    shortcut: TextShortcut | None = None,
) -> None:
    """Give every output of a job to ``take``. Leaving early, for any reason, aborts it, unless
    it lingers.

    Args:
        shortcut: writes the text between the first output and the last by itself; its tokens
            are in the output after it.
    """
    options: dict[str, Any] = {
        "priority": job.priority,
        "cache_salt": job.cache_salt,
        "max_tokens_must_fit": True,
    }
    if job.linger is not None:
        options["linger"] = job.linger
    inputs: dict[str, Any] = {"prompt_token_ids": job.prompt}
    if isinstance(job.prompt, str):
        inputs = {"prompt": job.prompt}
        options["tokenization_kwargs"] = {"add_special_tokens": job.add_special_tokens}
    stream = job.resumed
    if stream is None:
        try:
            stream = await state.engine.add_request(job.req_id, inputs, job.params, **options)
        except RequestError as err:
            err.param = job.field_names.get(err.param or "", err.param)
            raise
    state.open_req_ids.add(job.req_id)
    if shortcut is not None:
        stream.offer_news_to(shortcut)
    try:
        async for output in stream:
            if output.error is not None:
                raise EngineGenerateError(output.error)
            await take(output)
    finally:  # no await here: clean-up must also work while being cancelled
        state.open_req_ids.discard(job.req_id)
        if job.linger is None or stream.finished:
            stream.close()
        else:  # its reader was lost, and may come back
            state.lingerers.keep(job.linger, stream)


async def run_all(work: Sequence[Callable[[], Awaitable[T]]], at_once: int) -> list[T]:
    """Do all, ``at_once`` at a time; the first failure cancels the rest and is raised as itself."""
    if len(work) == 1:
        return [await work[0]()]
    slots = asyncio.Semaphore(at_once)

    async def do(item: Callable[[], Awaitable[T]]) -> T:
        async with slots:
            return await item()

    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(do(item)) for item in work]
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return [task.result() for task in running]


async def final_output(state: ServerState, job: Job) -> RequestOutput:
    """The last output of a job, which with FINAL_ONLY is the only one."""
    last: list[RequestOutput] = []

    async def keep(output: RequestOutput) -> None:
        last[:] = [output]

    await consume(state, job, keep)
    if not last:
        raise EngineGenerateError("the engine ended the request without an answer")
    return last[0]


class UsageCounter:
    """Tokens of one response, over all its prompts."""

    __slots__ = ("_cached", "_completion", "_prompts")

    def __init__(self, num_prompts: int, num_taken: int = 0) -> None:
        """``num_taken`` tokens were generated before what will be counted."""
        self._prompts = [0] * num_prompts
        self._cached: list[int | None] = [None] * num_prompts
        self._completion = num_taken

    def take(self, number: int, output: RequestOutput) -> None:
        """Count an output (or a delta) of prompt ``number``."""
        self.take_prompt(number, output)
        for sequence in output.outputs:
            self._completion += len(sequence.token_ids)

    def take_prompt(self, number: int, output: RequestOutput) -> None:
        """Count the prompt ``number`` alone."""
        self._prompts[number] = len(output.prompt_token_ids)
        if output.num_cached_tokens is not None:
            self._cached[number] = output.num_cached_tokens

    def drop_completion(self) -> None:
        """Forget generated tokens: the client asked for none."""
        self._completion = 0

    def body(self) -> dict[str, Any]:
        """The ``usage`` object."""
        prompt = sum(self._prompts)
        known = [count for count in self._cached if count is not None]
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self._completion,
            "completion_tokens": self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(known)} if known else None,
        }


def asks_continuous_usage(body: Tuning) -> bool:
    """Whether every chunk carries the usage so far."""
    return bool(body.stream_options and body.stream_options.continuous_usage_stats)


def asks_final_usage(body: Tuning) -> bool:
    """Whether a chunk without choices at the end carries the usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def check_stream_options(body: Tuning) -> None:
    """Refuse stream options without a stream, and streams of what comes only whole."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not available in a stream", param="prompt_logprobs")
