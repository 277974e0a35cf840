"""The scripted executor at the pace of a GPU: each step takes a fixed time, and no CPU.

For measurements of everything that is not the model, at the token rates that a model would have.
The engine core imports it by its path, ``scripts.bench_paced_executor:PacedExecutor``.
"""

import contextlib
import os
import queue
import threading
import time
from typing import Any

from ipc.config import EngineConfig
from ipc.messages import ModelRunnerOutput, SchedulerOutput
from ipc.tensors import Frames
from tests.engine_core.scripted_executor import ScriptedExecutor


class PacedExecutor(ScriptedExecutor):
    """Answers each step ``step_ms`` after the one before it, as a worker on a busy GPU does.

    ``step_ms`` comes through ``load_config.model_loader_extra_config``. A thread stands for the
    GPU: it sleeps for each step, then makes a descriptor readable.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._step_s = config.load_config.model_loader_extra_config["step_ms"] / 1e3
        self._submitted: queue.SimpleQueue[float] = queue.SimpleQueue()  # times of submission
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
        self._submitted.put(time.monotonic())

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, if its step is done."""
        with contextlib.suppress(BlockingIOError):
            self._num_done += os.eventfd_read(self._done)
        if not self._num_done:
            return None
        self._num_done -= 1
        return super().receive(timeout_s)

    def _run(self) -> None:
        done_s = 0.0
        while True:
            done_s = max(self._submitted.get(), done_s) + self._step_s
            time.sleep(max(0.0, done_s - time.monotonic()))
            os.eventfd_write(self._done, 1)
