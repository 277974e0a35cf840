"""Tokenising beside the event loop: in line, or by a pool of threads, processes or Ray actors.

A pool's workers each hold a tokenizer. A worker that dies is replaced and its text is given to
another one, so callers see ids or an error about the text, never a death.
"""

import asyncio
import contextlib
import importlib
import logging
import queue
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, Protocol

import msgspec

from frontend.tokenizer import Tokenizer
from frontend.tokenizer_worker import (
    Encoded,
    EncodeTask,
    TokenizerSource,
    load_source,
    read_frame,
    write_frame,
)
from ipc.config import ModelConfig, TokenizerPoolConfig
from ipc.errors import ConfigError, EngineGenerateError, RequestError
from ipc.processes import child_environment, python_command

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # a text that kills this many workers is itself at fault
STOP_GRACE_S = 2.0


class TokenizerPool(Protocol):
    """Turns text into ids, for synchronous callers and for an event loop."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Blocks."""

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, without holding up the event loop."""

    def close(self) -> None:
        """End the workers."""


class WorkerDiedError(Exception):
    """A worker is gone; its task may be given to another."""


class EncodeWorker(Protocol):
    """One tokenizer somewhere. Used by one thread at a time."""

    def encode(self, task: EncodeTask) -> list[int]:
        """Token ids of a text. Raises WorkerDiedError, or RequestError for the text's fault."""

    def close(self) -> None:
        """End."""


def make_tokenizer_pool(
    config: TokenizerPoolConfig | None, model_config: ModelConfig, tokenizer: Tokenizer
) -> TokenizerPool:
    """The pool that the config describes; size 0 tokenises in line with ``tokenizer``.

    Raises:
        ConfigError: the type or its options cannot work.
    """
    if config is None or config.pool_size == 0:
        return InlineTokenizer(tokenizer)
    if not isinstance(config.extra_config, dict):
        raise ConfigError(
            f"--tokenizer-pool-extra-config must be a JSON object, got {config.extra_config!r}"
        )
    source = TokenizerSource(
        directory=model_config.tokenizer_path,
        mode=model_config.tokenizer_mode,
        trust_remote_code=model_config.trust_remote_code,
    )
    make_worker = _worker_factory(config, source, tokenizer)
    return WorkerPool(make_worker, config.pool_size)


def _worker_factory(
    config: TokenizerPoolConfig, source: TokenizerSource, tokenizer: Tokenizer
) -> Callable[[], EncodeWorker]:
    kind, options = config.pool_type, config.extra_config
    if kind == "ray" and find_spec("ray") is not None:
        return lambda: RayWorker(source, options)
    if kind == "ray":
        logger.warning(
            "--tokenizer-pool-type ray: Ray is not installed (extra: ray); using processes"
        )
        return lambda: ProcessWorker(source)
    if kind not in ("process", "thread"):
        raise ConfigError(f"--tokenizer-pool-type must be ray, process or thread, got {kind!r}")
    if options:
        raise ConfigError(
            f"--tokenizer-pool-extra-config: a pool of type {kind} takes no options, "
            f"got {', '.join(options)}"
        )
    if kind == "process":
        return lambda: ProcessWorker(source)
    return lambda: ThreadWorker(tokenizer)


class InlineTokenizer:
    """No pool: the caller's thread does the work."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens)

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, at once."""
        return self._tokenizer.encode(text, add_special_tokens)

    def close(self) -> None:
        """Nothing to end."""


