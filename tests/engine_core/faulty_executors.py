"""Executors that fail in one way each, for tests of what users are told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from executor.executor import OnProgress
from ipc.config import EngineConfig
from ipc.errors import ConfigError, DeviceStartError, EngineDeadError, EngineStartError
from ipc.messages import LoadProgress, ModelRunnerOutput, SchedulerOutput, WorkerReady
from ipc.processes import die_with
from ipc.tensors import Frames
from tests.engine_core.scripted_executor import ScriptedExecutor

POISON = 4242


class StartErrorExecutor(ScriptedExecutor):
    """A rank reports that it could not load."""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Fail as the ``mp`` executor does."""
        raise EngineStartError("rank 0, loading weights: ValueError: shape [3] is not [4]")


class BadConfigExecutor(ScriptedExecutor):
    """A value that only the worker could check."""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Refuse the config."""
        raise ConfigError("--max-model-len 4096 does not fit: 10 blocks of 16 tokens")


class NoDeviceExecutor(ScriptedExecutor):
    """The device does not work."""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Refuse the machine."""
        raise DeviceStartError("rank 0, device: CUDA error: out of order")


class RaisingExecutor(ScriptedExecutor):
    """An in-process worker that raises while it loads."""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Raise what nobody expected."""
        on_progress(LoadProgress(0, "allocating", 0, 1, 0.5))
        raise MemoryError("no room for 7 blocks")


class KilledAtStartExecutor(ScriptedExecutor):
    """The core is killed from outside while it loads."""

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """End without a word."""
        on_progress(LoadProgress(0, "loading weights", 1, 2, 0.5))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


class CrashingStepExecutor(ScriptedExecutor):
    """The first step raises in the core's process."""

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Raise what nobody expected."""
        raise RuntimeError("step exploded")


class PoisonedExecutor(ScriptedExecutor):
    """Dies in any step that begins with a prompt that holds ``POISON``."""

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """End the process as a fault in a kernel does."""
        if any(POISON in row.token_ids[: row.num_prompt_tokens] for row in plan.new_rows):
            os.abort()
        super().submit(plan, frames)


class SleepingStepExecutor(ScriptedExecutor):
    """A step that never ends, in the core's process; a core that replaces another one is well."""

    def submit(self, plan: SchedulerOutput, frames: Frames = ()) -> None:
        """Sleep as a deadlock does."""
        if sys.argv[sys.argv.index("--epoch") + 1] == "0":
            self.sleep_for_ever()
        super().submit(plan, frames)

    def sleep_for_ever(self) -> None:
        """The name that a printed stack must hold."""
        while True:
            time.sleep(1.0)


class DeadWorkerExecutor(ScriptedExecutor):
    """A worker is gone once the first step was submitted."""

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """Report the death as the ``mp`` executor does."""
        if self._num_steps == 0:
            return None
        raise EngineDeadError("worker 0 was killed by SIGKILL")


class ChildExecutor(ScriptedExecutor):
    """Has a worker process that does nothing, so that its end can be watched."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._children: Sequence[subprocess.Popen[bytes]] = []

    def start(self, on_progress: OnProgress) -> WorkerReady:
        """Start the child with a death pipe, as every child has one."""
        pipe, self._death_pipe = os.pipe()
        command = [sys.executable, "-c", _CHILD, str(pipe)]
        self._children = [subprocess.Popen(command, pass_fds=(pipe,))]
        os.close(pipe)
        return super().start(on_progress)

    def call(self, operation: Any) -> list[Any]:
        """Process ids of the children, in place of what the operation means."""
        return [child.pid for child in self._children]

    def shutdown(self) -> None:
        """End the child."""
        for child in self._children:
            child.kill()
            child.wait()


_CHILD = f"""
import signal, sys
sys.path[:0] = {sys.path!r}
from {die_with.__module__} import die_with
die_with(int(sys.argv[1]))
signal.pause()
"""
