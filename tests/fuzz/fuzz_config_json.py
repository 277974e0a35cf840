"""Hostile settings files of a checkpoint: a model, or one sentence; nothing else, and at once.

One field at a time, or several, of every family's ``config.json`` becomes something that it should
not be; and of ``tokenizer_config.json``, ``special_tokens_map.json`` and their like.
"""

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from executor.model_config import ModelShape
from frontend import EngineArgs
from frontend.tokenizer import load_tokenizer
from ipc.errors import ConfigError
from tests.frontend.make_checkpoints import BASE, write_checkpoint
from tests.fuzz.values import any_value

MAX_SECONDS = 5.0
HOSTILE: list[Any] = [
    10**9, 10**12, 2**64, 1e308, "10", "1e3", [[]], [{}], {"a": {}}, ["full_attention"], [None] * 3,
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"}, {"type": [1]},
    {"rope_type": "yarn", "factor": -1, "original_max_position_embeddings": 0},
    {"rope_type": "longrope", "short_factor": ["a"], "long_factor": 3}, {"quant_method": {}},
]  # fmt: skip
FIELDS = [
    "architectures", "model_type", "hidden_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings",
    "torch_dtype", "dtype", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "sliding_window_pattern", "rope_local_base_freq",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "text_config",
    "eos_token_id", "bos_token_id", "tie_word_embeddings", "attention_bias", "quantization_config",
    "original_max_position_embeddings", "model_max_length", "n_head", "n_embd", "n_layer",
    "is_encoder_decoder", "auto_map", "transformers_version", "seq_length", "vision_config",
]  # fmt: skip
TOKENIZER_FILES = {
    "tokenizer_config.json": [
        "model_max_length", "added_tokens_decoder", "bos_token", "eos_token", "chat_template",
        "extra_special_tokens", "additional_special_tokens", "clean_up_tokenization_spaces",
    ],
    "special_tokens_map.json": ["eos_token", "pad_token", "additional_special_tokens"],
    "added_tokens.json": ["<a>", "<b>"],
    "generation_config.json": ["eos_token_id", "temperature"],
}  # fmt: skip
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "opt", "gpt2"]


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Count what came of each config; anything but a config or a ``ConfigError`` raises."""
    rng = random.Random(seed)
    counts = {"accepted": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as name:
        directory = write_checkpoint(Path(name))
        for i in range(num_inputs):
            texts = make_files(rng)
            started = time.perf_counter()
            try:
                counts["accepted" if is_usable(directory, texts) else "refused"] += 1
            except Exception as err:
                raise AssertionError(f"input {i} of seed {seed}: {err!r} of {texts}") from err
            seconds = time.perf_counter() - started
            assert seconds < MAX_SECONDS, f"{seconds:.1f} s for input {i} of seed {seed}: {texts}"
    return counts


def make_files(rng: random.Random) -> dict[str, str]:
    """Settings files by name, one of which is hostile."""
    spoiled = "config.json" if rng.random() < 0.7 else rng.choice(sorted(TOKENIZER_FILES))
    files: dict[str, dict[str, Any]] = {name: {} for name in TOKENIZER_FILES}
    files["config.json"] = BASE | {"model_type": rng.choice(FAMILIES)}
    fields = TOKENIZER_FILES.get(spoiled, FIELDS)
    for field in rng.sample(fields, min(len(fields), rng.choice((1, 1, 1, 2, 3)))):
        value = rng.choice(HOSTILE) if rng.random() < 0.4 else any_value(rng)
        files[spoiled][field] = value
    return {name: json.dumps(content) for name, content in files.items()}


def is_usable(directory: Path, texts: dict[str, str]) -> bool:
    """Whether the frontend and the worker make a model's shape, and a tokenizer, of the files."""
    for name, text in texts.items():
        (directory / name).write_text(text)
    try:
        config = EngineArgs(model=str(directory), device="cpu").create_engine_config().model_config
        ModelShape.from_hf(config.hf_config, max_model_len=config.max_model_len)
        _ = config.eos_token_ids
        load_tokenizer(config)
    except ConfigError:
        return False
    return True
