"""Checkpoint directories that hold just enough for a configuration to be made from them."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.frontend.make_tokenizers import TINY

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(
    directory: Path, *, weights: str | None = "model.safetensors", **config: Any
) -> Path:
    """A directory with a config, a tokenizer, and an empty file in place of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in (BASE | config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(content))
    shutil.copy(TINY / "tokenizer.json", directory)
    if weights is not None:
        (directory / weights).touch()
    return directory
