"""Spoiled safetensors files: weights, or one sentence; no crash, no memory to speak of.

A sound file is changed in its header's length, its JSON, its numbers, its end; then it is opened
and every tensor of it is read, as a load does.
"""

import json
import random
import resource
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from executor.loader.checkpoint import open_checkpoint
from ipc.config import LoadConfig
from ipc.errors import EngineStartError
from tests.fuzz.values import any_value

MAX_GROWTH_KIB = 1 << 20  # 1 GiB
DTYPES = [
    "F32",
    "F64",
    "BF16",
    "F16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "X",
    "",
    7,
    None,
]
NUMBERS = [0, 1, 2, 7, -1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 1.5, "3", None, [1]]


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Count what came of each file; anything but tensors or ``EngineStartError`` raises."""
    rng = random.Random(seed)
    sound = save({"a.weight": torch.ones(4, 6), "b.weight": torch.arange(5)})
    counts = {"accepted": 0, "refused": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "model.safetensors"
        for i in range(num_inputs):
            data = spoil(rng, sound)
            file.write_bytes(data)
            try:
                counts["accepted" if is_readable(file) else "refused"] += 1
            except BaseException as err:
                raise AssertionError(f"input {i} of seed {seed}: {err!r} of {data!r}") from err
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < MAX_GROWTH_KIB, f"{growth} KiB more memory"
    return counts


def is_readable(file: Path) -> bool:
    """Open and read all of it."""
    try:
        checkpoint = open_checkpoint(file.parent, LoadConfig())
        for source in checkpoint.tensors.values():
            values = source.read(tuple(slice(0, size) for size in source.shape))
            assert tuple(values.shape) == source.shape
        checkpoint.fingerprint()
    except EngineStartError:
        return False
    return True


def spoil(rng: random.Random, sound: bytes) -> bytes:
    """A mutant of a file."""
    (size,) = struct.unpack("<Q", sound[:8])
    header, body = json.loads(sound[8 : 8 + size]), sound[8 + size :]
    choice = rng.random()
    if choice < 0.15:
        return (
            struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1]))
            + (sound[8:])
        )
    if choice < 0.3:
        changed = bytearray(sound)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if choice < 0.35:
        return sound[: rng.randrange(len(sound))]
    if choice < 0.4:
        return _with_header(b"[" * 50_000, body)
    for _ in range(rng.randrange(1, 4)):
        _change_entry(rng, header)
    body = body[: rng.randrange(len(body) + 1)] if rng.random() < 0.1 else body
    return _with_header(json.dumps(header).encode("utf-8", "surrogatepass"), body)


def _change_entry(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice(sorted(header))
    entry = header[name]
    if not isinstance(entry, dict) or rng.random() < 0.1:
        header[rng.choice(["a.weight", "__metadata__", "", "../x", "c"])] = any_value(rng)
        return
    match rng.randrange(4):
        case 0:
            entry["dtype"] = rng.choice(DTYPES)
        case 1:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
        case 2:
            entry["data_offsets"] = [
                rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 2, 3]))
            ]
        case 3:
            entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = any_value(rng)


def _with_header(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body
