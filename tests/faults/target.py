"""Which model the servers under test run: the bundled one, or a real shape with random weights.

A shape is run as one runs it on a GPU, in bfloat16, and batch-invariant: only so are the tokens of
a stream that was computed again the same.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.engines import ROOT, TINY


@dataclass(frozen=True)
class Target:
    """A model, and how a server is told of it."""

    flags: tuple[str, ...]
    tokenizer: Path  # the file


_BUNDLED = Target(
    ("--model", str(TINY), "--dtype", "float32", "--worker-threads", "1"),
    TINY / "tokenizer.json",
)
_chosen = [_BUNDLED]


def chosen() -> Target:
    """What servers are started with from now on."""
    return _chosen[-1]


@contextmanager
def running_shape(name: str) -> Iterator[None]:
    """Within the block servers run this one of ``scripts/bench_models``."""
    sys.path.append(str(ROOT / "scripts"))
    from bench_model import find_model, write_tokenizer

    model = find_model(name)
    with tempfile.TemporaryDirectory(prefix="fault-tokenizer-") as directory:
        write_tokenizer(Path(directory), model.vocab_size)
        flags = (
            "--model", str(model.path), "--load-format", model.load_format,
            "--tokenizer", directory, "--dtype", "bfloat16", "--deterministic",
            "--max-model-len", "4096", "--gpu-memory-utilization", "0.5",
        )  # fmt: skip
        _chosen.append(Target(flags, Path(directory) / "tokenizer.json"))
        try:
            yield
        finally:
            _chosen.pop()
