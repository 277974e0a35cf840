"""Hostile frames on every socket of a running engine, while 16 streams must not notice.

The attacker is another process of the same user: it finds the sockets by itself, speaks the wire's
language well enough to be dangerous, and mutates real messages as well as sending noise.
"""

import asyncio
import multiprocessing
import random
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil
import zmq

from frontend import AsyncLLM
from ipc.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    Ack,
    AddRequest,
    Call,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    LoadProgress,
    ModelRunnerOutput,
    ProcessedLogits,
    SchedulerOutput,
    Shutdown,
    WorkerError,
    encoder,
    schema_hash,
)
from ipc.operations import ResetPrefixCache
from ipc.records import TensorRef
from ipc.sampling_params import SamplingParams
from tests.e2e.engines import Expected, greedy, load_expected, tiny_args

MAX_RSS_GROWTH_BYTES = 64 * 2**20
NUM_STREAMS = 16


def fuzz(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Send so many hostile messages to each socket; every stream must give the right tokens."""
    return asyncio.run(_fuzz(num_inputs, seed))


async def _fuzz(num_inputs: int, seed: int) -> dict[str, int]:
    engine = AsyncLLM.from_engine_args(tiny_args())
    try:
        await run_streams(engine, -1)
        children = psutil.Process().children(recursive=True)
        paths = sockets_of(children)
        assert paths, "found no socket of the engine"
        pids = {child.pid for child in children}
        rss_before = sum(child.memory_info().rss for child in children)
        spawn = multiprocessing.get_context("spawn")
        attacker = spawn.Process(target=attack, args=(paths, num_inputs, seed))
        attacker.start()
        num_rounds = 0
        while attacker.is_alive() or num_rounds == 0:
            await run_streams(engine, num_rounds)
            num_rounds += 1
        attacker.join()
        assert attacker.exitcode == 0, "the attacker failed"
        await run_streams(engine, num_rounds)
        now = {child.pid for child in psutil.Process().children(recursive=True)}
        assert pids <= now, "a process of the engine is gone"
        growth = sum(child.memory_info().rss for child in children) - rss_before
        assert growth <= MAX_RSS_GROWTH_BYTES, f"the engine grew by {growth >> 20} MiB"
    finally:
        engine.shutdown()
    return {"sockets": len(paths), "messages": num_inputs * len(paths), "rounds": num_rounds}


def sockets_of(processes: Iterable[psutil.Process]) -> list[str]:
    """Where these processes listen; other engines on the machine are nobody's target."""
    own = {c.laddr for p in processes for c in p.net_connections("unix") if c.laddr}
    return sorted(own & set(listening_paths()))


async def run_streams(engine: AsyncLLM, number: int) -> None:
    """16 greedy streams at once, each compared with the oracle."""

    async def read(i: int, case: Expected) -> None:
        last = None
        name = f"{number}-{i}"
        async for output in engine.generate({"prompt_token_ids": case.prompt_ids}, greedy(), name):
            last = output
        assert last is not None
        assert list(last.outputs[0].token_ids) == case.ids, case.prompt

    cases = load_expected()
    await asyncio.gather(*(read(i, cases[i % len(cases)]) for i in range(NUM_STREAMS)))


def listening_paths() -> list[str]:
    """Every listening unix socket of this machine that has a path."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [f[7] for f in fields if len(f) > 7 and f[3] == "00010000" and f[7].startswith("/")]


def attack(paths: list[str], num_inputs: int, seed: int) -> None:
    """Send hostile messages to every socket in turn, under changing identities."""
    rng = random.Random(seed)
    samples = real_messages()
    context = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []
    try:
        for i in range(num_inputs):
            if i % 50 == 0:  # a fresh identity, since a malformed peer is cut off after 100
                for socket in sockets:
                    socket.close(linger=2000)
                sockets = [context.socket(zmq.DEALER) for _ in paths]
                for socket, path in zip(sockets, paths, strict=True):
                    socket.sndhwm = 100
                    socket.connect(f"ipc://{path}")
            for socket in sockets:
                try:
                    socket.send_multipart(hostile_parts(rng, samples), zmq.NOBLOCK)
                except zmq.Again:
                    time.sleep(0.001)  # the engine is busy: that is its right
    finally:
        for socket in sockets:
            socket.close(linger=2000)
        context.term()


def hostile_parts(rng: random.Random, samples: list[bytes]) -> list[bytes]:
    """One multipart message: noise, a mutated message, or a sound one from the wrong mouth."""
    choice = rng.random()
    if choice < 0.15:
        header = rng.randbytes(rng.randrange(200))
    elif choice < 0.25:
        header = msgspec.msgpack.encode(msgspec.msgpack.Ext(rng.randrange(128), rng.randbytes(30)))
    elif choice < 0.3:
        header = b"\x91" * rng.randrange(1, 5000) + b"\x00"
    else:
        header = bytearray(rng.choice(samples))
        for _ in range(rng.randrange(0, 4)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        if rng.random() < 0.2:
            header = header[: rng.randrange(len(header) + 1)]
    frames = [rng.randbytes(rng.randrange(64)) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    return [bytes(header), *frames]


def real_messages() -> list[bytes]:
    """A sound sample of nearly every message, of every wire and direction."""
    params = SamplingParams(seed=1, max_tokens=2)
    return [
        encoder.encode(message)
        for message in (
            Hello(PROTOCOL_VERSION, schema_hash(), "stranger", 1),
            Hello(PROTOCOL_VERSION + 1, "0000", "stranger", 1),
            AddRequest("stranger", [5, 6, 7], params, 0.0),
            AddRequest("stranger", [2**31 - 1], params, 0.0, eos_token_ids=[-1]),
            AbortRequests(["0-0", "0-1"]),
            Ack(2**62),
            ProcessedLogits("0-0", 0, 3, TensorRef(0, "float32", [8192])),
            Heartbeat(1.0),
            Goodbye(),
            Call(1, ResetPrefixCache()),
            LoadProgress(0, "loading weights", 1, 2, 0.5),
            ModelRunnerOutput(1, [1, 2, 3]),
            WorkerError(0, "step", "RuntimeError: not really", ""),
            SchedulerOutput(1, [0], [1]),
            Shutdown(),
        )
    ] + [msgspec.msgpack.encode([FinishReason.STOP, None, {"a": [1]}])]
