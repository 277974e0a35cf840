"""Bring a new request's state to where an earlier one of the same request was.

The tokens go through detokeniser and stop strings once more, which are functions of the tokens
alone; what the reader has already is passed over.
"""

from collections.abc import Sequence

import msgspec

from frontend.request_state import RequestState
from ipc.messages import EngineOutput, ResumedBranch


def replay(
    state: RequestState, branches: Sequence[EngineOutput], num_taken: Sequence[int], now_s: float
) -> list[ResumedBranch]:
    """Take in all that the branches have brought; what a core must know to go on with them.

    Args:
        state: a new one. Afterwards its next output begins behind what was taken.
        branches: one each, in order, from the first token on.
        num_taken: tokens of each branch that the reader has; none of those not named.
    """
    taken = [*num_taken, *[0] * (len(branches) - len(num_taken))]
    resumed = []
    for brought, count in zip(branches, taken, strict=True):
        ids = brought.new_token_ids
        if count:
            is_whole = count == len(ids)
            first = msgspec.structs.replace(
                brought,
                new_token_ids=ids[:count],
                finish_reason=brought.finish_reason if is_whole else None,
            )
            state.update(first, now_s)
            state.skip(brought.index, count)
        if count < len(ids) or brought.finish_reason is not None:
            rest = msgspec.structs.replace(brought, first_index=count, new_token_ids=ids[count:])
            state.update(rest, now_s)
        branch = state.branches[brought.index]
        resumed.append(
            ResumedBranch(brought.index, list(branch.token_ids), branch.finish_reason is not None)
        )
    return resumed
