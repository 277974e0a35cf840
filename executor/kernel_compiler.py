"""Compile noted kernels with all cores, into the disk cache where their launches look them up.

A Triton kernel needs two things compiled: itself, and the C function that hands its arguments to
the driver, which kernels of one signature share. Neither needs a GPU. The processes are forked
from one that has imported everything and has never touched a GPU.
"""

import ctypes
import hashlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.compiler.compiler import make_backend
from triton.runtime.build import _build, platform_key
from triton.runtime.cache import get_cache_manager, triton_key

from executor.kernel_cache import Target

_PR_SET_PDEATHSIG = 1
_LIBCUDA = "libcuda.so.1"
# Enough for the linker to note that the driver's library is wanted.
_STUB = "int cuGetErrorString(void) { return 0; }\n"


@dataclass(frozen=True)
class Variant:
    """One kernel, specialised: what Triton would compile."""

    function: Any  # the JITFunction
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any  # the backend's

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes that have the function by its name."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return _find_variant, (self.function.__module__, self.function.__name__, *parts)


def _find_variant(module: str, name: str, *parts: Any) -> Variant:
    return Variant(getattr(sys.modules[module], name), *parts)


@dataclass(frozen=True)
class Module:
    """A Python extension in C that Triton compiles for itself."""

    name: str
    source: str


class CompilerPool:
    """Owns the processes that compile. They begin with a kernel as soon as it is added.

    Make it when all modules with kernels are imported, and before anything touches a GPU.
    """

    def __init__(self, target: Target, num_processes: int) -> None:
        self._directory = tempfile.TemporaryDirectory()
        _find_libcuda(Path(self._directory.name))
        hash_compilers(target.arch)
        self._target = target
        self._done: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._num_added = 0
        self._launchers: set[str] = set()
        context = multiprocessing.get_context("fork")
        self._pool = context.Pool(num_processes, _die_with_parent)

    def __enter__(self) -> Self:
        self._submit(
            _build_module, Module("cuda_utils", Path(nvidia.dirname, "driver.c").read_text())
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()
        self._directory.cleanup()

    def add(self, variant: Variant) -> None:
        """Compile a kernel, and its launcher when no other kernel has the same."""
        self._submit(_compile_variant, variant, self._target)
        signature = dict(enumerate(variant.signature.values()))
        source = nvidia.make_launcher(variant.constants, signature, tensordesc_meta=None)
        if source not in self._launchers:
            self._launchers.add(source)
            self._submit(_build_module, Module("__triton_launcher", source))

    def finish(self, on_progress: Callable[[int, int], None]) -> list[str]:
        """Wait until all is compiled; the names of the cache's entries.

        Raises:
            Exception: whatever a compiler says of the first thing that does not compile.
        """
        entries: list[str] = []
        while len(entries) < self._num_added:
            on_progress(len(entries), self._num_added)
            done = self._done.get()
            if isinstance(done, BaseException):
                raise done
            entries.append(done)
        on_progress(len(entries), self._num_added)
        return entries

    def _submit(self, work: Callable[..., str], *args: Any) -> None:
        self._num_added += 1
        self._pool.apply_async(work, args, callback=self._done.put, error_callback=self._done.put)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compile_variant(variant: Variant, target: Target) -> str:
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    kernel = compile_kernel(
        source, target=GPUTarget("cuda", target.arch, 32), options=variant.options.__dict__
    )
    return _entry_name(kernel.hash)


def _build_module(module: Module) -> str:
    """As Triton does it, except that the module is not loaded: that would need the driver."""
    key = hashlib.sha256((module.source + platform_key()).encode()).hexdigest()
    cache = get_cache_manager(key)
    file_name = module.name + str(sysconfig.get_config_var("EXT_SUFFIX"))
    if cache.get_file(file_name) is None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, module.name + ".c")
            path.write_text(module.source)
            built = _build(
                module.name,
                str(path),
                directory,
                nvidia.library_dirs(),
                nvidia.include_dirs,
                nvidia.libraries,
                [],
            )
            cache.put(Path(built).read_bytes(), file_name, binary=True)
    return _entry_name(key)


def _entry_name(key: str) -> str:
    return Path(str(get_cache_manager(key).cache_dir)).name


def _find_libcuda(directory: Path) -> None:
    """Where there is no driver, link against the name of its library."""
    try:
        nvidia.library_dirs()
        return
    except AssertionError:
        pass
    source = directory / "stub.c"
    source.write_text(_STUB)
    compiler = os.environ.get("CC", "cc")
    library = str(directory / _LIBCUDA)
    soname = f"-Wl,-soname,{_LIBCUDA}"
    subprocess.check_call([compiler, str(source), "-shared", "-fPIC", soname, "-o", library])
    knobs.nvidia.libcuda_path = str(directory)
    nvidia.libcuda_dirs.cache_clear()
    nvidia.library_dirs.cache_clear()


def hash_compilers(arch: int) -> None:
    """Have what every entry's name is made of; Triton reads half a gigabyte for it, once."""
    triton_key()
    make_backend(GPUTarget("cuda", arch, 32)).hash()


def hash_compilers_aside(capability: tuple[int, int]) -> None:
    """The same in a thread, for a GPU of this compute capability."""
    arch = 10 * capability[0] + capability[1]
    threading.Thread(target=hash_compilers, args=(arch,), daemon=True, name="compilers").start()
