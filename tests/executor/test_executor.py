"""Which executor a config gets."""

import dataclasses

import pytest

from executor.executor import make_executor
from executor.multiproc import MultiprocExecutor
from executor.uniproc import UniprocExecutor
from ipc.config import EngineConfig, ParallelConfig
from ipc.errors import ConfigError
from tests.executor.configs import make_config


class InjectedExecutor:
    """Any class will do: it is built with the config."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config


def with_parallel(**fields: object) -> EngineConfig:
    parallel = ParallelConfig(**fields)  # type: ignore[arg-type]
    return dataclasses.replace(make_config(), parallel_config=parallel)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, UniprocExecutor, id="one worker: in this process"),
        pytest.param({"tensor_parallel_size": 2}, MultiprocExecutor, id="two: processes"),
        pytest.param({"distributed_executor_backend": "mp"}, MultiprocExecutor, id="mp by name"),
        pytest.param(
            {
                "distributed_executor_backend": "mp",
                "executor_class": f"{__name__}:InjectedExecutor",
            },
            InjectedExecutor,
            id="an injected class goes first",
        ),
    ],
)
def test_the_config_chooses(fields: dict[str, object], expected: type) -> None:
    executor = make_executor(with_parallel(**fields))

    assert isinstance(executor, expected)
    if isinstance(executor, MultiprocExecutor):
        executor.shutdown()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"distributed_executor_backend": "ray"}, "ray is not supported", id="ray"),
        pytest.param({"distributed_executor_backend": "mpi"}, "got 'mpi'", id="unknown"),
        pytest.param(
            {"distributed_executor_backend": "uniproc", "tensor_parallel_size": 2},
            "runs one worker",
            id="too many for one process",
        ),
        pytest.param({"executor_class": "nowhere:Class"}, "'nowhere:Class'", id="no such module"),
        pytest.param({"executor_class": "os:Nothing"}, "'os:Nothing'", id="no such class"),
        pytest.param({"executor_class": "os:sep"}, "must name a class", id="not a class"),
        pytest.param({"executor_class": "os"}, "package.module:Class", id="no colon"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make_executor(with_parallel(**fields))
