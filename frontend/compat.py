"""Makes ``import vllm`` resolve to Heliograph inside this process.

After ``install()``, the module names that mid-2024 programs import exist, and each name in them is
the object of ours that keeps its contract, loaded when it is first used. A vllm that is installed
as well is hidden in this process only.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from frontend import __version__
from frontend.vllm_names import CONTRACT_VERSION

ROOT = "vllm"
VERSION = f"{CONTRACT_VERSION}+heliograph.{__version__}"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"

_ENGINE = {
    "AsyncEngineArgs": "frontend.engine_args",
    "AsyncLLM": "frontend.async_llm",
    "AsyncLLMEngine": "frontend.async_llm",
    "EngineArgs": "frontend.engine_args",
    "LLM": "frontend.llm",
    "LLMEngine": "frontend.llm_engine",
}
_SAMPLING = {
    "RequestOutputKind": "ipc.sampling_params",
    "SamplingParams": "ipc.sampling_params",
    "SamplingType": "ipc.sampling_params",
    "StructuredOutputsParams": "ipc.sampling_params",
}
_OUTPUTS = {
    "CompletionOutput": "frontend.outputs",
    "EmbeddingOutput": "frontend.outputs",
    "EmbeddingRequestOutput": "frontend.outputs",
    "RequestOutput": "frontend.outputs",
}
_PROMPTS = {
    "PromptInputs": "frontend.vllm_names",
    "PromptStrictInputs": "frontend.vllm_names",
    "PromptType": "frontend.vllm_names",
    "TextPrompt": "frontend.vllm_names",
    "TextTokensPrompt": "frontend.vllm_names",
    "TokensPrompt": "frontend.vllm_names",
}
_POOLING = {"PoolingParams": "frontend.pooling_params"}
_ERRORS = {
    "AsyncEngineDeadError": "frontend.async_llm",
    "EngineDeadError": "ipc.errors",
    "EngineGenerateError": "ipc.errors",
}
_CONFIG_NAMES = (
    "CacheConfig",
    "DecodingConfig",
    "DeviceConfig",
    "EngineConfig",
    "LoRAConfig",
    "LoadConfig",
    "ModelConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "SpeculativeConfig",
    "TokenizerPoolConfig",
    "VisionLanguageConfig",
)
_CONFIGS = dict.fromkeys(_CONFIG_NAMES, "ipc.config")
_VERSION = {"__version__": "frontend.compat:VERSION"}


def _names(*tables: Mapping[str, str], **more: str) -> dict[str, str]:
    merged: dict[str, str] = {}
    for table in (*tables, more):
        merged |= table
    return merged


# Module -> name -> where the object is: "module", or "module:name" where the names differ.
MODULES: dict[str, dict[str, str]] = {
    "vllm": _names(_ENGINE, _SAMPLING, _OUTPUTS, _PROMPTS, _POOLING, _VERSION),
    "vllm.config": _names(_CONFIGS, VllmConfig="ipc.config:EngineConfig"),
    "vllm.engine": {},
    "vllm.engine.arg_utils": {
        "AsyncEngineArgs": "frontend.engine_args",
        "EngineArgs": "frontend.engine_args",
    },
    "vllm.engine.async_llm_engine": _names(_ERRORS, AsyncLLMEngine="frontend.async_llm"),
    "vllm.engine.llm_engine": {"LLMEngine": "frontend.llm_engine"},
    "vllm.entrypoints": {},
    "vllm.entrypoints.llm": {"LLM": "frontend.llm"},
    "vllm.entrypoints.openai": {},
    SERVER_MODULE: {"main": "frontend.__main__"},
    "vllm.inputs": _PROMPTS,
    "vllm.logger": {"init_logger": "frontend.vllm_names"},
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": "frontend.lora_request"},
    "vllm.outputs": _OUTPUTS,
    "vllm.pooling_params": _POOLING,
    "vllm.sampling_params": _SAMPLING,
    "vllm.sequence": {"Logprob": "frontend.outputs", "RequestMetrics": "frontend.outputs"},
    "vllm.transformers_utils": {},
    "vllm.transformers_utils.tokenizer": {"get_tokenizer": "frontend.vllm_names"},
    "vllm.usage": {},
    "vllm.usage.usage_lib": {"UsageContext": "frontend.usage_context"},
    "vllm.utils": {
        "Counter": "frontend.vllm_names",
        "FlexibleArgumentParser": "frontend.vllm_names",
        "random_uuid": "frontend.vllm_names",
    },
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.async_llm": {"AsyncLLM": "frontend.async_llm"},
    "vllm.v1.engine.exceptions": {
        "EngineDeadError": "ipc.errors",
        "EngineGenerateError": "ipc.errors",
    },
    "vllm.v1.engine.llm_engine": {"LLMEngine": "frontend.llm_engine"},
    "vllm.version": _VERSION,
}


def install() -> None:
    """Let ``import vllm`` find Heliograph from now on. A second call does nothing."""
    if any(isinstance(finder, VllmFinder) for finder in sys.meta_path):
        return
    for name in [name for name in sys.modules if _is_ours(name)]:
        del sys.modules[name]
    sys.meta_path.insert(0, VllmFinder())


def uninstall() -> None:
    """Undo ``install``; objects that were imported stay what they are."""
    sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, VllmFinder)]
    for name in [name for name in sys.modules if _is_ours(name)]:
        del sys.modules[name]


def run_script(path: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run a Python file as a program in which ``import vllm`` finds Heliograph.

    Args:
        argv: what the program sees after its own name in ``sys.argv``.

    Returns:
        The program's global names at its end.
    """
    install()
    sys.argv = [path, *argv]
    sys.path.insert(0, str(Path(path).resolve().parent))
    return runpy.run_path(path, run_name="__main__")


