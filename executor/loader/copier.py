"""Copies weights from mapped files to a GPU by several threads, each through its own pinned memory.

A plain copy to a GPU goes through one pinned buffer of the driver, by one thread, at a sixth of
what the bus carries. Here each thread fills one of two buffers, which is where pages of the file
are read and converted, while the bus takes the other. Knows nothing of files or parameters.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

NUM_THREADS = 8
BUFFER_BYTES = 8 * 2**20


class Lane(Protocol):
    """What one thread copies by; ``PinnedLane`` outside tests."""

    def copy(self, target: Tensor, values: Tensor) -> None:
        """Bring the values on their way; they may be gone when it returns."""

    def finish(self) -> None:
        """Wait until all of them have arrived."""


class PinnedLane:
    """Two pinned buffers and a stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._places = [
            (torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]

    def copy(self, target: Tensor, values: Tensor) -> None:
        """Piece by piece, by turns of the buffers."""
        self._stream.wait_stream(
            torch.cuda.default_stream(self._device)
        )  # padding is cleared there
        with torch.cuda.stream(self._stream):
            for target_piece, piece in pieces(target, values, BUFFER_BYTES):
                buffer, is_free = self._places[0]
                self._places.reverse()
                is_free.synchronize()
                size = target_piece.numel() * target_piece.element_size()
                staged = buffer[:size].view(target_piece.dtype).view(target_piece.shape)
                staged.copy_(piece)
                target_piece.copy_(staged, non_blocking=True)
                is_free.record()

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()


def pieces(target: Tensor, values: Tensor, max_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both cut alike into parts of at most ``max_bytes`` of the target's type."""
    if target.ndim == 0 or target.numel() * target.element_size() <= max_bytes:
        yield target, values
        return
    row_bytes = target[0].numel() * target.element_size()
    if row_bytes > max_bytes:
        for target_row, row in zip(target, values, strict=True):
            yield from pieces(target_row, row, max_bytes)
        return
    rows = max_bytes // row_bytes
    for start in range(0, target.shape[0], rows):
        yield target[start : start + rows], values[start : start + rows]


class Copier:
    """Owns the threads. Leaving its context waits for every copy and raises the first failure."""

    def __init__(self, make_lane: Callable[[], Lane], num_threads: int = NUM_THREADS) -> None:
        # Short, so that whoever counts copies that were taken knows how many are done.
        self._work: queue.Queue[tuple[Tensor, Tensor] | None] = queue.Queue(num_threads)
        self._make_lane = make_lane
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name=f"copier-{number}")
            for number in range(num_threads)
        ]

    def __enter__(self) -> "Copier":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for _thread in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        if kind is None:
            self._raise_failure()

    def copy(self, target: Tensor, values: Tensor) -> None:
        """Have ``values`` copied into ``target`` before the context is left.

        Raises:
            Exception: an earlier copy failed.
        """
        self._raise_failure()
        self._work.put((target, values))

    def _run(self) -> None:
        lane: Lane | None = None
        while (work := self._work.get()) is not None:
            if not self._failures:  # else take the rest, so that nobody waits for room
                lane = self._try_copy(lane, *work)
        if lane is not None:
            with self._noting_failure():
                lane.finish()

    def _try_copy(self, lane: Lane | None, target: Tensor, values: Tensor) -> Lane | None:
        with self._noting_failure(), torch.inference_mode():
            lane = lane or self._make_lane()
            lane.copy(target, values)
        return lane

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as err:  # whatever a file or a driver makes of it is the caller's to hear
            self._failures.append(err)

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures[0]
