"""AsyncLLM's questions to its engine, where no answer is waited for."""

import asyncio
from typing import Any

import pytest

from frontend import async_control
from frontend.async_start import EngineStart
from ipc.errors import EngineDeadError, UnsupportedError
from ipc.operations import AnyOperation


class SilentEngine:
    """An engine that never answers."""

    is_stopped = False
    _start = EngineStart(connector=None, config=None, stat_loggers=None, log_stats=False)  # type: ignore[arg-type]
    tokenizer = None

    @property
    def dead_error(self) -> EngineDeadError:
        return EngineDeadError("gone")

    async def call(self, operation: AnyOperation) -> Any:
        await asyncio.get_running_loop().create_future()

    async def get_vllm_config(self) -> Any:
        return None


def test_an_engine_that_is_being_started_is_healthy() -> None:
    asyncio.run(async_control.check_health(SilentEngine()))  # type: ignore[arg-type]


def test_a_stopped_engine_is_unhealthy_at_once() -> None:
    engine = SilentEngine()
    engine.is_stopped = True
    with pytest.raises(EngineDeadError, match="gone"):
        asyncio.run(async_control.check_health(engine))  # type: ignore[arg-type]


def test_a_tokenizer_that_was_not_loaded_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        asyncio.run(async_control.get_tokenizer(SilentEngine()))  # type: ignore[arg-type]


def test_waking_up_in_parts_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="tags"):
        asyncio.run(async_control.wake_up(SilentEngine(), ["weights"]))  # type: ignore[arg-type]
