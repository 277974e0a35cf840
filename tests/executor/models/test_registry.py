"""Architectures find their classes, and every name in the table leads somewhere."""

import pytest

from executor.models import registry
from executor.models.llama import LlamaForCausalLM
from executor.models.transformers_fallback import TransformersForCausalLM
from ipc.errors import ConfigError


@pytest.mark.parametrize("architecture", registry.NATIVE_ARCHITECTURES)
def test_every_listed_architecture_has_a_class(architecture: str) -> None:
    model = registry.resolve({"architectures": [architecture]})
    assert model is not TransformersForCausalLM
    for name in ("forward", "compute_logits", "kv_cache_specs", "packed_modules"):
        assert hasattr(model, name)


def test_the_first_known_architecture_wins() -> None:
    config = {"architectures": ["MyOwnForCausalLM", "MistralForCausalLM", "OPTForCausalLM"]}
    assert registry.resolve(config) is LlamaForCausalLM
    assert registry.is_native(config)


def test_an_unknown_architecture_runs_through_transformers() -> None:
    config = {"architectures": ["FalconForCausalLM"]}
    assert registry.resolve(config) is TransformersForCausalLM
    assert not registry.is_native(config)


def test_a_config_without_architectures_is_refused() -> None:
    with pytest.raises(ConfigError, match="no architectures"):
        registry.resolve({"model_type": "llama"})
