"""Checkpoint files of each load format: found, checked for completeness, opened tensor by tensor.

- safetensors: one file, several with ``model.safetensors.index.json``, or several without.
- pt: ``*.bin`` and ``*.pt``, read with torch's restricted unpickler only.
- npcache: as pt, but the first load leaves numpy files behind that later loads map instead.

What is missing, broken or doubled is an error that names the file and the tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors
import torch
from torch import Tensor

from executor.loader.npcache import read_cache, write_cache
from executor.loader.sources import MemorySource, SafetensorsSource, TensorSource
from ipc.config import LoadConfig
from ipc.errors import ConfigError, EngineStartError

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_PICKLE_INDEX = "pytorch_model.bin.index.json"
# Beside the weights in many repositories, and never weights of this model.
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "consolidated")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: its tensors, and the files that they came from."""

    tensors: Mapping[str, TensorSource]
    file_sizes: Mapping[str, int]  # by file name, of what the user provided

    def fingerprint(self) -> list[str]:
        """What the digest is made of: tensors' names, shapes and types, and the files' sizes."""
        tensors = (f"{name} {t.shape} {t.dtype}" for name, t in self.tensors.items())
        return sorted(tensors) + sorted(f"{n} {size}" for n, size in self.file_sizes.items())


def open_checkpoint(directory: Path, load_config: LoadConfig) -> Checkpoint:
    """Open the checkpoint in ``directory`` in the form that --load-format asks for.

    Raises:
        ConfigError: there are no files of that form.
        EngineStartError: a file is missing, broken, or does not match its index.
    """
    form = load_config.load_format
    if form in ("auto", "safetensors"):
        paths = _find(directory, _SAFETENSORS_INDEX, ("*.safetensors",))
        if paths:
            return _open_safetensors(directory, paths)
    if form == "safetensors":
        raise ConfigError(f"--load-format safetensors: there is no *.safetensors in {directory}")
    cache = Path(load_config.download_dir or directory) / "np-cache" / directory.name
    paths = _find(directory, _PICKLE_INDEX, ("*.bin", "*.pt"))
    sizes = _sizes(paths)
    if form == "npcache":
        cached = read_cache(cache, sizes)
        if cached is not None:
            tensors, sizes = cached
            return Checkpoint({n: MemorySource(t) for n, t in tensors.items()}, sizes)
    if not paths:
        wanted = "*.safetensors, *.bin or *.pt" if form == "auto" else "*.bin or *.pt"
        raise ConfigError(f"--load-format {form}: there is no {wanted} in {directory}")
    tensors = _read_pickles(paths)
    if form == "npcache":
        write_cache(cache, tensors, sizes)
    return Checkpoint({name: MemorySource(t) for name, t in tensors.items()}, sizes)


def _find(directory: Path, index: str, patterns: tuple[str, ...]) -> list[Path]:
    """The checkpoint's files: those of the index when there is one, else all that fit."""
    if (directory / index).is_file():
        names = sorted(set(_weight_map(directory / index).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise EngineStartError(
                f"{directory / index} lists {', '.join(missing)}, which "
                f"{'is' if len(missing) == 1 else 'are'} not there"
            )
        return [directory / name for name in names]
    found = sorted(path for pattern in patterns for path in directory.glob(pattern))
    return [path for path in found if not path.name.startswith(_NOT_WEIGHTS)]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as err:
        raise EngineStartError(f"{index} is not a weight index: {err!r}") from err
    if not isinstance(weight_map, dict) or not weight_map:
        raise EngineStartError(f"{index} maps no weights to files")
    files = {str(name): str(file) for name, file in weight_map.items()}
    for file in set(files.values()):
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise EngineStartError(f"{index} lists {file!r:.200}, which is not a file beside it")
    return files


def _sizes(paths: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in paths}


def _open_safetensors(directory: Path, paths: list[Path]) -> Checkpoint:
    tensors: dict[str, TensorSource] = {}
    for path in paths:
        for name, lazy in _safetensors_slices(path).items():
            if name in tensors:
                raise EngineStartError(f"{name} is in {path} and in a file before it")
            tensors[name] = SafetensorsSource(path, name, lazy)
    index = directory / _SAFETENSORS_INDEX
    if index.is_file():
        absent = [f"{n} ({f})" for n, f in _weight_map(index).items() if n not in tensors]
        if absent:
            raise EngineStartError(
                f"{index} lists tensors that their files do not hold: {_some(absent)}"
            )
    return Checkpoint(tensors, _sizes(paths))


def _safetensors_slices(path: Path) -> dict[str, Any]:
    try:
        opened: Any = safetensors.safe_open(str(path), framework="pt")
        return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as err:
        raise EngineStartError(f"{path} is not a readable safetensors file: {err}") from err


def _read_pickles(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, value in _read_pickle(path).items():
            if name in tensors:
                raise EngineStartError(f"{name} is in {path} and in a file before it")
            tensors[name] = value
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """One file's tensors. ``weights_only`` refuses everything that could run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, UnpicklingError) as err:
        raise EngineStartError(f"{path} is not a readable weights file: {err}") from err
    if not isinstance(state, dict):
        raise EngineStartError(f"{path} holds a {type(state).__name__}, not named tensors")
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # A sparse tensor's indices are nobody's to trust, and none belongs among weights.
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise EngineStartError(f"{path}: {name} is no plain tensor ({tensor.layout})")
    return tensors


def _is_zip(path: Path) -> bool:
    """Only torch's newer, zipped form can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
