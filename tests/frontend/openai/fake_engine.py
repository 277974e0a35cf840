"""A scripted stand-in for AsyncLLM, one token per character, and a client for the application."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from frontend.openai.api_server import build_app
from frontend.openai.state import ServerOptions, ServerState, make_state
from frontend.outputs import CompletionOutput, Logprob, RequestOutput
from ipc.config import EngineConfig, ModelConfig
from ipc.errors import EngineDeadError, RequestError
from ipc.sampling_params import RequestOutputKind, SamplingParams

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class CharTokenizer:
    """Token ids are code points; ``encode`` puts a 1 in front when it adds special tokens."""

    chat_template = CHATML
    special_tokens_map = {"eos_token": "\x02"}
    vocab_size = 0x110000

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in ids if i > 2 or not skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [chr(i) for i in ids]


@dataclass
class Call:
    """What the server asked the engine."""

    inputs: dict[str, Any]
    params: SamplingParams
    request_id: str
    options: dict[str, Any]


@dataclass
class FakeEngine:
    """Answers every prompt with ``answer``, a character per output, and records what happened."""

    answer: str = "Hello"
    finish_reason: str = "stop"
    stop_reason: int | str | None = None
    fail_after: int | None = None  # outputs before ``failure`` is raised
    failure: Exception = field(default_factory=lambda: RequestError("scripted"))
    hang_after: int | None = None  # outputs before the stream waits for ever
    max_model_len: int = 100
    generation_config: dict[str, Any] = field(default_factory=dict)
    served_model_name: list[str] = field(default_factory=lambda: ["fake", "alias"])
    errored: bool = False
    overload: Exception | None = None  # what new requests are refused with
    restarting: Any = None
    calls: list[Call] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    has_been_shut_down: bool = False
    num_stats_lines: int = 0
    tokenizer: Any = field(default_factory=CharTokenizer)

    @property
    def vllm_config(self) -> EngineConfig:
        return EngineConfig(
            model_config=ModelConfig(
                model="fake-model",
                served_model_name=self.served_model_name,
                max_model_len=self.max_model_len,
                generation_config=self.generation_config,
                skip_tokenizer_init=self.tokenizer is None,
            )
        )

    @property
    def dead_error(self) -> EngineDeadError:
        return EngineDeadError("the engine died")

    def check_admission(self) -> None:
        if self.overload is not None:
            raise self.overload

    async def check_health(self) -> None:
        if self.errored:
            raise self.dead_error

    async def do_log_stats(self) -> None:
        self.num_stats_lines += 1

    async def wait_until_ready(self) -> None:
        await asyncio.sleep(0)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    def shutdown(self, timeout: float | None = None) -> None:
        self.has_been_shut_down = True

    async def add_request(
        self, request_id: str, inputs: dict[str, Any], params: SamplingParams, **options: Any
    ) -> "FakeStream":
        self.calls.append(Call(inputs, params, request_id, options))
        _, prompt_ids = self._prompt(inputs, options)
        num_tokens = len(prompt_ids) + (params.max_tokens or 0)
        if options["max_tokens_must_fit"] and num_tokens > self.max_model_len:
            raise RequestError(f"max_tokens: {num_tokens} tokens in all", param="max_tokens")
        return FakeStream(self.generate(inputs, params, request_id, **options))

    async def generate(
        self, inputs: dict[str, Any], params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        prompt, prompt_ids = self._prompt(inputs, options)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        has_finished = False
        try:
            for step, sequences in enumerate(self._steps(params)):
                await asyncio.sleep(0)
                if step == self.fail_after:
                    raise self.failure
                if step == self.hang_after:
                    await asyncio.Event().wait()
                is_last = sequences[0].finish_reason is not None
                yield RequestOutput(
                    request_id=request_id,
                    prompt=prompt,
                    prompt_token_ids=prompt_ids,
                    prompt_logprobs=self._prompt_logprobs(params, prompt_ids),
                    outputs=sequences,
                    finished=is_last,
                    num_cached_tokens=len(prompt_ids) // 2,
                )
            has_finished = True
        finally:
            self.num_open -= 1
            if not has_finished:
                self.aborted.append(request_id)

    def _prompt(
        self, inputs: dict[str, Any], options: dict[str, Any]
    ) -> tuple[str | None, list[int]]:
        if "prompt" not in inputs:
            return None, inputs["prompt_token_ids"]
        kwargs = options.get("tokenization_kwargs", {})
        prompt_ids = CharTokenizer().encode(inputs["prompt"], **kwargs)
        if len(prompt_ids) >= self.max_model_len:
            raise RequestError(f"the prompt has {len(prompt_ids)} tokens", param="prompt")
        return inputs["prompt"], prompt_ids

    def _steps(self, params: SamplingParams) -> Iterable[list[CompletionOutput]]:
        """Outputs step by step; branch i answers in capitals when i is odd."""
        length = min(len(self.answer), params.max_tokens or len(self.answer))
        answers = [self.answer.upper() if i % 2 else self.answer for i in range(params.n)]
        reason = self.finish_reason if length == len(self.answer) else "length"
        if params.output_kind is RequestOutputKind.FINAL_ONLY:
            yield [self._sequence(i, a[:length], reason, params) for i, a in enumerate(answers)]
            return
        for at in range(length):
            is_last = at == length - 1
            yield [
                self._sequence(i, a[at], reason if is_last else None, params)
                for i, a in enumerate(answers)
            ]

    def _sequence(
        self, index: int, text: str, reason: str | None, params: SamplingParams
    ) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=[ord(c) for c in text],
            cumulative_logprob=None,
            logprobs=None if params.logprobs is None else [_position(ord(c)) for c in text],
            finish_reason=reason,
            stop_reason=self.stop_reason if reason else None,
        )

    def _prompt_logprobs(self, params: SamplingParams, ids: list[int]) -> list[Any] | None:
        if params.prompt_logprobs is None:
            return None
        return [None, *(_position(i) for i in ids[1:])]


class FakeStream:
    """The engine's stream: an iterator that can be left without awaiting anything."""

    def __init__(self, outputs: AsyncGenerator[RequestOutput, None]) -> None:
        self._outputs = outputs

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> RequestOutput:
        return await anext(self._outputs)

    def offer_news_to(self, listener: Any) -> None:
        """Every output here goes to the iterator: a listener gets no offers, as none must."""

    def close(self) -> None:
        with contextlib.suppress(StopIteration, GeneratorExit):
            self._outputs.aclose().send(None)


