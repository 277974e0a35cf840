"""Heliograph's public names, each loaded when it is first used.

``import frontend`` costs nothing: no torch, no transformers, no sockets. Everything that a user
imports by name is listed here; all other imports go to the defining module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frontend.async_llm import AsyncEngineDeadError, AsyncLLM, AsyncLLMEngine
    from frontend.engine_args import AsyncEngineArgs, EngineArgs
    from frontend.llm import LLM
    from frontend.llm_engine import LLMEngine
    from frontend.lora_request import LoRARequest
    from frontend.outputs import (
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
    )
    from frontend.pooling_params import PoolingParams
    from frontend.usage_context import UsageContext
    from ipc.errors import (
        ConfigError,
        EngineDeadError,
        EngineError,
        EngineGenerateError,
        EngineOverloadedError,
        EngineStartError,
        RequestError,
        UnsupportedError,
    )
    from ipc.sampling_params import (
        RequestOutputKind,
        SamplingParams,
        SamplingType,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "AsyncEngineArgs": "frontend.engine_args",
    "AsyncEngineDeadError": "frontend.async_llm",
    "AsyncLLM": "frontend.async_llm",
    "AsyncLLMEngine": "frontend.async_llm",
    "CompletionOutput": "frontend.outputs",
    "ConfigError": "ipc.errors",
    "EmbeddingOutput": "frontend.outputs",
    "EmbeddingRequestOutput": "frontend.outputs",
    "EngineArgs": "frontend.engine_args",
    "EngineDeadError": "ipc.errors",
    "EngineError": "ipc.errors",
    "EngineGenerateError": "ipc.errors",
    "EngineOverloadedError": "ipc.errors",
    "EngineStartError": "ipc.errors",
    "LLM": "frontend.llm",
    "LLMEngine": "frontend.llm_engine",
    "LoRARequest": "frontend.lora_request",
    "Logprob": "frontend.outputs",
    "PoolingParams": "frontend.pooling_params",
    "RequestError": "ipc.errors",
    "RequestMetrics": "frontend.outputs",
    "RequestOutput": "frontend.outputs",
    "RequestOutputKind": "ipc.sampling_params",
    "SamplingParams": "ipc.sampling_params",
    "SamplingType": "ipc.sampling_params",
    "StructuredOutputsParams": "ipc.sampling_params",
    "UnsupportedError": "ipc.errors",
    "UsageContext": "frontend.usage_context",
}

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncEngineDeadError",
    "AsyncLLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EngineArgs",
    "EngineDeadError",
    "EngineError",
    "EngineGenerateError",
    "EngineOverloadedError",
    "EngineStartError",
    "LLMEngine",
    "LoRARequest",
    "Logprob",
    "PoolingParams",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SamplingType",
    "StructuredOutputsParams",
    "UnsupportedError",
    "UsageContext",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name``, and remember the object."""
    module = _MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *_MODULE_OF_NAME})
