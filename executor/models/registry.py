"""Which class runs an architecture. Model files are imported only when they are needed.

An architecture without a file of its own runs through ``transformers_fallback``.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from ipc.errors import ConfigError

_MODELS: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("llama", "LlamaForCausalLM"),
    # The same architecture and checkpoint names under another name.
    "LLaMAForCausalLM": ("llama", "LlamaForCausalLM"),
    "YiForCausalLM": ("llama", "LlamaForCausalLM"),
    "InternLMForCausalLM": ("llama", "LlamaForCausalLM"),
    "AquilaForCausalLM": ("llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "OPTForCausalLM": ("opt", "OPTForCausalLM"),
    "GPT2LMHeadModel": ("gpt2", "GPT2LMHeadModel"),
    "Gemma2ForCausalLM": ("gemma2", "Gemma2ForCausalLM"),
    "Gemma3ForCausalLM": ("gemma3", "Gemma3ForCausalLM"),
    "Gemma3ForConditionalGeneration": ("gemma3", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM": ("phi3", "Phi3ForCausalLM"),
}
NATIVE_ARCHITECTURES = tuple(_MODELS)
_FALLBACK = ("transformers_fallback", "TransformersForCausalLM")


def resolve(hf_config: Mapping[str, Any]) -> type[Any]:
    """The class for the config's ``architectures``; the first that is known wins.

    Raises:
        ConfigError: config.json names no architecture.
    """
    architectures = hf_config.get("architectures") or []
    if not architectures:
        raise ConfigError("config.json names no architectures: it is unclear which model this is")
    module, name = next((_MODELS[a] for a in architectures if a in _MODELS), _FALLBACK)
    return getattr(importlib.import_module(f"executor.models.{module}"), name)


def is_native(hf_config: Mapping[str, Any]) -> bool:
    """Whether an architecture has a file of its own here."""
    return any(a in _MODELS for a in hf_config.get("architectures") or [])
