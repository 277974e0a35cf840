"""What one call of paged attention is about: where the tokens are, and what a score becomes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """Where each request's queries and keys are; see ``paged_attention``."""

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int


class Options(NamedTuple):
    """What turns a raw score into a weight."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None


class StepLengths(NamedTuple):
    """``query_start_loc`` and ``seq_lens`` as the host knows them."""

    query_start_loc: Sequence[int]
    seq_lens: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepMemo:
    """What the layers of one step share: the first to need it works it out, the others find it.

    Make a new one for each step. What is in it is the kernels' own affair.
    """

    entries: dict[Any, Any] = field(default_factory=dict)
    # None where they are not known beforehand: in a recorded step, which serves any lengths.
    lengths: StepLengths | None = None
