"""What LLMEngine and AsyncLLM do alike before there is an engine: the config and the loggers.

Both take one finished ``vllm_config``, or the ten config objects of 2024 by keyword; and an
executor class that takes the place of ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from frontend.stat_loggers import LoggingStatLogger, StatLoggerFactory, StatLoggerGroup
from frontend.tokenizer import Tokenizer, load_tokenizer
from ipc.config import EngineConfig
from ipc.errors import ConfigError

CONFIG_NAMES = frozenset(f.name for f in fields(EngineConfig))

ExecutorClass = type[Any] | str  # a class, or its import path "module:Class"


def assemble_config(
    vllm_config: EngineConfig | None, sub_configs: Mapping[str, Any]
) -> EngineConfig:
    """One resolved config, from a whole one or from its parts by name.

    Raises:
        TypeError: both forms at once, neither, or a part that does not exist.
        ConfigError: a value cannot work; the message names the flag.
    """
    from frontend.config_resolution import resolve_engine_config

    unknown = sorted(sub_configs.keys() - CONFIG_NAMES)
    if unknown:
        raise TypeError(f"an engine takes no argument {', '.join(map(repr, unknown))}")
    given = {name: value for name, value in sub_configs.items() if value is not None}
    if vllm_config is not None:
        if given:
            raise TypeError(f"vllm_config already holds {', '.join(sorted(given))}")
        return resolve_engine_config(vllm_config)
    if "model_config" not in given:
        raise TypeError("an engine needs model_config, or a whole vllm_config")
    return resolve_engine_config(EngineConfig(**given))


def with_executor_path(config: EngineConfig, executor_class: ExecutorClass | None) -> EngineConfig:
    """A config that names the executor class, for cores in another process.

    Raises:
        ConfigError: another process could not import the class.
    """
    if executor_class is None:
        return config
    if isinstance(executor_class, str):
        path = executor_class
    else:
        path = f"{executor_class.__module__}:{executor_class.__qualname__}"
        if executor_class.__module__ == "__main__" or "<locals>" in path:
            raise ConfigError(
                f"executor_class {path} cannot be imported by the engine's process: define it at "
                f"the top of a module, or run the core in this process"
            )
    parallel_config = replace(config.parallel_config, executor_class=path)
    return replace(config, parallel_config=parallel_config)


def load_engine_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The engine's tokenizer; None when it was told to have none."""
    if config.model_config.skip_tokenizer_init:
        return None
    return load_tokenizer(config.model_config)


def make_stat_loggers(
    config: EngineConfig, factories: Sequence[StatLoggerFactory] | None, *, log_stats: bool
) -> StatLoggerGroup:
    """The caller's loggers, and with ``log_stats`` the one that writes lines."""
    defaults: list[StatLoggerFactory] = [LoggingStatLogger] if log_stats else []
    return StatLoggerGroup(config, [*defaults, *(factories or ())])


def profile_directory(directory: str | None) -> str:
    """Where traces go: ``directory``, else "profile" under the current one; absolute."""
    from pathlib import Path

    return str(Path(directory or "profile").absolute())
