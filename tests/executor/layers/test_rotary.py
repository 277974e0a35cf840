"""Rotary tables against transformers' own, for every kind of scaling and both spellings."""

from typing import Any

import pytest
import torch
import transformers

from executor.layers.rotary import LayerRotary, make_tables
from executor.model_config import ModelShape
from ipc.errors import ConfigError

PLAIN: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0],
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with betas, no rounding, and an attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "yarn with two temperatures": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.2,
        "mscale_all_dim": 0.8,
    },
}


def shape_of(config: dict[str, Any], model_type: str = "llama", **changes: Any) -> ModelShape:
    return ModelShape.from_hf(
        {"model_type": model_type, "architectures": ["X"]} | config, **changes
    )


def reference_tables(config: Any, length: int, family: str = "llama") -> torch.Tensor:
    """transformers' cos and sin for positions [0, length), its two equal halves cut to one."""
    module = getattr(transformers.models, family)
    names = {"llama": "Llama", "phi3": "Phi3"}
    rotary = getattr(getattr(module, f"modeling_{family}"), f"{names[family]}RotaryEmbedding")(
        config
    )
    cos, sin = rotary(torch.zeros(1), torch.arange(length).unsqueeze(0))
    half = cos.shape[-1] // 2
    return torch.stack((cos[0, :, :half], sin[0, :, :half]))


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str, spelling: str) -> None:
    parameters = KINDS[kind]
    if spelling == "old":
        scaling = {("type" if k == "rope_type" else k): v for k, v in parameters.items()}
        config = PLAIN | {"rope_theta": 5000.0, "rope_scaling": scaling}
    else:
        config = PLAIN | {"rope_parameters": parameters | {"rope_theta": 5000.0}}
    reference = transformers.LlamaConfig(
        **PLAIN, rope_parameters=parameters | {"rope_theta": 5000.0}
    )

    shape = shape_of(config, max_model_len=256)
    tables = torch.stack(make_tables(shape.ropes[0], 256))
    torch.testing.assert_close(tables, reference_tables(reference, 256), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [10, 64, 65, 90])
def test_dynamic_scaling_gives_the_newest_token_the_base_of_its_length(length: int) -> None:
    config = PLAIN | {"max_position_embeddings": 64}
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    shape = shape_of(config | {"rope_parameters": parameters}, max_model_len=128)
    reference = transformers.LlamaConfig(**config, rope_parameters=parameters)

    ours = torch.stack(make_tables(shape.ropes[0], 128))[:, length - 1]
    expected = reference_tables(reference, length)[:, -1]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("max_model_len", "length"),
    [
        pytest.param(64, 64, id="within the original length: the short factors"),
        pytest.param(256, 65, id="beyond it: the long factors"),
    ],
)
@pytest.mark.parametrize("name", ["longrope", "su"])
def test_longrope_follows_the_engines_longest_length(
    name: str, max_model_len: int, length: int
) -> None:
    config = PLAIN | {"original_max_position_embeddings": 64}
    shape = shape_of(
        config | {"rope_scaling": LONG | {"rope_type": name}}, "phi3", max_model_len=max_model_len
    )
    reference = transformers.Phi3Config(**config, pad_token_id=0, rope_parameters=dict(LONG))

    tables = torch.stack(make_tables(shape.ropes[0], max_model_len))[:, :length]
    expected = reference_tables(reference, length, "phi3")
    torch.testing.assert_close(tables, expected, atol=1e-5, rtol=1e-4)


def test_layers_with_two_bases_share_two_tables() -> None:
    config = PLAIN | {
        "num_hidden_layers": 6,
        "head_dim": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    shape = shape_of(config, "gemma3_text", max_model_len=32)
    rotary = LayerRotary(shape.ropes, 32)
    for embedding in rotary.embeddings:
        embedding.finish_loading(torch.device("cpu"))

    steps = rotary(torch.arange(4))
    assert [shape.ropes[i].theta for i in (0, 5)] == [10_000.0, 1_000_000.0]
    assert [shape.ropes[i].kind for i in (0, 5)] == ["default", "linear"]
    assert all(step is steps[0] for step in steps[:5])
    assert steps[5] is not steps[0]


def test_a_flag_wins_over_the_configs_own_parameters() -> None:
    config = PLAIN | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    rope = shape_of(config).ropes[0]
    assert (rope.kind, rope.theta, rope.need("factor")) == ("linear", 7.0, 2.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        pytest.param({"type": "spiral"}, "spiral", id="unknown kind"),
        pytest.param({"type": "linear"}, "factor", id="no factor"),
        pytest.param(LONG | {"long_factor": [1.0]}, "8 factors", id="wrong number of factors"),
    ],
)
def test_scaling_that_cannot_work_is_refused_by_name(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tables(shape_of(PLAIN | {"rope_scaling": scaling}, max_model_len=300).ropes[0], 300)
