"""The models that are measured: real shapes with random weights, and the bundled small one.

A model of random weights has no tokenizer; one of its vocabulary's size is made when text is
wanted, so that a server really turns every id into text.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SCRIPTS = Path(__file__).resolve().parent
SHAPES = SCRIPTS / "bench_models"
DEMO = SCRIPTS / "demo_models" / "tiny"
MAX_MODEL_LEN = 40_960
SMALL_IDS = (300, 8000)  # of a vocabulary that does not reach the usual range
IDS = (1000, 100_000)


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model directory and what a benchmark must know of it."""

    name: str
    path: Path
    load_format: str
    max_model_len: int
    vocab_size: int
    id_range: tuple[int, int]  # prompts are drawn from [low, high)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory brings its tokenizer."""
        return (self.path / "tokenizer.json").exists()


def find_model(name: str) -> BenchModel:
    """A model by its name here ("llama-8b", "tiny"), or by its directory.

    Raises:
        ValueError: there is no such model; says which there are.
    """
    known = {path.name: path for path in sorted(SHAPES.iterdir())} | {"tiny": DEMO}
    path = known.get(name, Path(name))
    if not (path / "config.json").is_file():
        raise ValueError(f"{name!r} is neither a directory with a config.json nor {list(known)}")
    config = json.loads((path / "config.json").read_text())
    has_weights = any(path.glob("*.safetensors"))
    return BenchModel(
        name=path.name,
        path=path,
        load_format="auto" if has_weights else "dummy",
        max_model_len=min(MAX_MODEL_LEN, config["max_position_embeddings"]),
        vocab_size=config["vocab_size"],
        id_range=IDS if config["vocab_size"] >= IDS[1] else SMALL_IDS,
    )


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of ``vocab_size`` made-up words, half of them after a space.

    It decodes as a real one does. It can encode bytes only, since it has no merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = itertools.islice(_words(set(alphabet)), vocab_size - len(alphabet))
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


def _words(taken: set[str]) -> Iterator[str]:
    """Endless distinct made-up words of two to nine letters, every other one after a space."""
    rng = np.random.default_rng(3)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    while True:
        lengths = rng.integers(2, 10, size=4096)
        ends = np.cumsum(lengths)
        flat = letters[rng.integers(0, 26, size=int(ends[-1]))]
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            word = ("Ġ" if i % 2 else "") + "".join(flat[end - length : end])
            if word not in taken:
                taken.add(word)
                yield word
