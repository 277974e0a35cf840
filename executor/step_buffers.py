"""Memory of recorded steps, at fixed addresses, and pinned memory of steps under way.

A recorded step reads and writes the same places on the device each time. One copy brings what the
host knows (rows, lengths, where queries start), one copy takes the result away; both are queued on
the stream of the step, so the next step cannot overtake them. On the host every step under way has
a staging of its own, since the copies are made later than they are asked for.
Shapes: T packed tokens, B requests.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.input_batch import PackedRows, empty_inputs
from executor.request_states import RequestStates
from executor.step_clock import StepClock
from kernels.prepare_inputs import Draws, PackedInputs, Requests

_ALIGNMENT = 16  # entries: every part starts where a kernel's vector loads may


class Staging:
    """A step's pinned memory, and the events around its work on the device."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.up = torch.zeros(_num_staged(max_requests), dtype=torch.int32, pin_memory=is_cuda)
        self.down = torch.zeros(2 * max_requests, dtype=torch.int32, pin_memory=is_cuda)
        self.up_array: NDArray[np.int32] = self.up.numpy()
        self._ups: dict[tuple[int, int], Tensor] = {}  # views: making one takes as long as a copy
        self._downs: dict[int, Tensor] = {}
        self.started: torch.cuda.Event | None = None
        self.finished: torch.cuda.Event | None = None
        if is_cuda:
            self.started, self.finished = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )

    def up_part(self, start: int, end: int) -> Tensor:
        """Those entries of what travels up."""
        part = self._ups.get((start, end))
        if part is None:
            part = self._ups[start, end] = self.up[start:end]
        return part

    def down_part(self, size: int) -> Tensor:
        """[2, size]: room for what ``size`` requests drew."""
        part = self._downs.get(size)
        if part is None:
            part = self._downs[size] = self.down[: 2 * size].view(2, size)
        return part


class StagingPool:
    """Stagings that no step uses. One thread launches steps, the same or one other waits."""

    def __init__(self, max_requests: int, device: torch.device) -> None:
        self._max_requests = max_requests
        self._device = device
        self._free: deque[Staging] = deque()
        self._clock = StepClock()

    def wait(self, staging: Staging, launched_s: float) -> float | None:
        """Wait for a step's end; returns how long the device took, None on a CPU."""
        if staging.started is None or staging.finished is None:
            return None
        self._clock.wait(staging.finished.query, launched_s)
        return staging.started.elapsed_time(staging.finished) / 1000

    def take(self) -> Staging:
        """A staging for one step."""
        try:
            return self._free.pop()
        except IndexError:
            return Staging(self._max_requests, self._device)

    def give_back(self, staging: Staging) -> None:
        """The step was answered: nothing reads or writes its staging any more."""
        self._free.append(staging)


@dataclass(frozen=True, slots=True)
class StepViews:
    """One size of recorded step: its part of the buffers."""

    staged: Tensor  # [n] int32: all that the host brings
    staged_at: int  # where that starts, on the device and in a staging
    staged_to: int  # where it ends
    requests: Requests  # in ``staged``; a decode step's queries start at fixed places
    inputs: PackedInputs
    draws: Draws
    result: Tensor  # [2, B] int32: the ids drawn, and whether each row is bad


