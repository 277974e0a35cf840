"""The terminal's side of a conversation: a chat until Ctrl-D.

It has a source of answers: a server at a URL, or an engine of its own.
"""

import asyncio
import http.client
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.parse import urlsplit

from frontend.chat_template import load_template, render, template_of_tokenizer
from frontend.completion import show, text_of
from ipc.errors import ConfigError, EngineError, EngineGenerateError
from ipc.sampling_params import SamplingParams

if TYPE_CHECKING:
    from frontend.engine_args import AsyncEngineArgs
    from frontend.outputs import RequestOutput

Conversation = list[dict[str, str]]


class AnswerSource(Protocol):
    """Who answers in a chat."""

    def answer(self, messages: Conversation) -> Iterator[str]:
        """The answer, piece by piece. Closing the iterator stops it."""


def talk(source: AnswerSource, system: str | None) -> int:
    """Read lines, show answers, until Ctrl-D; the exit code."""
    opening = [{"role": "system", "content": system}] if system else []
    messages: Conversation = list(opening)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            show("\n")
            return 0
        except KeyboardInterrupt:
            show("\n")
            continue
        if line == "/reset":
            messages = list(opening)
            show("(forgotten)\n")
        elif line:
            messages.append({"role": "user", "content": line})
            text = show_answer(source, messages)
            if text:
                messages.append({"role": "assistant", "content": text})
            else:
                messages.pop()


def show_answer(source: AnswerSource, messages: Conversation) -> str:
    """Print an answer as it comes; its text, up to where Ctrl-C or an error ended it."""
    pieces: list[str] = []
    try:
        with closing(source.answer(messages)) as answer:  # type: ignore[type-var]
            for piece in answer:
                pieces.append(piece)
                show(piece)
    except KeyboardInterrupt:
        show(" (stopped)")
    except (EngineError, OSError, http.client.HTTPException) as err:
        show(f"(failed: {err})")
    show("\n")
    return "".join(pieces)


class EngineChat:
    """Answers from an engine of its own, which lives as long as the ``with`` block."""

    def __init__(
        self, engine_args: "AsyncEngineArgs", params: SamplingParams, chat_template: str | None
    ) -> None:
        self._engine_args = engine_args
        self._params = params
        self._template = None if chat_template is None else load_template(chat_template)
        self._runner = asyncio.Runner()
        self._engine: Any = None
        self._num_answers = 0

    def __enter__(self) -> Self:
        self._runner.__enter__()
        try:
            self._runner.run(self._start())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._runner.run(self._stop())
        self._runner.close()

    def answer(self, messages: Conversation) -> Iterator[str]:
        """The answer, piece by piece."""
        assert self._template is not None
        tokenizer = self._engine.tokenizer
        prompt = render(self._template, messages, special_tokens=tokenizer.special_tokens_map)
        self._num_answers += 1
        inputs = {"prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False)}
        outputs = self._engine.generate(inputs, self._params, f"chat-{self._num_answers}")
        try:
            while (output := self._runner.run(_next_output(outputs))) is not None:
                yield text_of(output)
        finally:
            self._runner.run(outputs.aclose())

    async def _start(self) -> None:
        from frontend.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(self._engine_args)
        await self._engine.wait_until_ready()
        if self._template is None:
            self._template = template_of_tokenizer(self._engine.tokenizer.chat_template)
        if self._template is None:
            raise ConfigError("this model has no chat template; give one with --chat-template")

    async def _stop(self) -> None:
        self._engine.shutdown()


class UrlChat:
    """Answers from a server that speaks the OpenAI API."""

    def __init__(
        self, url: str, api_key: str | None, model: str | None, params: SamplingParams
    ) -> None:
        self._address = urlsplit(url if "//" in url else f"http://{url}")
        if self._address.scheme not in ("http", "https") or not self._address.hostname:
            raise ConfigError(f"--url must be like http://localhost:8000, got {url!r}")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._options: dict[str, Any] = {
            "stream": True,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if params.stop_strings:
            self._options["stop"] = params.stop_strings
        if model is not None:
            self._options["model"] = model

    def answer(self, messages: Conversation) -> Iterator[str]:
        """The answer, piece by piece; leaving early closes the connection, which ends it there."""
        is_tls = self._address.scheme == "https"
        kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        connection = kind(str(self._address.hostname), self._address.port, timeout=600)
        path = self._address.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        with closing(connection):
            body = json.dumps({"messages": messages, **self._options})
            connection.request("POST", path, body.encode(), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise EngineGenerateError(_error_message(response.status, response.read()))
            for line in response:
                if line.startswith(b"data: {"):
                    yield _delta(json.loads(line.removeprefix(b"data: ")))


def _delta(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise EngineGenerateError(str(chunk["error"].get("message")))
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _error_message(status: int, body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = body[:200].decode(errors="replace")
    message = error.get("message") if isinstance(error, dict) else error
    return f"HTTP {status}: {message}"


async def _next_output(
    outputs: AsyncGenerator["RequestOutput", None],
) -> "RequestOutput | None":
    return await anext(outputs, None)