def run_module(name: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """As ``python -m name``, with ``import vllm`` finding Heliograph."""
    install()
    sys.argv = [name, *argv]
    sys.path.insert(0, str(Path.cwd()))
    return runpy.run_module(name, run_name="__main__", alter_sys=True)


class VllmFinder(MetaPathFinder):
    """Finds ``vllm`` and what is below it; says what exists when asked for something else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of our modules; None for names that are not vllm's.

        Raises:
            ImportError: Heliograph has no such part of vllm. Python also asks here for the
                missing name of a ``from vllm import name``.
        """
        if not _is_ours(fullname):
            return None
        if fullname in MODULES:
            # Each is a package, so that Python asks about every name that it lacks.
            return ModuleSpec(fullname, VllmLoader(), is_package=True)
        parent, _, name = fullname.rpartition(".")
        if name == "__main__":  # asked by runpy, of a module to be run
            return ModuleSpec(fullname, VllmLoader()) if parent == SERVER_MODULE else None
        raise ImportError(_describe_missing(parent, name), name=fullname)


class VllmLoader(Loader):
    """Makes modules whose names are looked up when they are used."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty alias module."""
        return AliasModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names load themselves."""

    def get_code(self, fullname: str) -> CodeType:
        """What ``python -m`` runs: the server, or nothing for any other module."""
        name = fullname.removesuffix(".__main__")
        source = "pass"
        if name == SERVER_MODULE:
            source = "import sys\nfrom frontend.__main__ import main\nsys.exit(main())"
        return compile(source, name, "exec")


class AliasModule(ModuleType):
    """A module of ``MODULES``."""

    def __getattr__(self, name: str) -> Any:
        """Load the object behind a name, and remember it."""
        place = MODULES[self.__name__].get(name)
        if place is None:
            raise AttributeError(_describe_missing(self.__name__, name))
        module, _, other_name = place.partition(":")
        value = getattr(import_module(module), other_name or name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        """The names that exist here, loaded or not."""
        return sorted({*super().__dir__(), *_contents(self.__name__)})


def _is_ours(fullname: str) -> bool:
    return fullname == ROOT or fullname.startswith(f"{ROOT}.")


def _contents(module: str) -> list[str]:
    prefix = f"{module}."
    children = {name.removeprefix(prefix).split(".")[0] for name in MODULES if prefix in name}
    return sorted({*MODULES.get(module, ()), *children})


def _describe_missing(module: str, name: str) -> str:
    while module not in MODULES:
        module = module.rpartition(".")[0]
    offers = ", ".join(_contents(module))
    return f"Heliograph has no {name!r} in its {module!r}, which offers: {offers}"
