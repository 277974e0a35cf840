"""A starting engine's view of its kernels: compiled already, or being compiled by a process beside.

Imports no torch, so a worker process asks before it imports anything slow.
"""

import logging
import os
from collections.abc import Callable

from executor.kernel_cache import Target, cache_directory, is_compiled, list_path
from ipc.compiling import CompilingProcess
from ipc.config import EngineConfig
from ipc.processes import describe_exit

logger = logging.getLogger(__name__)


class KernelBuild:
    """Owns the process that compiles what this start will launch."""

    def __init__(self, process: CompilingProcess) -> None:
        self._process = process

    def wait(self, on_progress: Callable[[int, int], None]) -> None:
        """Wait for its end. What it did not compile is compiled when it is first launched."""
        return_code = self._process.wait(on_progress)
        if return_code != 0:
            logger.warning(
                "the process that compiles kernels ahead %s: each is compiled when it is launched",
                describe_exit(return_code),
            )


def begin_build(config: EngineConfig, target: Target) -> KernelBuild | None:
    """Start compiling what this engine's start will launch; None when all of it is there."""
    if is_compiled(list_path(config, target, cache_directory(os.environ))):
        return None
    return KernelBuild(CompilingProcess(config, str(target)))
