"""The ways to an engine: arguments by name, Ray, pools, clients that are left behind."""

import asyncio
from typing import Any

import psutil
import pytest

from frontend.async_start import (
    EngineStart,
    is_in_event_loop,
    make_pool,
    name_arguments,
    start_engine,
    with_ray_workers,
)
from frontend.engine_args import EngineArgs
from frontend.model_files import bundled_model
from frontend.stat_loggers import IterationStats
from ipc.config import EngineConfig, ModelConfig, ParallelConfig, TokenizerPoolConfig
from ipc.errors import ConfigError
from ipc.messages import SchedulerStats, Welcome
from ipc.operations import GetStats
from tests.engine_core.process_tree import assert_gone
from tests.frontend.builders import FakeAsyncClient, FakeCore, always, make_config, make_tokenizer


def test_arguments_of_2024_have_their_places() -> None:
    assert name_arguments(["m", "c"], {"log_stats": True}) == {
        "model_config": "m",
        "cache_config": "c",
        "log_stats": True,
    }
    with pytest.raises(TypeError, match="by position and by keyword"):
        name_arguments(["m"], {"model_config": "n"})
    with pytest.raises(TypeError, match="at most 15 positional"):
        name_arguments(list(range(14)), {})


def test_ray_workers_can_be_asked_for_in_every_form() -> None:
    whole = with_ray_workers({"vllm_config": make_config()})["vllm_config"]
    assert whole.parallel_config.distributed_executor_backend == "ray"
    parts = with_ray_workers({"parallel_config": ParallelConfig(tensor_parallel_size=2)})
    assert parts["parallel_config"] == ParallelConfig(
        tensor_parallel_size=2, worker_use_ray=True, distributed_executor_backend="ray"
    )
    assert with_ray_workers({})["parallel_config"].worker_use_ray


def test_a_loop_is_noticed() -> None:
    async def inside() -> bool:
        return is_in_event_loop()

    assert asyncio.run(inside())
    assert not is_in_event_loop()


def test_a_pool_is_made_when_the_config_has_one() -> None:
    config = EngineConfig(
        model_config=ModelConfig(model="x"), tokenizer_pool_config=TokenizerPoolConfig(1, "thread")
    )
    assert make_pool(make_config(), make_tokenizer()) is None
    assert make_pool(config, None) is None
    pool = make_pool(config, make_tokenizer())
    assert pool is not None
    assert pool.encode("hi") == [104, 105]
    pool.close()


def test_a_connection_that_cannot_be_used_is_closed() -> None:
    class SilentClient(FakeAsyncClient):
        """Welcomes with a config that is none."""

        @property
        def welcome(self) -> Welcome:
            return self.core.welcome  # its config is b""

    async def main() -> None:
        client = SilentClient(FakeCore(always("x")))

        async def connect() -> Any:
            return client

        start = EngineStart(connect, None, None, log_stats=False)
        with pytest.raises(ValueError, match="Input data was truncated"):
            await start.connect()
        assert client.is_closed
        start.close()

    asyncio.run(main())


def test_stat_loggers_know_the_engine_before_its_first_request() -> None:
    recorded: list[Any] = []

    class Recorder:
        def record(self, stats: SchedulerStats | None, iteration: IterationStats) -> None:
            recorded.append((stats, iteration))

    async def main() -> None:
        stats = SchedulerStats(num_gpu_blocks=7)
        client = FakeAsyncClient(FakeCore(always("x"), results={GetStats: stats}))

        async def connect() -> Any:
            return client

        factories: Any = [lambda _config, _index: Recorder()]
        start = EngineStart(connect, make_config(), factories, log_stats=False)
        await start.connect()
        assert recorded == [(stats, IterationStats())]
        start.close()

    asyncio.run(main())


def test_the_engine_starts_before_the_tokenizer_is_read_and_ends_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[psutil.Process] = []

    def fail(_config: EngineConfig) -> None:
        started.extend(psutil.Process().children(recursive=True))
        raise ConfigError("no tokenizer")

    monkeypatch.setattr("frontend.async_start.load_engine_tokenizer", fail)
    config = EngineArgs(model=str(bundled_model())).create_engine_config()
    with pytest.raises(ConfigError, match="no tokenizer"):
        start_engine({"vllm_config": config})
    assert_gone(started)
