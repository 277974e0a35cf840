"""A starting engine's view of its kernels: compiled already, or being compiled by a process beside.

Imports no torch, so a worker process asks before it imports anything slow.
"""

import logging
import os
import subprocess
from collections.abc import Callable

import msgspec

from executor.compile_kernels import Order, Progress
from executor.kernel_cache import Target, cache_directory, is_compiled, list_path
from ipc.config import EngineConfig, encode_config
from ipc.processes import child_environment, describe_exit, python_command

logger = logging.getLogger(__name__)


class KernelBuild:
    """Owns the compiling process, which ends with this one."""

    def __init__(self, config: EngineConfig, target: Target) -> None:
        read_end, write_end = os.pipe()
        self._death_pipe = os.fdopen(write_end, "wb", buffering=0)  # closed with this object
        self._process = subprocess.Popen(
            python_command("executor.compile_kernels"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            pass_fds=(read_end,),
        )
        os.close(read_end)
        order = Order(encode_config(config), target.arch, target.num_multiprocessors, read_end)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, which ``wait`` tells

    def wait(self, on_progress: Callable[[int, int], None]) -> bool:
        """Wait for its end; False when it failed, and what lacks will be compiled on the way."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                progress = msgspec.json.decode(line, type=Progress)
                on_progress(progress.done, progress.total)
        return_code = self._process.wait()
        self._death_pipe.close()
        if return_code != 0:
            logger.warning(
                "the process that compiles kernels %s: each is compiled when it is first launched",
                describe_exit(return_code),
            )
        return return_code == 0


def begin_build(config: EngineConfig, target: Target) -> KernelBuild | None:
    """Start compiling what this engine's start will launch; None when all of it is there."""
    if is_compiled(list_path(config, target, cache_directory(os.environ))):
        return None
    return KernelBuild(config, target)