class StepBuffers:
    """Owns what recorded steps read and write. They share it: one runs after the other."""

    def __init__(
        self, states: RequestStates, *, max_requests: int, max_tokens: int, max_seq_len: int
    ) -> None:
        device = states.device
        num_columns = _aligned(-(-max_seq_len // states.block_size))
        self._padding_row = states.padding_row
        self._max_requests = max_requests
        self._staged = torch.zeros(_num_staged(max_requests), dtype=torch.int32, device=device)
        self._one_each = torch.arange(max_requests + 1, dtype=torch.int32, device=device)
        self._no_tokens = torch.zeros_like(self._one_each)
        self._inputs = empty_inputs(max_tokens, max_requests, num_columns, device)
        for tensor in self._inputs:
            tensor.zero_()
        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self._draws = Draws(
            *(torch.zeros(max_requests, dtype=t, device=device) for t in (f32, f32, f32)),
            *(torch.zeros(max_requests, dtype=t, device=device) for t in (i32, i64, i64)),
        )
        self._result = torch.zeros(2 * max_requests, dtype=torch.int32, device=device)

    def decode_views(self, size: int) -> StepViews:
        """For ``size`` requests of one token each."""
        second = _aligned(size)
        requests = Requests(
            self._staged[:size],
            self._staged[second : second + size],
            self._one_each[: size + 1],
        )
        return self._views((0, second + size), requests, size, size)

    def mixed_views(self, num_requests: int, num_tokens: int) -> StepViews:
        """For up to so many requests, and so many tokens among them."""
        stride = _aligned(num_requests + 1)
        ends = (num_requests, stride + num_requests, 2 * stride + num_requests + 1)
        requests = Requests(
            *(self._staged[i * stride : end] for i, end in enumerate(ends)),
        )
        return self._views((0, ends[-1]), requests, num_requests, num_tokens)

    def draw_views(self, size: int) -> tuple[StepViews, Tensor]:
        """For ``size`` draws without a forward pass, and [size] where their hidden states are."""
        start, apart = _draws_at(self._max_requests), _aligned(size)
        parts = [self._staged[start + i * apart :][:size] for i in range(3)]
        requests = Requests(parts[0], parts[1], self._no_tokens[: size + 1])
        return self._views((start, start + 2 * apart + size), requests, size, 0), parts[2]

    def fill_decode(self, size: int, packed: PackedRows, out: NDArray[np.int32]) -> None:
        """Write what ``decode_views(size).staged`` shall hold; free places are padded."""
        num_rows, second = packed.rows.size, _aligned(size)
        out[:num_rows] = packed.rows
        out[num_rows:size] = self._padding_row
        out[second : second + num_rows] = packed.seq_lens
        out[second + num_rows : second + size] = 1

    def fill_mixed(self, num_requests: int, packed: PackedRows, out: NDArray[np.int32]) -> None:
        """Write what ``mixed_views(num_requests, ...).staged`` shall hold.

        Requests that nobody fills have no tokens and no length.
        """
        num_rows, stride = packed.rows.size, _aligned(num_requests + 1)
        rows, seq_lens, starts = (out[i * stride : (i + 1) * stride] for i in range(3))
        rows[:num_rows] = packed.rows
        rows[num_rows:] = self._padding_row
        seq_lens[:num_rows] = packed.seq_lens
        seq_lens[num_rows:] = 0
        starts[: num_rows + 1] = packed.query_start_loc
        starts[num_rows + 1 :] = packed.num_tokens

    def fill_draws(self, size: int, packed: PackedRows, out: NDArray[np.int32]) -> None:
        """Write what ``draw_views(size).staged`` shall hold; free places are padded."""
        start, apart = _draws_at(self._max_requests), _aligned(size)
        for i, (values, padding) in enumerate(
            zip(packed.samples(), (self._padding_row, 1, 0), strict=True)
        ):
            part = out[start + i * apart :][:size]
            part[: values.size] = values
            part[values.size :] = padding

    def nobody(self) -> PackedRows:
        """A step of one token that belongs to nobody, to record with."""
        one = np.ones(1, dtype=np.int64)
        return PackedRows(
            rows=one * self._padding_row,
            wishes=0,
            num_new_tokens=1,
            query_start_loc=np.arange(2),
            seq_lens=one,
            sampling=None,
            max_query_len=1,
            max_seq_len=1,
        )

    def _views(
        self, staged: tuple[int, int], requests: Requests, num_requests: int, num_tokens: int
    ) -> StepViews:
        inputs = self._inputs
        return StepViews(
            staged=self._staged[slice(*staged)],
            staged_at=staged[0],
            staged_to=staged[1],
            requests=requests,
            inputs=PackedInputs(
                inputs.token_ids[:num_tokens],
                inputs.positions[:num_tokens],
                inputs.slot_mapping[:num_tokens],
                inputs.block_table[:num_requests],
            ),
            draws=Draws(*(tensor[:num_requests] for tensor in self._draws)),
            result=self._result[: 2 * num_requests].view(2, num_requests),
        )


def _num_staged(max_requests: int) -> int:
    """Room for a mixed step, and behind it for its draws."""
    return _draws_at(max_requests) + 3 * _aligned(max_requests)


def _draws_at(max_requests: int) -> int:
    return 3 * _aligned(max_requests + 1)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
