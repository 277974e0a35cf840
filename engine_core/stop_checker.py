"""Whether a new token ends its branch, and why.

Stop strings are not looked at here: the frontend detokenises, finds them and aborts the branch.
"""

from engine_core.request import Request
from ipc.messages import FinishReason


def check_stop(request: Request) -> tuple[FinishReason, int | None] | None:
    """Why the newest output token ends ``request``: (reason, stop token that did it), or None.

    The stop token is None for end-of-text and for lengths. A token counts as a stop only once
    ``min_tokens`` were output, the stop itself included in the count.
    """
    output = request.output_token_ids
    token_id = output[-1]
    if len(output) > request.params.min_tokens:
        if token_id in request.eos_token_ids:
            return FinishReason.STOP, None
        if token_id in request.stop_token_ids:
            return FinishReason.STOP, token_id
    if len(output) >= request.max_output_tokens:
        return FinishReason.LENGTH, None
    return None
