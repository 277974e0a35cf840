"""Reading config.json: spellings, nested configs, windows, and what families leave out."""

from typing import Any

import pytest

from executor.model_config import ModelShape
from ipc.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def shape_of(**changes: Any) -> ModelShape:
    return ModelShape.from_hf(LLAMA | changes)


def test_missing_keys_follow_from_others() -> None:
    shape = shape_of()
    assert (shape.head_dim, shape.num_kv_heads, shape.intermediate_size) == (16, 4, 256)
    assert (shape.max_position_embeddings, shape.max_model_len) == (2048, 2048)
    assert not shape.tie_word_embeddings
    assert shape.attention_scale == 0.25


def test_gpt2_spells_everything_differently() -> None:
    config = {"model_type": "gpt2", "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 40}
    shape = ModelShape.from_hf(config | {"vocab_size": 5, "layer_norm_epsilon": 1e-4})
    assert (shape.hidden_size, shape.num_layers, shape.num_heads) == (12, 2, 3)
    assert (shape.max_position_embeddings, shape.intermediate_size) == (40, 48)
    assert (shape.norm_eps, shape.activation, shape.tie_word_embeddings) == (1e-4, "gelu_new", True)


def test_a_nested_text_config_is_the_model() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 12}
    text |= {"intermediate_size": 10240, "sliding_window": 1024}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    shape = ModelShape.from_hf(outer | {"text_config": text, "vision_config": {"hidden_size": 1}})

    assert shape.architecture == "Gemma3ForConditionalGeneration"
    assert (shape.hidden_size, shape.num_heads, shape.num_kv_heads) == (2560, 8, 4)
    assert (shape.head_dim, shape.vocab_size) == (256, 262208)
    assert shape.sliding_windows[:6] == (1024,) * 5 + (None,)
    assert (shape.ropes[0].theta, shape.ropes[0].kind) == (10_000.0, "default")
    assert (shape.ropes[5].theta, shape.ropes[5].kind) == (1_000_000.0, "linear")
    assert shape.ropes[5].need("factor") == 8.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"model_type": "llama", "sliding_window": 8}, [None] * 4, id="llama: ignored"),
        pytest.param({"model_type": "mistral", "sliding_window": 8}, [8] * 4, id="mistral: all"),
        pytest.param({"model_type": "mistral", "sliding_window": None}, [None] * 4, id="none"),
        pytest.param(
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False},
            [None] * 4,
            id="qwen2, switched off",
        ),
        pytest.param({"model_type": "qwen2", "sliding_window": 8}, [None] * 4, id="qwen2: default"),
        pytest.param(
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            [None, None, None, 8],
            id="qwen2: upper layers",
        ),
        pytest.param({"model_type": "gemma2"}, [4096, None, 4096, None], id="gemma2: alternating"),
        pytest.param(
            {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 4},
            [8, 8, 8, None],
            id="gemma3: a pattern",
        ),
        pytest.param(
            {
                "model_type": "other",
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [None, 8, None, 8],
            id="layer types",
        ),
    ],
)
def test_each_layer_has_its_own_window(changes: dict[str, Any], expected: list[int | None]) -> None:
    assert list(shape_of(**changes).sliding_windows) == expected


def test_windows_can_be_disabled() -> None:
    config = LLAMA | {"model_type": "mistral", "sliding_window": 8}
    shape = ModelShape.from_hf(config, disable_sliding_window=True)
    assert shape.sliding_windows == (None,) * 4


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "n_layer"),
        ("vocab_size", "vocab_size"),
    ],
)
def test_a_config_without_a_size_is_refused_by_its_name(absent: str, named: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != absent}
    with pytest.raises(ConfigError, match=named):
        ModelShape.from_hf(config)


def test_too_few_layer_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 layer_types for 4 layers"):
        shape_of(layer_types=["full_attention"] * 2, sliding_window=8, model_type="other")
