"""How an AsyncLLM comes to its engine: by starting one, or by attaching to one that runs.

Outside an event loop starting waits until the engine is ready. Inside a running loop the waiting is
done by ``connect``, while other tasks run.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from frontend.async_session import AsyncClient, AsyncSession
from frontend.engine_setup import (
    assemble_config,
    load_engine_tokenizer,
    make_stat_loggers,
    with_executor_path,
)
from frontend.launcher import Launch
from frontend.stat_loggers import IterationStats, StatLoggerFactory
from frontend.tokenizer import Tokenizer
from frontend.tokenizer_pool import TokenizerPool, make_tokenizer_pool
from ipc.config import EngineConfig, ParallelConfig, decode_config
from ipc.errors import EngineRestartingError
from ipc.operations import GetStats

Connector = Callable[[], Awaitable[AsyncClient]]

# What the 2024 constructor takes by position, after its first two arguments.
POSITIONAL_NAMES = (
    "model_config",
    "cache_config",
    "parallel_config",
    "scheduler_config",
    "device_config",
    "load_config",
    "lora_config",
    "vision_language_config",
    "speculative_config",
    "decoding_config",
    "executor_class",
    "log_stats",
    "usage_context",
)


@dataclass(slots=True)
class EngineStart:
    """The way to one engine, and what is made of its connection."""

    connector: Connector
    config: EngineConfig | None  # None: the engine will say
    stat_loggers: Sequence[StatLoggerFactory] | None
    log_stats: bool
    launch: Launch | None = None  # an engine that was started already and is not connected yet
    tokenizer: Tokenizer | None = None  # set with ``config``
    session: AsyncSession | None = None  # set by ``connect``

    async def connect(self) -> AsyncSession:
        """Connect, in the running loop; from then on config, tokenizer and session are set.

        Raises:
            ConfigError, EngineStartError, ProtocolError: there is no engine to be had.
        """
        client = await self.connector()
        try:
            if self.config is None:
                self.config = decode_config(client.welcome.config)
                self.tokenizer = await asyncio.to_thread(load_engine_tokenizer, self.config)
            loggers = make_stat_loggers(self.config, self.stat_loggers, log_stats=self.log_stats)
            if loggers.loggers:  # a scrape before the first request shows the cache's size too
                with contextlib.suppress(EngineRestartingError):  # the next core's steps tell them
                    loggers.record(await client.call(GetStats()), IterationStats())
            pool = make_pool(self.config, self.tokenizer)
            self.session = AsyncSession(client, self.config, self.tokenizer, loggers, pool)
        except BaseException:
            client.close()
            raise
        self.launch = None  # belongs to the client from now on
        return self.session

    def close(self) -> None:
        """End the engine, connected or not. Harmless when repeated."""
        if self.session is not None:
            self.session.close()
        if self.launch is not None:
            self.launch.terminate()
            self.launch = None


def make_pool(config: EngineConfig, tokenizer: Tokenizer | None) -> TokenizerPool | None:
    """The pool that the config asks for, if it does."""
    pool_config = config.tokenizer_pool_config
    if pool_config is None or pool_config.pool_size == 0 or tokenizer is None:
        return None
    return make_tokenizer_pool(pool_config, config.model_config, tokenizer)


def start_engine(options: dict[str, Any]) -> EngineStart:
    """Start an engine of our own; outside an event loop, return when it is ready.

    Args:
        options: what the constructors of engines take, by name.

    Raises:
        ConfigError: a value cannot work; nothing was started.
        EngineStartError: it cannot start. Inside an event loop ``connect`` raises it.
    """
    from frontend.core_client import AsyncCoreClient

    sub_configs = options.copy()
    executor_class = sub_configs.pop("executor_class", None)
    log_stats = bool(sub_configs.pop("log_stats", False))
    stat_loggers = sub_configs.pop("stat_loggers", None)
    sub_configs.pop("usage_context", None)  # a label, of which nothing depends
    config = assemble_config(sub_configs.pop("vllm_config", None), sub_configs)
    config = with_executor_path(config, executor_class)
    launch = Launch(config)
    try:
        tokenizer = load_engine_tokenizer(config)  # while the engine's processes start
        if not is_in_event_loop():
            launch.wait_ready()
    except BaseException:
        launch.terminate()
        raise
    connector: Connector = lambda: AsyncCoreClient.attach(launch)  # noqa: E731
    return EngineStart(connector, config, stat_loggers, log_stats, launch, tokenizer)


def attach_to_engine(
    address: str, keys: Any, stat_loggers: Sequence[StatLoggerFactory] | None, *, log_stats: bool
) -> EngineStart:
    """The way to a running engine."""
    from frontend.core_client import AsyncCoreClient

    return EngineStart(lambda: AsyncCoreClient.attach(address, keys), None, stat_loggers, log_stats)


def name_arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments by name, from the two ways of passing them."""
    if len(args) > len(POSITIONAL_NAMES):
        raise TypeError(f"at most {len(POSITIONAL_NAMES) + 2} positional arguments")
    named = dict(zip(POSITIONAL_NAMES, args, strict=False))
    twice = sorted(named.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"got {', '.join(twice)} by position and by keyword")
    return named | kwargs


def with_ray_workers(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the backend that ``worker_use_ray`` asks for."""
    whole: EngineConfig | None = kwargs.get("vllm_config")
    parallel_config: ParallelConfig | None = (
        kwargs.get("parallel_config") if whole is None else whole.parallel_config
    )
    parallel_config = replace(
        parallel_config or ParallelConfig(),
        worker_use_ray=True,
        distributed_executor_backend="ray",
    )
    if whole is None:
        return kwargs | {"parallel_config": parallel_config}
    return kwargs | {"vllm_config": replace(whole, parallel_config=parallel_config)}


def is_in_event_loop() -> bool:
    """Whether this thread runs an event loop right now."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
