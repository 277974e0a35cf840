"""Per-request logits processors: the user's callables, run where they were written.

A request that has some gets each row of its logits here before sampling, and sends back what its
processors made of it. They see float32 tensors on the CPU; torch is imported with the first row,
never before. Whatever they raise fails their own request, and only that.
"""

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ipc.errors import RequestError
from ipc.messages import LogitsRow, ProcessedLogits
from ipc.tensors import Frames, FrameWriter, read

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LogitsProcessor:
    """One callable: ``(output ids, logits)``, or ``(prompt ids, output ids, logits)``."""

    function: Callable[..., Any]
    wants_prompt: bool

    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: "Tensor") -> Any:
        """Run it; the ids are its own copies."""
        if self.wants_prompt:
            return self.function(prompt_ids.copy(), output_ids.copy(), logits)
        return self.function(output_ids.copy(), logits)


@dataclass(slots=True)
class RowWork:
    """A row of logits with all that its processors may see. Safe to give to another thread."""

    row: LogitsRow
    frames: Frames
    processors: list[LogitsProcessor]
    prompt_ids: list[int]
    output_ids: list[int]


def resolve_processors(given: Sequence[Any] | None) -> list[LogitsProcessor]:
    """Callables, or import paths ("module:attribute") of callables.

    Raises:
        RequestError: one is neither, cannot be imported, or takes another number of arguments.
    """
    return [_resolve(each) for each in given or ()]


def run_processors(work: RowWork) -> tuple[ProcessedLogits, Frames]:
    """The answer to one row: the logits after every processor, or why there are none."""
    row = work.row
    try:
        logits = _apply(work)
    except Exception as err:  # the user's code may raise anything; its own request pays
        logger.warning("a logits processor failed: %s", err, exc_info=True)
        error = f"{type(err).__name__}: {err}"  # the core says where it came from
        return ProcessedLogits(row.req_id, row.index, row.position, None, error), ()
    writer = FrameWriter()
    ref = writer.add(logits.numpy().data, "float32", row.logits.shape)
    return ProcessedLogits(row.req_id, row.index, row.position, ref), writer.frames


def _apply(work: RowWork) -> "Tensor":
    import torch

    view = read(work.row.logits, work.frames)
    logits = torch.frombuffer(bytearray(view), dtype=torch.float32)  # the processors' own copy
    shape = logits.shape
    for processor in work.processors:
        logits = processor(work.prompt_ids, work.output_ids, logits)
        if not isinstance(logits, torch.Tensor) or logits.shape != shape:
            raise TypeError(
                f"{processor.function!r} must return a tensor of shape {tuple(shape)}, got "
                f"{tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits)}"
            )
    return logits.detach().to("cpu", torch.float32).contiguous()


def _resolve(given: Any) -> LogitsProcessor:
    function = _import(given) if isinstance(given, str) else given
    if not callable(function):
        raise RequestError(
            f"a logits processor must be callable, got {type(function).__name__}",
            "logits_processors",
        )
    num_arguments = _count_arguments(function)
    if num_arguments not in (2, 3):
        raise RequestError(
            f"a logits processor takes (output ids, logits) or (prompt ids, output ids, logits); "
            f"{function!r} takes {num_arguments} arguments",
            "logits_processors",
        )
    return LogitsProcessor(function, wants_prompt=num_arguments == 3)


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as err:
        raise RequestError(
            f"the logits processor {path!r} cannot be imported (expected 'module:attribute'): "
            f"{err}",
            "logits_processors",
        ) from err


def _count_arguments(function: Callable[..., Any]) -> int:
    """Positional arguments without a default; 2 for callables that do not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return 2
    required = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return max(2, len(required))
    return len(required)


class ProcessorThread:
    """Runs the user's code beside an event loop: one thread, so that rows stay in order.

    Args:
        send: called in the loop with each answer for the core.
    """

    def __init__(self, send: Callable[[ProcessedLogits, Frames], None]) -> None:
        self._send = send
        self._thread: ThreadPoolExecutor | None = None  # made with the first row

    def run(self, work: RowWork) -> None:
        """Process one row of logits, and send what became of it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "logits-processors")
        loop = asyncio.get_running_loop()
        loop.run_in_executor(self._thread, run_processors, work).add_done_callback(self._answer)

    def close(self) -> None:
        """Forget what has not begun. Harmless when repeated."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _answer(self, future: "asyncio.Future[tuple[ProcessedLogits, Frames]]") -> None:
        if not future.cancelled():
            self._send(*future.result())
