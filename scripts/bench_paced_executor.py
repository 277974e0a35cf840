"""The scripted executor at the pace of a GPU: each step takes a fixed time, and no CPU.

For measurements of everything that is not the model, at the token rates that a model would have.
The engine core imports it by its path, ``scripts.bench_paced_executor:PacedExecutor``.
"""

import time

from ipc.config import EngineConfig
from ipc.messages import ModelRunnerOutput
from ipc.tensors import Frames
from tests.engine_core.scripted_executor import ScriptedExecutor


class PacedExecutor(ScriptedExecutor):
    """Answers each step ``step_ms`` after the one before it, as a worker on a busy GPU does.

    ``step_ms`` comes through ``load_config.model_loader_extra_config``.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._step_s = config.load_config.model_loader_extra_config["step_ms"] / 1e3
        self._done_s = 0.0  # when the latest answered step was done

    def receive(self, timeout_s: float | None) -> tuple[ModelRunnerOutput, Frames] | None:
        """The next answer, when its time has come: the core has nothing else to do meanwhile."""
        if not self._answers:
            return None
        now_s = time.monotonic()
        due_s = max(self._done_s + self._step_s, now_s - self._step_s)
        if due_s > now_s:
            time.sleep(due_s - now_s)
        self._done_s = due_s
        return super().receive(timeout_s)
