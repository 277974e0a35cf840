"""Configs from a whole or from parts; executors by class or by path."""

from typing import Any

import pytest

from frontend.engine_setup import assemble_config, profile_directory, with_executor_path
from ipc.config import EngineConfig, ModelConfig, SchedulerConfig
from ipc.errors import ConfigError
from tests.frontend.builders import TINY, make_config


class MyExecutor:
    """Stands for a user's executor."""


def test_a_whole_config_and_its_parts_give_the_same() -> None:
    model_config = ModelConfig(model=str(TINY), max_model_len=64)
    scheduler_config = SchedulerConfig(max_num_seqs=3)
    parts = assemble_config(
        None,
        {
            "model_config": model_config,
            "scheduler_config": scheduler_config,
            "lora_config": None,
        },
    )
    whole = assemble_config(
        EngineConfig(model_config=model_config, scheduler_config=scheduler_config), {}
    )
    assert parts == whole
    assert parts.model_config.model_path == str(TINY)
    assert parts.scheduler_config.max_num_seqs == 3


@pytest.mark.parametrize(
    ("vllm_config", "sub_configs", "words"),
    [
        pytest.param(None, {}, "needs model_config", id="nothing"),
        pytest.param(None, {"modle_config": 1}, "'modle_config'", id="a misspelled part"),
        pytest.param(make_config(), {"model_config": 1}, "already holds", id="both"),
    ],
)
def test_other_mixtures_are_type_errors(
    vllm_config: EngineConfig | None, sub_configs: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        assemble_config(vllm_config, sub_configs)


def test_an_executor_travels_by_its_import_path() -> None:
    config = with_executor_path(make_config(), MyExecutor)
    assert config.parallel_config.executor_class == f"{__name__}:MyExecutor"
    config = with_executor_path(make_config(), "a.b:C")
    assert config.parallel_config.executor_class == "a.b:C"
    assert with_executor_path(config, None) is config


def test_an_executor_that_nobody_can_import_is_refused() -> None:
    class Local:
        pass

    with pytest.raises(ConfigError, match="cannot be imported"):
        with_executor_path(make_config(), Local)


def test_traces_go_to_an_absolute_directory() -> None:
    assert profile_directory("/x/y") == "/x/y"
    assert profile_directory(None).endswith("/profile")
    assert profile_directory(None).startswith("/")
