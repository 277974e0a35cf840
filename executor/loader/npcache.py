"""A numpy copy of a .bin checkpoint, mapped into memory by later loads.

A directory with one .npy per tensor and ``manifest.json``: names, types, and the sizes of the files
that the copy was made from. bfloat16, which numpy lacks, is stored as its bits. The directory
appears by one rename, so ranks that load at once cannot see half of it.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ipc.errors import EngineStartError

_MANIFEST = "manifest.json"


def read_cache(
    cache: Path, file_sizes: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """The cached tensors and the sizes of their original files; None when there is no fit copy.

    Args:
        file_sizes: the original files as they are now; empty when they are gone, and then the
            copy is trusted.
    """
    path = cache / _MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if file_sizes and manifest["files"] != file_sizes:
            return None  # another checkpoint took the place of the one that was copied
        tensors = {
            name: _load(cache, file, dtype) for name, (file, dtype) in manifest["tensors"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as err:
        raise EngineStartError(f"{cache} is a broken numpy cache, delete it: {err!r}") from err
    return tensors, manifest["files"]


def write_cache(cache: Path, tensors: dict[str, Tensor], file_sizes: dict[str, int]) -> None:
    """Write ``tensors`` as numpy files beside each other, then put the directory in its place."""
    unfinished = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        entries = {}
        for number, (name, tensor) in enumerate(tensors.items()):
            file = f"{number:05d}.npy"
            bits = tensor.contiguous()
            if bits.dtype == torch.bfloat16:
                bits = bits.view(torch.uint16)
            np.save(unfinished / file, bits.numpy())
            entries[name] = (file, str(tensor.dtype).removeprefix("torch."))
        manifest = {"files": file_sizes, "tensors": entries}
        (unfinished / _MANIFEST).write_text(json.dumps(manifest))
        if cache.exists():
            shutil.rmtree(cache)
        unfinished.rename(cache)
    except OSError as err:
        if read_cache(cache, file_sizes) is None:  # else another rank was faster
            raise EngineStartError(f"cannot write the numpy cache {cache}: {err}") from err
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load(cache: Path, file: str, dtype: str) -> Tensor:
    if Path(file).name != file:
        raise ValueError(f"{file!r} is not a file of the cache")
    # Copy on write: torch wants writable memory.
    array = np.load(cache / file, mmap_mode="c", allow_pickle=False)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
