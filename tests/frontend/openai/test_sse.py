"""Chunks are valid JSON whatever they carry; streams end in order whatever happens."""

import asyncio
import json
from typing import Any

import pytest

from frontend.openai.errors import ClientGoneError
from frontend.openai.sse import (
    DONE,
    ChunkFormat,
    EventStream,
    EventWriter,
    TextShortcut,
    first_error,
    role_chunk,
    stream_head,
    unless_disconnected,
    usage_chunk,
)
from frontend.request_state import RequestState
from ipc.errors import EngineDeadError
from ipc.messages import FinishReason
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import ProcessorRig, make_rig

HEAD = stream_head("id-1", "text_completion", 7, 'mo"del')


def parse(chunk: bytes) -> Any:
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    assert b"\n" not in chunk[:-2]
    return json.loads(chunk[6:])


@pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
@pytest.mark.parametrize("usage_null", [False, True], ids=["no usage", "usage null"])
@pytest.mark.parametrize("text", ["", "a", '"\\\n\r\x00\u2028', "é😀", "</script>"])
def test_the_fast_chunk_equals_the_rich_one(is_chat: bool, usage_null: bool, text: str) -> None:
    chunks = ChunkFormat(HEAD, 3, is_chat=is_chat, usage_null=usage_null)
    fast = parse(chunks.text_chunk(text))
    assert fast == parse(chunks.chunk(text))
    choice = fast["choices"][0]
    assert (choice["delta"]["content"] if is_chat else choice["text"]) == text
    assert (choice["index"], fast["model"], fast["created"]) == (3, 'mo"del', 7)
    assert ("usage" in fast) is usage_null


def test_a_rich_chunk_carries_everything() -> None:
    chunk = ChunkFormat(HEAD, 0, is_chat=False, usage_null=True).chunk(
        "x",
        logprobs={"tokens": ["x"]},
        finish_reason="stop",
        stop_reason=7,
        usage={"prompt_tokens": 1},
        extra={"token_ids": [5]},
    )
    body = parse(chunk)
    assert body["usage"] == {"prompt_tokens": 1}
    assert body["choices"] == [
        {"index": 0, "text": "x", "logprobs": {"tokens": ["x"]}, "finish_reason": "stop",
         "stop_reason": 7, "token_ids": [5]}
    ]  # fmt: skip


def test_role_and_usage_chunks_are_valid() -> None:
    role = parse(role_chunk(HEAD, 1, "assistant", {"usage": None}))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert role["usage"] is None
    assert parse(usage_chunk(HEAD, {"total_tokens": 3}))["choices"] == []


class FakeBody:
    """A connection that keeps what is written."""

    def __init__(self) -> None:
        self.takes_now = True
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


def make_shortcut(num_branches: int = 1) -> tuple[ProcessorRig, RequestState, TextShortcut, Any]:
    """A stream of deltas whose first token came and was taken, as by its coroutine."""
    rig = make_rig()
    state = rig.open(n=num_branches, output_kind=RequestOutputKind.DELTA)
    for index in range(num_branches):
        rig.say(state, "H", index=index)
    assert state.take() is not None
    body = FakeBody()
    formats = [ChunkFormat(HEAD, i, is_chat=False, usage_null=False) for i in range(num_branches)]
    return rig, state, TextShortcut(body, formats), body


def texts(data: bytes) -> list[tuple[int, str]]:
    chunks = [parse(chunk + b"\n\n") for chunk in data.split(b"\n\n")[:-1]]
    return [(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in chunks]


def test_the_shortcut_writes_the_text_of_every_branch_at_once() -> None:
    rig, state, shortcut, body = make_shortcut(num_branches=2)
    rig.say(state, "i", index=0)
    rig.say(state, "o", index=1)
    assert shortcut(state)
    assert [texts(data) for data in body.written] == [[(0, "i"), (1, "o")]]

    assert shortcut(state)
    assert len(body.written) == 1, "nothing is new"


def test_the_shortcut_leaves_a_reader_that_lags_to_the_coroutine() -> None:
    rig, state, shortcut, body = make_shortcut()
    body.takes_now = False
    for character in "ello":
        rig.say(state, character)
        assert not shortcut(state)
    body.takes_now = True
    assert shortcut(state)
    assert [texts(data) for data in body.written] == [[(0, "ello")]]


def test_the_shortcut_leaves_the_end_to_the_coroutine_with_all_tokens() -> None:
    rig, state, shortcut, body = make_shortcut()
    rig.say(state, "e")
    assert shortcut(state)
    rig.say(state, "y", finish_reason=FinishReason.LENGTH)
    assert not shortcut(state)
    output = state.take()
    assert output is not None
    (last,) = output.outputs
    assert (last.text, last.finish_reason) == ("y", "length")
    assert last.token_ids == state.branches[0].record.token_ids[1:], "they count in the usage"
    assert len(body.written) == 1


async def serve(
    produce: Any, *, leaves: asyncio.Event | None = None
) -> tuple[list[dict[str, Any]], Exception | None]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    try:
        await EventStream(produce)({"type": "http", "state": {}}, receive, send)  # type: ignore[arg-type]
    except EngineDeadError as error:
        return sent, error
    return sent, None


def test_an_error_before_the_first_event_is_raised_and_nothing_was_sent() -> None:
    async def produce(write: EventWriter) -> None:
        raise EngineDeadError("gone")

    sent, error = asyncio.run(serve(produce))
    assert sent == []
    assert str(error) == "gone"


def test_an_error_after_it_becomes_an_event_before_the_end() -> None:
    async def produce(write: EventWriter) -> None:
        await write(b"data: {}\n\n")
        raise EngineDeadError("gone")

    sent, error = asyncio.run(serve(produce))
    assert error is None
    bodies = [message["body"] for message in sent[1:]]
    assert parse(bodies[1])["error"]["message"] == "gone"
    assert bodies[2:] == [DONE, b""]
    assert sent[-1]["more_body"] is False


def test_a_client_that_leaves_cancels_the_producer_and_gets_nothing_more() -> None:
    was_cancelled = False

    async def run() -> list[dict[str, Any]]:
        leaves = asyncio.Event()

        async def produce(write: EventWriter) -> None:
            nonlocal was_cancelled
            await write(b"data: {}\n\n")
            leaves.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

        sent, _ = await serve(produce, leaves=leaves)
        return sent

    sent = asyncio.run(run())
    assert was_cancelled
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


def test_work_ends_as_itself_unless_the_client_leaves() -> None:
    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def give(value: int) -> int:
        await asyncio.sleep(0)
        return value

    async def fail() -> int:
        raise EngineDeadError("gone")

    assert asyncio.run(unless_disconnected(never, give(3))) == 3
    with pytest.raises(EngineDeadError):
        asyncio.run(unless_disconnected(never, fail()))

    async def wait() -> int:
        await asyncio.Event().wait()
        return 0

    with pytest.raises(ClientGoneError):
        asyncio.run(unless_disconnected(leave, wait()))


def test_a_real_error_of_a_group_comes_before_a_clients_leaving() -> None:
    nested = ExceptionGroup("inner", [ClientGoneError("left"), EngineDeadError("gone")])
    assert isinstance(first_error(ExceptionGroup("outer", [nested])), EngineDeadError)
    only = ExceptionGroup("outer", [ClientGoneError("left")])
    assert isinstance(first_error(only), ClientGoneError)
