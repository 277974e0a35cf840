"""Compile an engine's kernels ahead of its start: ``python -m executor.compile_kernels``.

A starting worker runs it beside itself; ``heliograph compile-kernels`` runs it where images are
built, which needs no GPU. Several at once take turns, and find done what another did.
"""

import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from executor.cuda_driver import DriverError, find_target
from executor.kernel_cache import Target, cache_directory, is_compiled, list_path, write_list
from ipc.compiling import Order, Progress
from ipc.config import EngineConfig, decode_config
from ipc.errors import ConfigError, EngineError, ExitCode
from ipc.processes import die_with


def main() -> int:
    """Compile what the order on standard input says; the exit code."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    die_with(order.death_pipe)
    try:
        target = _find_target() if order.target is None else Target.parse(order.target)
        compile_ahead(decode_config(order.config), target, order.num_processes, on_progress=_tell)
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
    with _turn(path.with_suffix(".lock")):
        if is_compiled(path):
            on_progress(1, 1)
            return
        write_list(path, _compile(config, target, num_processes, on_progress))


def _compile(
    config: EngineConfig,
    target: Target,
    num_processes: int | None,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """The entries' names. Imports torch, which a process that finds everything done need not."""
    from executor.kernel_compiler import CompilerPool, hash_compilers

    hashing = threading.Thread(target=hash_compilers, args=(target.arch,))
    hashing.start()
    from executor.device import usable_cores
    from executor.kernel_rehearsal import find_variants

    hashing.join()
    with CompilerPool(target, num_processes or usable_cores()) as pool:
        find_variants(config, target, pool.add)
        return pool.finish(on_progress)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Held by one process at a time; when that ends, however it does, it is the next one's."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_target() -> Target:
    try:
        return find_target(0)
    except (OSError, DriverError) as err:
        raise ConfigError(
            f"there is no GPU here to compile for, name one by --target: {err}"
        ) from err


def _tell(done: int, total: int) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(Progress(done, total)) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
