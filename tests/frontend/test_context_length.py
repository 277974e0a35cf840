"""How long a request may be, over the variants of config.json."""

import logging
from typing import Any

import pytest

from frontend.context_length import (
    DEFAULT_MAX_MODEL_LEN,
    check_rope_scaling,
    choose_max_model_len,
    derive_max_model_len,
)
from ipc.errors import ConfigError

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}


def rope(config: dict[str, Any], **rope_scaling: Any) -> dict[str, Any]:
    """A config with a RoPE scaling."""
    return config | {"rope_scaling": rope_scaling}


LONG = {"max_position_embeddings": 4000}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(LONG, 4000, id="max_position_embeddings"),
        pytest.param({"n_positions": 1024}, 1024, id="GPT-2"),
        pytest.param({"max_seq_len": 512}, 512, id="MPT"),
        pytest.param({"seq_length": 300}, 300, id="ChatGLM"),
        pytest.param({"max_sequence_length": 200}, 200, id="OPT"),
        pytest.param(LONG | {"max_seq_len": 100}, 100, id="the smallest of several"),
        pytest.param({"text_config": LONG}, 4000, id="nested"),
        pytest.param({}, None, id="nothing declared"),
        pytest.param({"max_position_embeddings": None}, None, id="declared as null"),
        pytest.param(rope(LONG, type="linear", factor=2.0), 8000, id="linear"),
        pytest.param(rope(LONG, rope_type="dynamic", factor=1.5), 6000, id="dynamic"),
        pytest.param(LONG | {"rope_scaling": YARN}, 4000, id="yarn: original times factor"),
        pytest.param(rope(LONG, type="yarn", factor=2), 8000, id="yarn without an original"),
        pytest.param(rope(LONG, rope_type="llama3", factor=8.0), 4000, id="llama3: included"),
        pytest.param(rope(LONG, type="su"), 4000, id="su: included"),
        pytest.param(rope(LONG, type="longrope"), 4000, id="longrope: included"),
        pytest.param(rope(LONG, mrope_section=[16]), 4000, id="no type"),
        pytest.param(
            LONG | {"rope_parameters": {"rope_type": "linear", "factor": 2}}, 8000, id="new name"
        ),
        pytest.param(
            LONG | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            4000,
            id="one per kind of layer",
        ),
        pytest.param(
            rope(LONG | {"model_type": "gemma3_text"}, rope_type="linear", factor=8.0),
            4000,
            id="gemma3 declares the scaled length",
        ),
    ],
)
def test_length_is_derived_from_the_config(config: dict[str, Any], expected: int | None) -> None:
    assert derive_max_model_len(config, is_window_limit=False) == expected


def test_a_disabled_sliding_window_limits_the_length() -> None:
    config = LONG | {"sliding_window": 64}
    assert derive_max_model_len(config, is_window_limit=True) == 64
    assert derive_max_model_len(config, is_window_limit=False) == 4000


def test_a_model_that_declares_nothing_gets_a_default_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_max_model_len(None, {}) == DEFAULT_MAX_MODEL_LEN == 2048
    assert "--max-model-len" in caplog.text
    assert choose_max_model_len(100_000, {}) == 100_000


@pytest.mark.parametrize("wanted", [1, 3999, 4000])
def test_less_than_the_model_allows_is_taken(wanted: int) -> None:
    assert choose_max_model_len(wanted, LONG) == wanted


@pytest.mark.parametrize("wanted", [0, -5, 4001, 2**31])
def test_more_than_the_model_allows_or_nothing_is_refused(wanted: int) -> None:
    with pytest.raises(ConfigError, match="--max-model-len"):
        choose_max_model_len(wanted, LONG)


def test_the_tokenizers_limit_may_allow_more_but_no_limit_allows_nothing() -> None:
    assert choose_max_model_len(5000, LONG, tokenizer_limit=5000) == 5000
    assert choose_max_model_len(5000, LONG | {"model_max_length": 6000}) == 5000
    with pytest.raises(ConfigError):
        choose_max_model_len(5000, LONG, tokenizer_limit=int(1e30))
    assert choose_max_model_len(None, LONG, tokenizer_limit=5000) == 4000


@pytest.mark.parametrize(
    ("rope_scaling", "at_fault"),
    [
        pytest.param({}, "unknown type None", id="no type"),
        pytest.param({"type": "spiral"}, "unknown type 'spiral'", id="unknown type"),
        pytest.param({"type": ["yarn"]}, "unknown type", id="a list"),
        pytest.param({"type": "linear"}, "factor, got None", id="no factor"),
        pytest.param({"type": "yarn", "factor": -1}, "factor, got -1", id="negative"),
        pytest.param({"type": "dynamic", "factor": float("nan")}, "factor, got nan", id="nan"),
        pytest.param({"type": "linear", "factor": True}, "factor, got True", id="a truth value"),
        pytest.param({"type": "llama3", "factor": 8}, "low_freq_factor", id="llama3's numbers"),
        pytest.param({"type": "longrope"}, "long_factor", id="longrope's lists"),
        pytest.param(
            {"type": "su", "long_factor": [1], "short_factor": ["x"]}, "short_factor", id="text"
        ),
        pytest.param(
            YARN | {"original_max_position_embeddings": 0},
            "original_max_position_embeddings",
            id="no original length",
        ),
    ],
)
def test_a_rope_scaling_that_no_model_can_apply_is_refused(
    rope_scaling: dict[str, Any], at_fault: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_rope_scaling(rope_scaling, "--rope-scaling")
    assert "--rope-scaling" in str(error.value)
    assert at_fault in str(error.value)
