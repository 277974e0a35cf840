"""Compile an engine's kernels ahead of its start: ``python -m executor.compile_kernels``.

Reads an ``Order`` from standard input, writes one ``Progress`` a line to standard output, and ends
with the cache complete. A starting worker runs it beside itself; ``heliograph compile-kernels``
runs it where images are built. Several at once take turns, and find done what another did.
"""

import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from executor.kernel_cache import Target, cache_directory, is_compiled, list_path, write_list
from ipc.config import EngineConfig, decode_config
from ipc.errors import EngineError, ExitCode
from ipc.messages import Message
from ipc.processes import die_with


class Order(Message, frozen=True):
    """What to compile, and for what."""

    config: bytes  # the EngineConfig, msgpack
    arch: int
    num_multiprocessors: int
    death_pipe: int | None = None  # its other end is the parent's: when that closes, we end
    num_processes: int | None = None  # None: one for each core


class Progress(Message, frozen=True):
    """How far it has come."""

    done: int
    total: int


def main() -> int:
    """Compile; the exit code."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    if order.death_pipe is not None:
        die_with(order.death_pipe)
    try:
        compile_ahead(
            decode_config(order.config),
            Target(order.arch, order.num_multiprocessors),
            order.num_processes,
            on_progress=_tell,
        )
    except EngineError as err:
        sys.stderr.write(f"{err}\n")
        return ExitCode.CONFIG
    return ExitCode.CLEAN


def compile_ahead(
    config: EngineConfig,
    target: Target,
    num_processes: int | None,
    *,
    on_progress: Callable[[int, int], None],
) -> None:
    """Have every kernel of this engine in the cache, and the list of them.

    Raises:
        UnsupportedError: this model's kernels cannot be foreseen.
        ConfigError: the model cannot be built as configured.
    """
    directory = cache_directory(os.environ)
    directory.mkdir(parents=True, exist_ok=True)
    path = list_path(config, target, directory)
    with _turn(path):
        if is_compiled(path):
            on_progress(1, 1)
            return
        from executor.device import usable_cores
        from executor.kernel_compiler import compile_all
        from executor.kernel_rehearsal import find_variants

        entries = compile_all(
            find_variants(config, target),
            target,
            num_processes=num_processes or usable_cores(),
            on_progress=on_progress,
        )
        write_list(path, entries)


class _turn:
    """Held by one process at a time; the kernel takes it back when that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_suffix(".lock")

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _tell(done: int, total: int) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(Progress(done, total)) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
