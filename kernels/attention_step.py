"""What one call of paged attention is about: where the tokens are, and what a score becomes."""

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


@dataclass(frozen=True, slots=True)
class StepMemo:
    """What the layers of one step share: the first to need it works it out, the others find it.

    Make a new one for each step. What is in it is the kernels' own affair.
    """

    entries: dict[Any, Any] = field(default_factory=dict)
