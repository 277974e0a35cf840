"""Pools tokenise as the tokenizer itself does, off the event loop, and survive their workers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from frontend import tokenizer_pool
from frontend.tokenizer import load_tokenizer
from frontend.tokenizer_pool import (
    InlineTokenizer,
    ProcessWorker,
    RayWorker,
    ThreadWorker,
    TokenizerPool,
    WorkerDiedError,
    WorkerPool,
    make_tokenizer_pool,
)
from frontend.tokenizer_worker import EncodeTask, TokenizerSource
from ipc.config import ModelConfig, TokenizerPoolConfig
from ipc.errors import ConfigError, EngineGenerateError, RequestError
from tests.frontend.make_tokenizers import TINY

MODEL = ModelConfig(model=str(TINY), tokenizer_path=str(TINY))
TOKENIZER = load_tokenizer(MODEL)
SOURCE = TokenizerSource(str(TINY), "auto", False)
TEXTS = ["def f(x):", "Grüße 🙂", ""]


def make_pool(pool_type: str, size: int = 2, **extra: Any) -> TokenizerPool:
    config = TokenizerPoolConfig(pool_size=size, pool_type=pool_type, extra_config=extra)
    return make_tokenizer_pool(config, MODEL, TOKENIZER)


@pytest.fixture(scope="module")
def process_worker() -> Iterator[ProcessWorker]:
    worker = ProcessWorker(SOURCE)
    yield worker
    worker.close()


@pytest.mark.parametrize("kind", ["in line", "thread", "process"])
def test_every_pool_gives_the_tokenizers_ids(kind: str) -> None:
    pool = make_pool("thread", 0) if kind == "in line" else make_pool(kind)
    for text in TEXTS:
        for add in (True, False):
            assert pool.encode(text, add) == TOKENIZER.encode(text, add)
    ids = asyncio.run(_encode_all(pool, TEXTS * 5))
    assert ids == [TOKENIZER.encode(text) for text in TEXTS * 5]
    pool.close()
    pool.close()


async def _encode_all(pool: TokenizerPool, texts: list[str]) -> list[list[int]]:
    return list(await asyncio.gather(*(pool.encode_async(text) for text in texts)))


def test_no_pool_is_the_tokenizer_itself() -> None:
    assert isinstance(make_tokenizer_pool(None, MODEL, TOKENIZER), InlineTokenizer)


def test_the_event_loop_runs_on_while_a_pool_works() -> None:
    pool = make_pool("thread")
    text = "a quick brown fox " * 5500  # 100 000 characters

    async def longest_gap_s() -> float:
        work = asyncio.gather(*(pool.encode_async(text) for _ in range(10)))
        longest, last = 0.0, time.perf_counter()
        while not work.done():
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        await work
        return longest

    start = time.perf_counter()
    TOKENIZER.encode(text)
    one_text_s = time.perf_counter() - start
    gap_s = asyncio.run(longest_gap_s())
    pool.close()
    assert gap_s < max(0.02, 5 * one_text_s)  # in line it would be ten texts long


def test_a_killed_process_is_replaced_and_the_text_done_again() -> None:
    workers: list[ProcessWorker] = []

    def make_worker() -> ProcessWorker:
        workers.append(ProcessWorker(SOURCE))
        return workers[-1]

    pool = WorkerPool(make_worker, 1)
    assert pool.encode("before") == TOKENIZER.encode("before")
    os.kill(workers[0].pid, signal.SIGKILL)
    assert pool.encode("after") == TOKENIZER.encode("after")
    assert len(workers) == 2
    pool.close()


class DyingWorker:
    """Dies of every text."""

    num_made = 0

    def __init__(self) -> None:
        DyingWorker.num_made += 1

    def encode(self, task: EncodeTask) -> list[int]:
        raise WorkerDiedError("as always")

    def close(self) -> None:
        pass


def test_a_text_that_kills_every_worker_fails_alone() -> None:
    pool = WorkerPool(DyingWorker, 1)
    with pytest.raises(EngineGenerateError, match="4 characters killed 3 workers"):
        pool.encode("text")
    assert DyingWorker.num_made == 4
    pool.close()


def test_a_worker_is_used_by_one_thread_at_a_time() -> None:
    busy, overlaps = threading.Lock(), []

    class Worker:
        def encode(self, task: EncodeTask) -> list[int]:
            overlaps.append(not busy.acquire(blocking=False))
            busy.release()
            return [1]

        def close(self) -> None:
            pass

    pool = WorkerPool(Worker, 1)
    asyncio.run(_encode_all(pool, ["x"] * 50))
    pool.close()
    assert overlaps == [False] * 50


def test_a_closed_pool_says_so() -> None:
    pool = make_pool("thread")
    pool.close()
    with pytest.raises(EngineGenerateError, match="was closed"):
        pool.encode("x")


def test_a_worker_process_reports_texts_that_cannot_be_tokenised(
    process_worker: ProcessWorker,
) -> None:
    with pytest.raises(RequestError, match="cannot be tokenised"):
        process_worker.encode(EncodeTask("\ud800", True))
    assert process_worker.encode(EncodeTask("x", True)) == TOKENIZER.encode("x")


def test_a_worker_process_ends_with_its_pipe() -> None:
    worker = ProcessWorker(SOURCE)
    worker.encode(EncodeTask("x", True))
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_options_that_a_pool_does_not_take_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"--tokenizer-pool-extra-config.*{kind}.*num_gpus"):
        make_pool(kind, num_gpus=1)


def test_unknown_types_and_options_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tokenizer-pool-type"):
        make_pool("smoke")
    config = TokenizerPoolConfig(1, "thread", "text")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--tokenizer-pool-extra-config"):
        make_tokenizer_pool(config, MODEL, TOKENIZER)


def test_without_ray_its_pool_is_made_of_processes_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_pool, "find_spec", lambda name: None)
    pool = make_pool("ray", 1)
    assert "Ray is not installed" in caplog.text
    assert pool.encode("x") == TOKENIZER.encode("x")
    pool.close()


class ActorDiedError(Exception):
    """Stands for Ray's."""


