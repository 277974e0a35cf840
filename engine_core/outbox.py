"""What the core owes its frontends: credits, and outputs held back while there are none.

A frontend that is slow to take outputs in must neither fill memory nor slow down the step loop.
Each unacknowledged ``EngineOutputs`` costs it a credit; without credits, outputs are merged into
one that waits, whose size is bounded by the tokens of its open requests.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ipc.messages import EngineOutput, EngineOutputs
from ipc.tensors import Frames

T = TypeVar("T")


@dataclass(slots=True)
class FrontendState:
    """One connected frontend. ``pending`` is set only while it has no credit left."""

    peer: bytes
    name: str
    pid: int
    credits: int
    last_heard_s: float
    has_spoken: bool = False  # more than Hello
    pending: EngineOutputs | None = None

    def offer(self, outputs: EngineOutputs, frames: Frames) -> EngineOutputs | None:
        """What to send now for ``outputs``: everything due, or None when it has to wait.

        Rows of logits never wait, as each holds up a request; they take along what waited, so
        that order is kept. There are at most as many as rows, each sent once.
        """
        if self.pending is not None:
            outputs, self.pending = merge(self.pending, outputs), None
        if self.credits <= 0 and not frames:
            self.pending = outputs
            return None
        self.credits -= 1
        return outputs

    def acknowledge(self, num_outputs: int, max_credits: int) -> EngineOutputs | None:
        """Take credits back; what waited and may be sent now."""
        self.credits = min(self.credits + max(num_outputs, 0), max_credits)
        if self.pending is None or self.credits <= 0:
            return None
        due, self.pending = self.pending, None
        self.credits -= 1
        return due


def merge(earlier: EngineOutputs, later: EngineOutputs) -> EngineOutputs:
    """One message in place of two, as if their steps had been one longer step."""
    merged = {(output.req_id, output.index): output for output in earlier.outputs}
    for output in later.outputs:
        key = (output.req_id, output.index)
        known = merged.get(key)
        merged[key] = output if known is None else _join(known, output)
    return msgspec.structs.replace(
        later,
        outputs=list(merged.values()),
        stats=later.stats if later.stats is not None else earlier.stats,
    )


def _join(earlier: EngineOutput, later: EngineOutput) -> EngineOutput:
    if earlier.finish_reason is not None:
        return later  # the id was used again: the frontend has forgotten the earlier request
    return msgspec.structs.replace(
        later,
        first_index=earlier.first_index,
        new_token_ids=[*earlier.new_token_ids, *later.new_token_ids],
        logprobs=_concatenate(earlier.logprobs, later.logprobs),
        prompt_logprobs=_concatenate(earlier.prompt_logprobs, later.prompt_logprobs),
        num_cached_tokens=max(earlier.num_cached_tokens, later.num_cached_tokens),
        first_scheduled_time_s=(
            later.first_scheduled_time_s
            if earlier.first_scheduled_time_s is None
            else earlier.first_scheduled_time_s
        ),
    )


def _concatenate(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    if first is None or second is None:
        return second if first is None else first
    return [*first, *second]
