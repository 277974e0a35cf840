"""What each client is told of a step's result."""

import logging
from dataclasses import dataclass, field

from engine_core.lingering import NOBODY
from engine_core.request import Request
from engine_core.step_result import StepResult
from ipc.messages import EngineOutput, EngineOutputs, FinishReason, LogitsRow, SchedulerStats
from ipc.records import TensorRef
from ipc.tensors import Frames, read

logger = logging.getLogger(__name__)

Outputs = list[tuple[bytes, EngineOutputs, Frames]]  # with the client that each is for


@dataclass(slots=True)
class ClientOutputs:
    """What one client's next message holds."""

    outputs: list[EngineOutput] = field(default_factory=list)
    logits_rows: list[LogitsRow] = field(default_factory=list)
    frames: list[bytes | memoryview] = field(default_factory=list)


def collect_outputs(
    result: StepResult, frames: Frames, by_client: dict[bytes, ClientOutputs], wall_clock_s: float
) -> None:
    """Add a step's result to what clients are told.

    Args:
        wall_clock_s: what to add to the scheduler's clock to get ``time.time()``.
    """
    client: bytes | None = None
    outputs: list[EngineOutput] = []
    for request in result.gained:
        if request.client is not client:
            client = request.client
            outputs = by_client.setdefault(client, ClientOutputs()).outputs
        token_ids = request.output_token_ids
        position = len(token_ids) - 1
        if request.needs_full_output:
            outputs.append(_full_output(request, result, wall_clock_s))
        else:
            outputs.append(
                EngineOutput(request.req_id, request.index, position, token_ids[position:])
            )
    for request in result.failed:
        by_client.setdefault(request.client, ClientOutputs()).outputs.append(last_words(request))
    for request, ref in result.logits:
        told = by_client.setdefault(request.client, ClientOutputs())
        own = TensorRef(len(told.frames), ref.dtype, ref.shape)
        told.frames.append(read(ref, frames))
        told.logits_rows.append(LogitsRow(request.req_id, request.index, request.num_tokens, own))


def make_messages(
    told: dict[bytes, ClientOutputs], epoch: int, step_id: int, stats: SchedulerStats
) -> Outputs:
    """A message for each client; nobody is told what nobody waits for."""
    if stats.num_leaked_blocks:
        logger.error("%d KV blocks are held by nobody", stats.num_leaked_blocks)
    return [
        (client, EngineOutputs(epoch, step_id, each.outputs, each.logits_rows, stats), each.frames)
        for client, each in told.items()
        if client != NOBODY
    ]


def refusal(req_id: str, error: Exception) -> EngineOutput:
    """Tell that a request was not admitted."""
    kind = type(error).__name__
    return EngineOutput(req_id, 0, 0, [], FinishReason.ERROR, error=str(error), error_kind=kind)


def last_words(request: Request, error_kind: str = "EngineGenerateError") -> EngineOutput:
    """Tell that a branch ended without another token; ``error_kind`` counts where it failed."""
    return EngineOutput(
        request.req_id,
        request.index,
        len(request.output_token_ids),
        [],
        request.finish_reason,
        error=request.error,
        error_kind=error_kind,
    )


def _full_output(request: Request, result: StepResult, wall_clock_s: float) -> EngineOutput:
    """An output with everything that only some outputs carry."""
    first_index = len(request.output_token_ids) - 1
    is_first = not request.has_reported
    logprobs = result.logprobs.get(request)
    request.has_reported = True
    request.needs_full_output = request.params.logprobs is not None
    return EngineOutput(
        request.req_id,
        request.index,
        first_index,
        request.output_token_ids[first_index:],
        request.finish_reason,
        request.stop_reason,
        None if logprobs is None else [logprobs],
        request.prompt_logprobs if is_first else None,
        (request.num_cached_tokens or 0) if is_first else 0,
        _at_wall_clock(request.first_scheduled_s, wall_clock_s) if is_first else None,
    )


def _at_wall_clock(time_s: float | None, wall_clock_s: float) -> float | None:
    return None if time_s is None else time_s + wall_clock_s