def _position(token_id: int) -> dict[int, Logprob]:
    """The chosen token second best, at -1; a rival in front; the third out of every top 2."""
    return {
        token_id: Logprob(-1.0, 2, chr(token_id)),
        33: Logprob(-0.5, 1, "!"),
        63: Logprob(float("-inf"), 3, "?"),
    }


def make_server(
    engine: FakeEngine | None = None, **options: Any
) -> tuple[FakeEngine, ServerState, FastAPI]:
    """A fake engine, and the application on it."""
    engine = engine or FakeEngine()
    state = make_state(engine, ServerOptions(**options), CollectorRegistry(), created=7)  # type: ignore[arg-type]
    return engine, state, build_app(state)


def ask(
    app: Any, method: str, path: str, *, headers: dict[str, str] | None = None, **kwargs: Any
) -> httpx.Response:
    """One request to the application, in an event loop of its own."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, headers=headers, **kwargs)

    return asyncio.run(send())


def complete(app: Any, **body: Any) -> httpx.Response:
    """POST /v1/completions."""
    return ask(app, "POST", "/v1/completions", json={"prompt": "Hi", **body})


def chat(app: Any, **body: Any) -> httpx.Response:
    """POST /v1/chat/completions."""
    messages = [{"role": "user", "content": "Hi"}]
    return ask(app, "POST", "/v1/chat/completions", json={"messages": messages, **body})


def events(response: httpx.Response) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    import json

    frames = response.text.split("\n\n")
    assert frames.pop() == "", "a stream ends with an empty line"
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


async def drive(
    app: Any,
    path: str,
    body: bytes,
    on_body: Callable[[bytes], bool],
    *,
    leaves_at_once: asyncio.Event | None = None,
) -> list[dict[str, Any]]:
    """Drive the application as an ASGI server does; ``on_body`` says when the client leaves.

    With ``leaves_at_once`` the client leaves when that event is set, whatever was sent.
    """
    left = leaves_at_once or asyncio.Event()
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and on_body(message.get("body", b"")):
            left.set()
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"server"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    await app(scope, receive, send)
    return sent
