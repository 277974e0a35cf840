"""Liveness: at once, without waiting for the engine, and wrong about neither busy nor frozen."""

import asyncio

import pytest

from frontend.liveness import SILENCE_LIMIT_S, Liveness
from ipc.errors import EngineDeadError


class SlowEngine:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_questions = 0
        self.may_answer = asyncio.Event()
        self.liveness = Liveness(self.answer, clock=lambda: self.now_s)

    async def answer(self) -> None:
        self.num_questions += 1
        await self.may_answer.wait()

    async def check_at(self, now_s: float) -> None:
        self.now_s = now_s
        self.liveness.check()
        await asyncio.sleep(0)  # lets the question be put, and answered if it can be
        await asyncio.sleep(0)


def test_an_engine_that_answers_is_alive_however_late_the_next_check_comes() -> None:
    async def run() -> None:
        engine = SlowEngine()
        engine.may_answer.set()
        for now_s in (0.0, 1.0, 10 * SILENCE_LIMIT_S):
            await engine.check_at(now_s)
        assert engine.num_questions == 3

    asyncio.run(run())


def test_a_busy_engine_is_asked_once_and_is_alive_until_its_silence_is_long() -> None:
    async def run() -> None:
        engine = SlowEngine()
        for now_s in (0.0, 1.0, SILENCE_LIMIT_S):
            await engine.check_at(now_s)
        assert engine.num_questions == 1
        with pytest.raises(EngineDeadError, match="no sign of life for 61 s"):
            await engine.check_at(SILENCE_LIMIT_S + 1)

        engine.may_answer.set()  # it was only stopped, and goes on
        await asyncio.sleep(0.01)
        await engine.check_at(SILENCE_LIMIT_S + 2)

    asyncio.run(run())


def test_an_engine_that_ended_is_left_to_those_who_know_it() -> None:
    async def fail() -> None:
        raise EngineDeadError("gone")

    async def run() -> None:
        liveness = Liveness(fail)
        liveness.check()
        await asyncio.sleep(0)
        liveness.check()  # no error of the question's leaks

    asyncio.run(run())
