"""Engines that are wrong on purpose: each must be flagged by an oracle, or the oracle is void.

A mutant patches a process that a test has started. Those of the API process are applied by
``run_mutant``; those of the core live in a class that ``--executor-class`` names, since that is
made in the core's process. Nothing of this is part of the product.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

EVERY = 1000  # tokens, for mutants that seldom err; some apply it to chunks


def drop_token(every: int = EVERY) -> None:
    """Loses one token in ``every`` with its text: ids, text and usage agree with each other."""
    _edit_deltas(every, lambda output: (output.token_ids.pop(), setattr(output, "text", "")))


def repeat_token(every: int = EVERY) -> None:
    """Sends one token in ``every`` twice, with its text."""

    def repeat(output: Any) -> None:
        output.token_ids.append(output.token_ids[-1])
        output.text += output.text

    _edit_deltas(every, repeat)


def change_text(every: int = EVERY) -> None:
    """Sends a text that is not that of the ids."""
    _edit_deltas(every, lambda output: setattr(output, "text", output.text + "x"))


def _edit_deltas(every: int, edit: Callable[[Any], object]) -> None:
    """Change a delta of one token, one in ``every``."""
    from frontend.request_state import RequestState

    original, counter = RequestState._take_branch, itertools.count(1)

    def take(self: Any, branch: Any, index: int) -> Any:
        output = original(self, branch, index)
        if len(output.token_ids) == 1 and output.text and next(counter) % every == 0:
            edit(output)
        return output

    RequestState._take_branch = take  # type: ignore[method-assign]


def repeat_at_resume() -> None:
    """Sends the last accepted token once more when a request goes on with another core."""
    from frontend.journal import JournalEntry
    from frontend.request_state import RequestState

    resume, take = JournalEntry.resume, RequestState._take_branch
    resumed: set[int] = set()

    def mark(self: Any, epoch: int) -> Any:
        resumed.add(id(self))
        return resume(self, epoch)

    def repeat(self: Any, branch: Any, index: int) -> Any:
        output = take(self, branch, index)
        if id(self.entry) in resumed and output.token_ids and output.text:
            resumed.discard(id(self.entry))
            output.token_ids.insert(0, output.token_ids[0])
        return output

    JournalEntry.resume = mark  # type: ignore[method-assign]
    RequestState._take_branch = repeat  # type: ignore[method-assign]


def accept_stale_epoch() -> None:
    """Takes in outputs of a core that is not the request's any more."""
    from frontend.output_processor import OutputProcessor

    process = OutputProcessor.process

    def accept(self: Any, message: Any, frames: Any, now_s: float) -> Any:
        for output in message.outputs:
            state = self._states.get(output.req_id)
            if state is not None:
                state.entry.epoch = message.epoch
        return process(self, message, frames, now_s)

    OutputProcessor.process = accept  # type: ignore[method-assign]


def finish_twice() -> None:
    """Ends each choice of a stream twice."""
    from frontend.openai.sse import ChunkFormat

    chunk = ChunkFormat.chunk

    def twice(self: Any, text: str, **fields: Any) -> bytes:
        data = chunk(self, text, **fields)
        if fields.get("finish_reason") is None:
            return data
        fields["extra"] = None
        return data + chunk(self, "", **fields)

    ChunkFormat.chunk = twice  # type: ignore[method-assign]


def miscount_usage() -> None:
    """Tells one token more than there were."""
    from frontend.openai.generation import UsageCounter

    body = UsageCounter.body

    def more(self: Any) -> dict[str, Any]:
        usage = body(self)
        return usage | {"completion_tokens": usage["completion_tokens"] + 1}

    UsageCounter.body = more  # type: ignore[method-assign]


def forget_done() -> None:
    """Ends streams without a word."""
    from frontend.openai import sse

    sse.DONE = b""


def leak_file_per_disconnect() -> None:
    """Keeps a file open for each client that left."""
    from frontend.openai.errors import ClientGoneError

    def leak(self: Any, *arguments: Any) -> None:
        Exception.__init__(self, *arguments)
        os.open(os.devnull, os.O_RDONLY)

    ClientGoneError.__init__ = leak  # type: ignore[method-assign,assignment]


IN_API_PROCESS: Mapping[str, Callable[[], None]] = {
    "drop-token": lambda: drop_token(),
    "repeat-token": lambda: repeat_token(),
    "change-text": lambda: change_text(),
    "repeat-at-resume": repeat_at_resume,
    "accept-stale-epoch": accept_stale_epoch,
    "finish-twice": finish_twice,
    "miscount-usage": miscount_usage,
    "forget-done": forget_done,
    "leak-file": leak_file_per_disconnect,
}


def _leak_block() -> None:
    """Forgets one block of each aborted request."""
    from engine_core.core import EngineCore

    abort = EngineCore.abort_requests

    def leak(self: Any, client: bytes, req_ids: Any) -> None:
        req_ids = list(req_ids)
        for req_id in req_ids:
            group = self._groups.get(client, {}).get(req_id)
            for branch in [] if group is None else group.branches:
                if branch.block_ids:
                    branch.block_ids.pop()
        abort(self, client, req_ids)

    EngineCore.abort_requests = leak  # type: ignore[method-assign]


class _Mutant:
    """An executor that is the usual one, in a core that was changed."""

    def __new__(cls, config: Any) -> Any:
        """The usual executor with workers of their own."""
        from executor.multiproc import MultiprocExecutor

        cls.mutate()
        return MultiprocExecutor(config)

    @staticmethod
    def mutate() -> None:
        """Change the core's process."""


class LeakBlock(_Mutant):
    """Forgets one block of each aborted request."""

    mutate = staticmethod(_leak_block)


class WrongToken(_Mutant):
    """Answers another token than the model's, once in a while."""

    def __new__(cls, config: Any) -> Any:
        """An executor that changes answers."""
        from executor.multiproc import MultiprocExecutor

        class Wrong(MultiprocExecutor):
            """Changes the first id of an answer, one answer in twenty."""

            _count = 0

            def receive(self, timeout_s: float | None) -> Any:
                answer = super().receive(timeout_s)
                if answer is not None and answer[0].sampled_token_ids:
                    self._count += 1
                    if self._count % 20 == 0:
                        ids = answer[0].sampled_token_ids
                        ids[0] = (ids[0] + 1) % 8192
                return answer

        return Wrong(config)


IN_CORE = {
    "leak-block": f"{__name__}:LeakBlock",
    "wrong-token": f"{__name__}:WrongToken",
}
