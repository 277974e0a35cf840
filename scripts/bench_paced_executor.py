"""The scripted executor at the pace of a GPU: each step takes its time, and no CPU.

For measurements of everything that is not the model, at the token rates that a model would have.
The engine core imports it by its path, ``scripts.bench_paced_executor:PacedExecutor``.
"""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from typing import Any

import msgspec

from ipc.config import EngineConfig
from ipc.messages import ModelRunnerOutput, SchedulerOutput
from ipc.tensors import Frames
from tests.engine_core.scripted_executor import ScriptedExecutor


class PacedExecutor(ScriptedExecutor):
    """Answers each step some time after the one before it, as a worker on a busy GPU does.

    That is ``step_ms``, or ``token_ms`` for each token where it is more, and ``row_ms`` for each
    row that decodes; given in ``load_config.model_loader_extra_config``. A thread stands for the
    GPU: it sleeps for each step, then makes a descriptor readable.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        pace = config.load_config.model_loader_extra_config
        self._step_s = pace["step_ms"] / 1e3
        self._token_s = pace.get("token_ms", 0.0) / 1e3
        self._row_s = pace.get("row_ms", 0.0) / 1e3
        self._submitted: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()
        self._lasting_s: deque[float] = deque()  # of the steps that were not taken
        self._done = os.eventfd(0, os.EFD_NONBLOCK)  # counts steps that are done and not taken
        self._num_done = 0
        threading.Thread(target=self._run, name="paced-steps", daemon=True).start()

    @property
    def channels(self) -> list[Any]:
        """Readable when a step is done."""
        return [self._done]

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Begin a step, as soon as those before it are done."""
        super().submit(plan, frames)
        counts = plan.num_new_tokens or [1] * len(plan.rows)
        lasts_s = max(self._step_s, sum(counts) * self._token_s) + counts.count(1) * self._row_s
        self._lasting_s.append(lasts_s)
        self._submitted.put((time.monotonic(), lasts_s))

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, if its step is done."""
        with contextlib.suppress(BlockingIOError):
            self._num_done += os.eventfd_read(self._done)
        if not self._num_done or (answer := super().receive(timeout_s)) is None:
            return None
        self._num_done -= 1
        output, frames = answer
        return msgspec.structs.replace(output, device_time_s=self._lasting_s.popleft()), frames

    def _run(self) -> None:
        done_s = 0.0
        while True:
            submitted_s, lasts_s = self._submitted.get()
            done_s = max(submitted_s, done_s) + lasts_s
            time.sleep(max(0.0, done_s - time.monotonic()))
            os.eventfd_write(self._done, 1)