class WorkerPool:
    """A fixed number of workers, and as many threads that wait for them.

    A worker is either idle, in the queue, or used by exactly one thread.
    """

    def __init__(self, make_worker: Callable[[], EncodeWorker], size: int) -> None:
        """Start ``size`` workers."""
        self._make_worker = make_worker
        self._idle: queue.SimpleQueue[EncodeWorker] = queue.SimpleQueue()
        self._size = size
        self._is_closed = False
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="tokenizer")
        for _ in range(size):
            self._idle.put(make_worker())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Blocks while every worker is busy."""
        return self._submit(text, add_special_tokens).result()

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Cancelling forgets the answer."""
        return await asyncio.wrap_future(self._submit(text, add_special_tokens))

    def close(self) -> None:
        """Finish what is being done, then end the workers. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._size):
            self._idle.get().close()

    def _submit(self, text: str, add_special_tokens: bool) -> "Future[list[int]]":
        if self._is_closed:
            raise EngineGenerateError("the tokenizer pool was closed")
        return self._threads.submit(self._encode, EncodeTask(text, add_special_tokens))

    def _encode(self, task: EncodeTask) -> list[int]:
        worker = self._idle.get()
        try:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    return worker.encode(task)
                except WorkerDiedError as err:
                    logger.warning("a tokenizer worker died (%s); starting another", err)
                    worker.close()
                    worker = self._make_worker()
                    last_attempt = attempt + 1
        finally:
            self._idle.put(worker)
        raise EngineGenerateError(
            f"tokenising a text of {len(task.text)} characters killed {last_attempt} workers"
        )


class ThreadWorker:
    """The engine's own tokenizer on another thread: the library releases the GIL."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, task: EncodeTask) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(task.text, task.add_special_tokens)

    def close(self) -> None:
        """Nothing to end."""


class ProcessWorker:
    """``python -m frontend.tokenizer_worker``. It ends with its pipe, so with this process."""

    def __init__(self, source: TokenizerSource) -> None:
        self._process = subprocess.Popen(
            python_command("frontend.tokenizer_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,  # the terminal's Ctrl-C is for the user's process
        )
        self.pid = self._process.pid
        self._decoder = msgspec.msgpack.Decoder(Encoded)
        with contextlib.suppress(BrokenPipeError):  # encode will find out
            self._write(source)

    def encode(self, task: EncodeTask) -> list[int]:
        """Token ids of a text."""
        assert self._process.stdout is not None
        try:
            self._write(task)
            data = read_frame(self._process.stdout)  # type: ignore[arg-type]
        except OSError as err:
            raise WorkerDiedError(self._describe_end()) from err
        except UnicodeEncodeError as err:
            raise RequestError(f"the text cannot be tokenised: {err}", "prompt") from err
        if data is None:
            raise WorkerDiedError(self._describe_end())
        answer = self._decoder.decode(data)
        if answer.error is not None:
            raise RequestError(answer.error, "prompt")
        return answer.token_ids

    def close(self) -> None:
        """Close the pipe, and wait for the process to follow."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _write(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        write_frame(self._process.stdin, message)  # type: ignore[arg-type]

    def _describe_end(self) -> str:
        try:
            return f"pid {self.pid}, exit code {self._process.wait(STOP_GRACE_S)}"
        except subprocess.TimeoutExpired:
            return f"pid {self.pid} closed its pipe"


class RayActor:
    """What a Ray actor runs. Built on the actor's host, which must have the same directory."""

    def __init__(self, source: bytes) -> None:
        self._tokenizer = load_source(msgspec.msgpack.decode(source, type=TokenizerSource))

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens)


class RayWorker:
    """A Ray actor. ``options`` are Ray's own: resources, runtime environment and so on."""

    def __init__(self, source: TokenizerSource, options: dict[str, Any]) -> None:
        self._ray = importlib.import_module("ray")
        if not self._ray.is_initialized():
            self._ray.init(ignore_reinit_error=True)
        actor_class = self._ray.remote(RayActor).options(**({"num_cpus": 0} | options))
        self._actor = actor_class.remote(msgspec.msgpack.encode(source))

    def encode(self, task: EncodeTask) -> list[int]:
        """Token ids of a text."""
        exceptions = self._ray.exceptions
        try:
            ids = self._ray.get(self._actor.encode.remote(task.text, task.add_special_tokens))
        except exceptions.RayActorError as err:
            raise WorkerDiedError(str(err)) from err
        except exceptions.RayTaskError as err:
            raise RequestError(f"the text cannot be tokenised: {err.cause}", "prompt") from err
        return list(ids)

    def close(self) -> None:
        """End the actor."""
        self._ray.kill(self._actor)
