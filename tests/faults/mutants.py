"""Servers with a bug each, which the oracle must find: python -m tests.faults.mutants NAME FLAGS...

The bug is planted into the classes of the running server, before it starts; nothing of it is in the
product. An oracle that passes one of these is void.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

from frontend.__main__ import main
from frontend.journal import JournalEntry
from frontend.openai import generation, sse
from frontend.outputs import CompletionOutput
from frontend.request_state import BranchState, RequestState

RATE = 1000  # tokens per fault
FIRST = 100  # tokens until the first one, so that a short run meets it
_tokens = itertools.count(RATE - FIRST)


def _spoil_takings(spoil: Callable[[CompletionOutput], None]) -> None:
    """Do something to every RATE-th taking that brings tokens."""
    original: Any = RequestState._take_branch

    def take_branch(self: RequestState, branch: BranchState, index: int) -> CompletionOutput:
        output: CompletionOutput = original(self, branch, index)
        for _ in output.token_ids:
            if next(_tokens) % RATE == 0:
                spoil(output)
        return output

    RequestState._take_branch = take_branch  # type: ignore[method-assign]


def drop_a_token() -> None:
    """A token and its text are lost between the engine and the stream; even usage agrees."""

    def spoil(output: CompletionOutput) -> None:
        output.token_ids = list(output.token_ids)[1:]
        output.text = ""

    _spoil_takings(spoil)


def repeat_a_token() -> None:
    """A token and its text are told twice."""

    def spoil(output: CompletionOutput) -> None:
        output.token_ids = [*list(output.token_ids)[:1], *output.token_ids]
        output.text += output.text

    _spoil_takings(spoil)


def lose_text() -> None:
    """A token is told, its text is not."""

    def spoil(output: CompletionOutput) -> None:
        output.text = output.text[:-1]

    _spoil_takings(spoil)


def end_twice() -> None:
    """The last chunk is sent a second time."""
    original = sse.ChunkFormat.chunk

    def chunk(self: sse.ChunkFormat, text: str, **fields: Any) -> bytes:
        data = original(self, text, **fields)
        return data + data if fields.get("finish_reason") else data

    sse.ChunkFormat.chunk = chunk  # type: ignore[method-assign]


def miscount() -> None:
    """Usage tells one token less than came."""
    original = generation.UsageCounter.body

    def body(self: generation.UsageCounter) -> dict[str, Any]:
        found = original(self)
        return found | {"completion_tokens": found["completion_tokens"] - 1}

    generation.UsageCounter.body = body  # type: ignore[method-assign]


def never_done() -> None:
    """Streams end without [DONE]."""
    sse.DONE = b": nothing\n\n"


def change_the_id() -> None:
    """Later chunks carry another id."""
    plain = sse.ChunkFormat.chunk
    numbers = itertools.count()

    def chunk(self: sse.ChunkFormat, text: str, **fields: Any) -> bytes:
        return plain(self, text, **fields).replace(b'"id":"cmpl-', b'"id":"cmpl-%d' % next(numbers))

    sse.ChunkFormat.chunk = chunk  # type: ignore[method-assign]


def repeat_at_resume() -> None:
    """The first token after a recovery is told twice."""
    original = JournalEntry.resume

    def resume(self: JournalEntry, epoch: int) -> Any:
        for branch in self.branches:
            if branch.token_ids and not branch.is_finished:
                del branch.token_ids[-1:]
        return original(self, epoch)

    JournalEntry.resume = resume  # type: ignore[method-assign]


def forget_the_last_token() -> None:
    """A request is sent again as if its newest token had another value."""
    original = JournalEntry.resume

    def resume(self: JournalEntry, epoch: int) -> Any:
        request = original(self, epoch)
        for branch in request.resumed:
            if len(branch.token_ids) > 1 and not branch.is_finished:
                branch.token_ids[-1] = (branch.token_ids[-1] + 1) % 1000 + 10
        return request

    JournalEntry.resume = resume  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        drop_a_token,
        repeat_a_token,
        lose_text,
        end_twice,
        miscount,
        never_done,
        change_the_id,
        repeat_at_resume,
        forget_the_last_token,
    )
}
AT_RECOVERY = ("repeat_at_resume", "forget_the_last_token")

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    sys.exit(main())
