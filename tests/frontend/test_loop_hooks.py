"""Hooks in an event loop: they act while their owner lives, and can all be taken out."""

import asyncio
import gc
import os

import pytest
import uvloop

from frontend.loop_hooks import LoopHooks, until_readable, weakly

LOOPS = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(uvloop.new_event_loop, id="uvloop"),
]


class Owner:
    """Counts how often it was called."""

    def __init__(self) -> None:
        self.num_calls = 0

    def act(self) -> None:
        """Count."""
        self.num_calls += 1


def test_a_weak_callback_does_not_keep_its_owner_alive() -> None:
    owner = Owner()
    callback = weakly(owner.act)
    callback()
    assert owner.num_calls == 1

    del owner
    gc.collect()
    callback()  # nothing happens


@pytest.mark.parametrize("make_loop", LOOPS)
def test_hooks_act_until_they_are_closed(make_loop: object) -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        readable, timed = Owner(), Owner()
        hooks = LoopHooks()
        hooks.open(asyncio.get_running_loop())
        hooks.add(read_end, readable.act)
        hooks.repeat(timed.act, 0.005)
        os.write(write_end, b"x")
        while not (readable.num_calls and timed.num_calls > 2):
            await asyncio.sleep(0.001)

        hooks.close()
        hooks.close()  # harmless
        before = (readable.num_calls, timed.num_calls)
        await asyncio.sleep(0.03)
        assert (readable.num_calls, timed.num_calls) == before
        os.close(read_end)
        os.close(write_end)

    with asyncio.Runner(loop_factory=make_loop) as runner:  # type: ignore[arg-type]
        runner.run(main())


def test_hooks_may_be_closed_after_their_loop() -> None:
    hooks = LoopHooks()
    read_end, write_end = os.pipe()

    async def main() -> None:
        hooks.open(asyncio.get_running_loop())
        hooks.add(read_end, lambda: None)
        hooks.repeat(lambda: None, 1.0)

    asyncio.run(main())
    hooks.close()
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("make_loop", LOOPS)
def test_waiting_for_a_descriptor_ends_when_it_is_readable_or_cancelled(make_loop: object) -> None:
    async def main() -> None:
        read_end, write_end = os.pipe()
        waiting = asyncio.create_task(until_readable(read_end))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        os.write(write_end, b"x")
        await asyncio.wait_for(until_readable(read_end), 5.0)
        assert not asyncio.get_running_loop().remove_reader(read_end)
        os.close(read_end)
        os.close(write_end)

    with asyncio.Runner(loop_factory=make_loop) as runner:  # type: ignore[arg-type]
        runner.run(main())
