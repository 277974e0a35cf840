"""The journal: what it takes to go on with every open request after the engine core was lost.

An entry holds the request as it was admitted and the output tokens that were accepted, branch by
branch. From these alone the request can be sent again: a new core computes prompt and accepted
tokens anew, counts the latter as output, and continues with the same draws, because randomness
is a function of seed and position. The state of detokeniser and stop strings needs no copy: it
lives beside the entry, in this process, and goes on where it was.

Pure bookkeeping: no sockets, no clock.
"""

from dataclasses import dataclass

import msgspec

from ipc.errors import EngineGenerateError
from ipc.messages import AddRequest, EngineOutput, ResumedBranch, TokenLogprobs


@dataclass(slots=True)
class JournalBranch:
    """The accepted output of one branch. ``token_ids`` only ever grows."""

    index: int
    token_ids: list[int]
    is_finished: bool = False


@dataclass(slots=True)
class JournalEntry:
    """One open request."""

    request: AddRequest  # as admitted: prompt ids, parameters with seed, adapter, salt, priority
    epoch: int  # of the core that works on it; outputs of another one are not for us
    branches: list[JournalBranch]
    attempts: int = 1  # times the request was sent
    num_prompt_logprobs: int = 0  # prompt positions whose logprobs were taken in
    num_repeated_prompt_logprobs: int = 0  # of those, how many the core will send once more

    @property
    def req_id(self) -> str:
        """The name of the request on the wire."""
        return self.request.req_id

    def new_tokens(self, output: EngineOutput) -> list[int] | None:
        """The part of ``output.new_token_ids`` that was not accepted before.

        None when the output says nothing new.

        Raises:
            EngineGenerateError: tokens between the accepted ones and these are missing.
        """
        branch = self.branches[output.index]
        num_accepted = len(branch.token_ids)
        num_known = num_accepted - output.first_index
        if num_known < 0:
            raise EngineGenerateError(
                f"output tokens {num_accepted} to {output.first_index - 1} of sequence "
                f"{output.index} were lost on the way"
            )
        if branch.is_finished or (num_known and num_known >= len(output.new_token_ids)):
            return None
        return output.new_token_ids[num_known:]

    def new_prompt_logprobs(self, output: EngineOutput) -> list[TokenLogprobs]:
        """The prompt positions of ``output`` that were not taken in before."""
        given = output.prompt_logprobs or []
        num_skipped = min(self.num_repeated_prompt_logprobs, len(given))
        self.num_repeated_prompt_logprobs -= num_skipped
        self.num_prompt_logprobs += len(given) - num_skipped
        return given[num_skipped:]

    def resume(self, epoch: int) -> AddRequest:
        """Move to another epoch: the message that makes its core continue this request."""
        self.epoch = epoch
        self.attempts += 1
        self.num_repeated_prompt_logprobs = self.num_prompt_logprobs
        resumed = [
            ResumedBranch(branch.index, list(branch.token_ids), branch.is_finished)
            for branch in self.branches
            if branch.token_ids or branch.is_finished
        ]
        return msgspec.structs.replace(self.request, resumed=resumed, num_attempts=self.attempts)


class Journal:
    """Owns the entries of all open requests, oldest first."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._entries

    def open(self, request: AddRequest, epoch: int) -> JournalEntry:
        """Begin an entry."""
        assert request.req_id not in self._entries, f"request {request.req_id} is open already"
        branches = [JournalBranch(index, []) for index in range(request.params.num_branches)]
        entry = self._entries[request.req_id] = JournalEntry(request, epoch, branches)
        return entry

    def close(self, req_id: str) -> None:
        """End an entry; unknown ids are no error."""
        self._entries.pop(req_id, None)

    def resume_all(self, epoch: int) -> list[AddRequest]:
        """Move every open request to a new core, oldest first."""
        return [entry.resume(epoch) for entry in self._entries.values()]
