"""Streams that outlive their connection: by the field ``linger_s`` of a request.

Each event of such a stream says how many tokens its reader has by then, choice by choice, as the
event's id. A reader that lost its connection comes back with the last id it saw, here or at another
server of the same engine, and the stream goes on behind it. Meanwhile the request runs on; when
nobody comes back in time it is aborted.

What it takes to present the stream again travels with the request to the engine core, which keeps
it where this server dies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request

from frontend.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    Tuning,
    streams_deltas,
)
from frontend.outputs import CompletionOutput
from ipc.errors import RequestError
from ipc.messages import Linger

MAX_CHOICES = 128

# Fields that only matter before the engine has the request; some of them are large.
_PROMPT_FIELDS = {
    *("prompt", "messages", "suffix", "tools", "documents", "chat_template"),
    *("chat_template_kwargs", "allowed_token_ids", "logit_bias", "bad_words"),
}


class Presentation(msgspec.Struct, frozen=True, array_like=True):
    """How a stream's events look; opaque to the engine core."""

    is_chat: bool
    response_id: str
    created: int
    body: dict[str, Any]  # as it was sent, less what made the prompt

    def read_body(self) -> Tuning:
        """The body, with a placeholder for the prompt."""
        if self.is_chat:
            placeholder: dict[str, Any] = {"messages": [{"role": "user", "content": ""}]}
            return msgspec.convert(self.body | placeholder, ChatCompletionRequest)
        return msgspec.convert(self.body | {"prompt": ""}, CompletionRequest)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a stream's events begin: with a new answer, or behind what its reader has."""

    response_id: str
    created: int
    num_taken: Sequence[int] = ()  # tokens of each choice
    has_begun: bool = False  # the reader has seen events before


class EventIds:
    """The ids of one stream's events: tokens that its reader has, choice by choice."""

    __slots__ = ("_counts", "_is_on")

    def __init__(self, num_choices: int, num_taken: Sequence[int], *, is_on: bool) -> None:
        self._is_on = is_on
        self._counts = [*num_taken, *[0] * (num_choices - len(num_taken))]

    def before(self) -> bytes:
        """The id of an event that brings no tokens; empty where the stream has none."""
        return b"id: %s\n" % ",".join(map(str, self._counts)).encode() if self._is_on else b""

    def of(self, sequence: CompletionOutput) -> bytes:
        """The id of the event that brings these tokens."""
        if not self._is_on:
            return b""
        self._counts[sequence.index] += len(sequence.token_ids)
        return self.before()


def make_linger(request: Request, body: Tuning, origin: Origin) -> Linger | None:
    """How a body's stream lingers; None where it does not ask for that.

    Raises:
        RequestError: this stream cannot.
    """
    if not body.linger_s:
        return None
    prompt = getattr(body, "prompt", None)
    is_many = isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt)
    if not streams_deltas(body) or (is_many and len(prompt or ()) > 1):
        raise RequestError("linger_s needs a stream of a single prompt", "linger_s")
    if getattr(body, "logprobs", None) not in (None, False):
        raise RequestError("linger_s does not go with logprobs", "linger_s")
    fields = {
        name: value
        for name, value in msgspec.to_builtins(body).items()
        if name not in _PROMPT_FIELDS and value is not None
    }
    is_chat = isinstance(body, ChatCompletionRequest)
    presentation = Presentation(is_chat, origin.response_id, origin.created, fields)
    name = stream_name(request, origin.response_id)
    return Linger(name, body.linger_s, msgspec.msgpack.encode(presentation))


def stream_name(request: Request, response_id: str) -> str:
    """What the engine calls a stream: with several API keys, nobody finds another key's."""
    tenant = getattr(request.state, "tenant", None)
    return response_id if tenant is None else f"{tenant}:{response_id}"


def read_presentation(linger: Linger | None) -> Presentation:
    """How the events of a reclaimed stream look."""
    assert linger is not None, "only lingering requests are reclaimed"
    return msgspec.msgpack.decode(linger.presentation, type=Presentation)


def parse_event_id(text: str | None) -> list[int] | None:
    """Tokens of each choice that the reader has; None: it has seen nothing.

    Raises:
        RequestError: that is no id of an event.
    """
    if not text:
        return None
    counts = text.split(",")
    if len(counts) > MAX_CHOICES or not all(c.isascii() and c.isdigit() for c in counts):
        raise RequestError("after must be the id of the last event, like 12 or 12,9", "after")
    found = [int(count[:10]) for count in counts]
    if max(found) >= 2**31:
        raise RequestError("after is no id of an event", "after")
    return found
