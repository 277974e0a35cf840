"""A process that compiles kernels ahead: ``python -m executor.compile_kernels``, as others see it.

It reads an ``Order`` from its standard input and writes a ``Progress`` a line to its standard
output. What goes wrong it says on standard error, and its exit code tells.
"""

import os
import subprocess
from collections.abc import Callable

import msgspec

from ipc.config import EngineConfig, encode_config
from ipc.processes import child_environment, python_command
from ipc.records import Message

_MODULE = "executor.compile_kernels"


class Order(Message, frozen=True):
    """What to compile, and for what."""

    config: bytes  # the EngineConfig, msgpack
    target: str | None  # "sm_90" or, with the number of multiprocessors, "sm_90:132"; None: the GPU
    death_pipe: int  # its other end is the parent's: when that closes, the process ends
    num_processes: int | None = None  # None: one for each core


class Progress(Message, frozen=True):
    """How far it has come."""

    done: int
    total: int


class CompilingProcess:
    """Owns the process, which ends with this one."""

    def __init__(
        self, config: EngineConfig, target: str | None, num_processes: int | None = None
    ) -> None:
        read_end, write_end = os.pipe()
        self._death_pipe = os.fdopen(write_end, "wb", buffering=0)  # closed with this object
        self._process = subprocess.Popen(
            python_command(_MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            pass_fds=(read_end,),
        )
        os.close(read_end)
        order = Order(encode_config(config), target, read_end, num_processes)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, which ``wait`` tells

    def wait(self, on_progress: Callable[[int, int], None]) -> int:
        """Follow it to its end; returns its exit code."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                progress = msgspec.json.decode(line, type=Progress)
                on_progress(progress.done, progress.total)
        return_code = self._process.wait()
        self._death_pipe.close()
        return return_code