class TaskError(Exception):
    """Stands for Ray's; holds the cause."""

    cause = ValueError("bad text")


def fake_ray(killed: list[Any]) -> ModuleType:
    """As much of Ray as the pool uses; actors are plain objects in this process."""

    class Method:
        def __init__(self, function: Any) -> None:
            self.remote = function

    class Actor:
        def __init__(self, inner: Any) -> None:
            self.encode = Method(lambda *args: lambda: inner.encode(*args))

    class ActorClass:
        def __init__(self, cls: type) -> None:
            self.cls = cls

        def options(self, **options: Any) -> "ActorClass":
            assert options == {"num_cpus": 2}
            return self

        def remote(self, *args: Any) -> Actor:
            return Actor(self.cls(*args))

    ray = ModuleType("ray")
    ray.__dict__.update(
        is_initialized=lambda: True,
        remote=ActorClass,
        get=lambda promise: promise(),
        kill=killed.append,
        exceptions=SimpleNamespace(RayActorError=ActorDiedError, RayTaskError=TaskError),
    )
    return ray


def test_with_ray_actors_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setitem(sys.modules, "ray", fake_ray(killed))
    worker = RayWorker(SOURCE, {"num_cpus": 2})
    assert worker.encode(EncodeTask("x", True)) == TOKENIZER.encode("x")
    for error, expected in ((ActorDiedError, WorkerDiedError), (TaskError, RequestError)):
        sys.modules["ray"].get = _raising(error)  # type: ignore[attr-defined]
        with pytest.raises(expected):
            worker.encode(EncodeTask("x", True))
    worker.close()
    assert len(killed) == 1


def _raising(error: type[Exception]) -> Any:
    def get(promise: Any) -> None:
        raise error()

    return get


def test_threads_share_the_engines_tokenizer() -> None:
    worker = ThreadWorker(TOKENIZER)
    assert worker.encode(EncodeTask("x", True)) == TOKENIZER.encode("x")
    worker.close()


def test_a_worker_process_keeps_its_answers_apart_from_prints() -> None:
    code = (
        "import sys; from frontend import tokenizer_worker as w; load = w.load_source\n"
        "w.load_source = lambda source: (print('noise'), load(source))[1]\n"
        "sys.exit(w.main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        from frontend.tokenizer_worker import read_frame, write_frame

        write_frame(process.stdin, SOURCE)  # type: ignore[arg-type]
        write_frame(process.stdin, EncodeTask("x", True))  # type: ignore[arg-type]
        assert read_frame(process.stdout) is not None  # type: ignore[arg-type]
        _, errors = process.communicate(timeout=30)
    assert errors == b"noise\n"
    assert process.returncode == 0
