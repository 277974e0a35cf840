"""Whether the kernels of an engine are compiled already, told without importing torch or Triton.

Triton keeps compiled kernels in a directory, each in an entry named by a hash of all that it was
made from. A list beside them names the entries that one kind of engine needs; the list's own name
is a hash of what decides them: the relevant part of the config, the kind of GPU, the source code
and the versions of what compiles it. So a list that is there, with its entries, says that a start
will find everything compiled. Entries are found by absolute path: the directory cannot be moved.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

from ipc.config import EngineConfig
from ipc.errors import ConfigError

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("executor", "kernels")


# Multiprocessors of a whole GPU of each generation, in the form that servers have.
_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU, as far as compiled kernels depend on it."""

    arch: int  # compute capability, 90 for 9.0
    num_multiprocessors: int

    def __str__(self) -> str:
        return f"sm_{self.arch}:{self.num_multiprocessors}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "sm_90:132", or "sm_90" for the usual number of multiprocessors.

        Raises:
            ConfigError: it is no such name, or the usual number is not known.
        """
        found = re.fullmatch(r"sm_(\d+)(?::(\d+))?", text)
        if found is None:
            raise ConfigError(f"--target must be like sm_90 or sm_90:132, got {text!r}")
        arch, number = int(found[1]), found[2]
        if number is None and arch not in _MULTIPROCESSORS:
            known = ", ".join(f"sm_{known}" for known in _MULTIPROCESSORS)
            raise ConfigError(
                f"--target {text}: say how many multiprocessors it has, as in sm_90:132; "
                f"the number is known of {known}"
            )
        return cls(arch, _MULTIPROCESSORS[arch] if number is None else int(number))


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Where Triton keeps what it compiled; it follows these variables."""
    if directory := environment.get("TRITON_CACHE_DIR"):
        return Path(directory)
    return Path(environment.get("TRITON_HOME") or Path.home(), ".triton", "cache")


def list_path(config: EngineConfig, target: Target, directory: Path) -> Path:
    """Where the list of this engine's entries is, once it is complete."""
    return directory / f"heliograph-{_digest(config, target)}.json"


def is_compiled(path: Path) -> bool:
    """Whether the list is there, and all that it names."""
    try:
        entries = set(json.loads(path.read_text())["entries"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    present = {entry.name for entry in os.scandir(path.parent)}
    return entries <= present


def write_list(path: Path, entries: Iterable[str]) -> None:
    """Say that everything is compiled. The list appears at once, never half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({"entries": sorted(set(entries))}))
    unfinished.replace(path)


def _digest(config: EngineConfig, target: Target) -> str:
    model, scheduler = config.model_config, config.scheduler_config
    decisive = {
        "python": sys.version,
        "triton": metadata.version("triton"),
        "target": asdict(target),
        "hf_config": model.hf_config,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "deterministic": model.deterministic,
        "disable_sliding_window": model.disable_sliding_window,
        "max_model_len": model.max_model_len,
        "max_captured": None if model.enforce_eager else model.max_seq_len_to_capture,
        "block_size": config.cache_config.block_size,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "num_lookahead_slots": scheduler.num_lookahead_slots,
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode())
    for path in _source_files():
        digest.update(path.relative_to(_ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _source_files() -> Iterator[Path]:
    for package in _SOURCES:
        yield from sorted((_ROOT / package).rglob("*.py"))
