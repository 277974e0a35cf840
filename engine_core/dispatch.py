"""What each message of a frontend means to the engine core: one table for every transport."""

from typing import TYPE_CHECKING

from ipc.errors import EngineDeadError, EngineError
from ipc.messages import (
    AbortBranches,
    AbortRequests,
    AddRequest,
    Call,
    CallResult,
    ProcessedLogits,
    encoder,
)
from ipc.tensors import Frames

if TYPE_CHECKING:
    from engine_core.core import EngineCore

RequestMessage = AddRequest | AbortRequests | AbortBranches | ProcessedLogits


def dispatch(core: "EngineCore", client: bytes, message: RequestMessage, frames: Frames) -> None:
    """Apply a message about requests.

    Raises:
        ProtocolError: a tensor of the message does not fit its frame.
    """
    match message:
        case AddRequest():
            core.add_request(client, message)
        case AbortRequests():
            core.abort_requests(client, message.req_ids)
        case AbortBranches():
            core.abort_branches(client, message.branches)
        case ProcessedLogits():
            core.add_processed_logits(client, message, frames)


def answer_call(core: "EngineCore", call: Call) -> CallResult:
    """Run a control operation. Its failure is its caller's alone, unless a worker is gone.

    Raises:
        EngineDeadError: a worker is gone.
    """
    try:
        result = encoder.encode(core.call(call.operation))
    except EngineDeadError:
        raise
    except EngineError as err:
        return CallResult(call.call_id, error=str(err), error_kind=type(err).__name__)
    except Exception as err:  # an operation is a process loop of its own: report and live on
        return CallResult(call.call_id, error=f"{type(err).__name__}: {err}")
    return CallResult(call.call_id, result)
