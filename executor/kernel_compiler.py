"""Compile noted kernels with all cores, into the disk cache where their launches look them up.

A Triton kernel needs two things compiled: itself, and the C function that hands its arguments to
the driver, which kernels of one signature share. Neither needs a GPU. The processes are forked
from one that has imported everything and has never touched a GPU.
"""

import ctypes
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Module:
    """A Python extension in C that Triton compiles for itself."""

    name: str
    source: str


def compile_all(
    variants: Sequence[Variant],
    target: Target,
    *,
    num_processes: int,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """Compile what is not in the cache; the names of all entries there, kernels' and modules'.

    Raises:
        Exception: whatever a compiler says of the first thing that does not compile.
    """
    modules = find_modules(variants)
    # The long ones first, so that no core waits for one at the end.
    ordered = sorted(variants, key=lambda v: len(v.function.src) * v.options.num_warps)
    work: list[Variant | Module] = [*reversed(ordered), *modules]
    with tempfile.TemporaryDirectory() as directory:
        _find_libcuda(Path(directory))
        hash_compilers(target.arch)
        entries = []
        on_progress(0, len(work))
        for entry in _in_processes(work, target, num_processes):
            entries.append(entry)
            on_progress(len(entries), len(work))
    return entries


def find_modules(variants: Sequence[Variant]) -> list[Module]:
    """The driver's own functions, and one launcher for each signature."""
    driver_source = Path(nvidia.dirname, "driver.c").read_text()
    sources = dict.fromkeys(
        nvidia.make_launcher(
            variant.constants, dict(enumerate(variant.signature.values())), tensordesc_meta=None
        )
        for variant in variants
    )
    launchers = [Module("__triton_launcher", source) for source in sources]
    return [Module("cuda_utils", driver_source), *launchers]


def _in_processes(
    work: Sequence[Variant | Module], target: Target, num_processes: int
) -> Iterator[str]:
    """The entries' names as they are done; a process's failure ends it all."""

    def begin() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _CURRENT[:] = [work, target]

    context = multiprocessing.get_context("fork")
    with context.Pool(min(num_processes, max(1, len(work))), begin) as pool:
        yield from pool.imap_unordered(_compile_one, range(len(work)))


# What this forked process works on: the sequence and the target. Set once, as it begins.
_CURRENT: list[Any] = []


def _compile_one(index: int) -> str:
    work, target = _CURRENT
    item = work[index]
    return _build_module(item) if isinstance(item, Module) else _compile_variant(item, target)


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
