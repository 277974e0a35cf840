"""The functions of ``cpu_kernels.c``: compiled once per machine, kept on disk, called by ctypes.

A decode step of a small model on a CPU is hundreds of short calls, and torch has no call that does
what several of them do, so these are written in C. They need a C compiler, as Triton does on a GPU.
Where there is none, ``load`` returns None and the operations take their path of torch's calls,
which computes the same more slowly.

The compiled library links to no OpenMP runtime of its own: it finds the one that torch has loaded,
so both share their threads. Its name on disk holds a digest of the source, the compiler and the
processor, so a library is never used that was made from another source or for another machine.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    # So a clamp is a minimum, and a sum is made in lanes; see the source on NaN.
    *("-ffinite-math-only", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
_COMPILERS = ("gcc", "cc")
_LONGEST_BUILD_S = 60.0
PROFILED_AS = "heliograph::"
MAX_HEAD_DIM, MAX_GROUP = 256, 16  # those of the source

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, Sequence[type]] = {
    "add_rms_norm": (_P, _P, _P, _P, _P, _P, _L, _L, _F, _I),
    "qkv_rope_store": (
        *(_P, _L, _P, _P, _P, _P, _P, _P, _L, _P, _P, _F),
        *(_L, _L, _L, _L, _L, _I),
    ),
    "silu_and_mul": (_P, _P, _L, _L, _I),
    "decode_attention": (
        *(_P, _L, _P, _P, _P, _L, _P, _P, _P),
        *(_L, _L, _L, _L, _L, _L, _F, _F, _I),
    ),
}

logger = logging.getLogger(__name__)


def library_for(*tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library when it has a function for these bfloat16 tensors, else None."""
    if any(t is not None and t.dtype is not torch.bfloat16 for t in tensors):
        return None
    return load()


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built where this machine has not built it yet; None where that cannot be."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        logger.info("no C compiler (gcc): the CPU computes by torch's calls alone, which is slower")
        return None
    try:
        return _open(_build(compiler))
    except (OSError, RuntimeError, subprocess.SubprocessError) as err:
        output = getattr(err, "stderr", None) or err
        logger.warning("cannot compile %s, the CPU will be slower: %s", _SOURCE.name, output)
        return None


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values are; None, which C sees as a null pointer, for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def cache_directory() -> Path:
    """Where compiled libraries are kept, ours alone: what is loaded from there runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root, "heliograph")
    directory.mkdir(parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{directory} can be written by others")
    return directory


def _build(compiler: str) -> Path:
    """The compiled library's path; it appears there at once, never half of it."""
    directory = cache_directory()
    path = directory / f"cpu_kernels-{_digest(compiler)}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        # Linked without -fopenmp: the runtime is torch's.
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-lm", "-o", str(linked)],
        ):
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_LONGEST_BUILD_S
            )
        linked.replace(path)
    return path


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes())
    found = os.stat(compiler)
    digest.update(repr((compiler, found.st_size, found.st_mtime_ns, _FLAGS)).encode())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features")
    digest.update("\n".join(sorted({x for x in lines if x.startswith(wanted)})).encode())
    return digest.hexdigest()[:24]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _I  # only where the source says so
        setattr(library, name, _shown_to_profilers(name, function))
    return library


def _shown_to_profilers(name: str, function: Callable[..., int]) -> Callable[..., int]:
    """The same function; torch's profiler, which sees torch's own calls alone, sees it too."""

    def call(*arguments: Any) -> int:
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            with torch.profiler.record_function(PROFILED_AS + name):
                return function(*arguments)
        return function(*arguments)

    return call
