"""A worker process: a message loop around one ``Worker``. Run as ``python -m executor``.

It reads its ``Boot`` from standard input, reports how its start goes, executes steps in the order
they arrive and answers them in that order. On a GPU a thread waits for each step's end and answers,
so the next step is launched before this one's ids have been read; the thread has a channel of its
own. Only the output rank answers steps. Whatever fails is reported, then the process ends.
"""

import contextlib
import ctypes
import gc
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn, Protocol

import msgspec

from executor.early_start import EarlyStart
from executor.failures import DEVICE_STAGE, exit_code, worker_error
from executor.step_clock import sharpen_timers
from executor.worker_process import Boot, identity_of
from ipc.channel import DealerChannel
from ipc.config import decode_config
from ipc.errors import EngineError
from ipc.failpoints import arm_worker
from ipc.messages import (
    Call,
    CallResult,
    GrammarMask,
    LoadProgress,
    SchedulerOutput,
    Shutdown,
    core_to_worker_decoder,
)
from ipc.processes import die_with
from ipc.stacks import print_stacks_when_asked

OUTPUT_RANK = 0
PAUSE_S = 0.05  # without a message for this long: do what was left for later
IDLE_S = 1.0  # for this long after that: collect garbage, once
LAST_WORDS_S = 5.0  # the parent kills us once it has read them

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc takes
_KEPT_BYTES = 2**31 - 1

Channel = DealerChannel[Any]
MakeWorker = Callable[..., Any]


class Answers(Protocol):
    """Answers launched steps, in order."""

    def put(self, step: Any) -> None:
        """Take over a launched step."""
        ...


class DirectAnswers:
    """Answers at once: for a device whose steps are done when they return."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel = channel
        self._is_sent = rank == OUTPUT_RANK

    def put(self, step: Any) -> None:
        """Read the step's result and send it."""
        output, frames = step.resolve()
        if self._is_sent:
            self._channel.send(output, frames)


class ThreadedAnswers:
    """Answers from a thread that sleeps until the device has done each step."""

    def __init__(self, rank: "Rank") -> None:
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._rank = rank
        threading.Thread(target=self._run, daemon=True, name="answers").start()

    def put(self, step: Any) -> None:
        """Hand the step to the thread."""
        self._steps.put(step)

    def _run(self) -> None:
        sharpen_timers()
        boot = self._rank.boot
        channel: Channel = DealerChannel(
            core_to_worker_decoder, identity=f"{boot.token}-answers-{boot.rank}".encode()
        )
        channel.connect(boot.address)
        answers = DirectAnswers(channel, boot.rank)
        try:
            while True:
                answers.put(self._steps.get())
        except Exception as err:
            self._rank.fail(channel, err)


class Rank:
    """Owns this process's worker, and knows how far it has come."""

    def __init__(self, boot: Boot, make_worker: MakeWorker | None) -> None:
        self.boot = boot
        self._make_worker = make_worker
        self._worker: Any = None
        self._is_ready = False

    def run(self, channel: Channel) -> None:
        """Start the worker and serve until told to end."""
        boot = self.boot
        channel.send(LoadProgress(boot.rank, "importing", 0, 1, 0.0))
        config = decode_config(boot.config)
        make_worker = self._make_worker
        early = {}
        if make_worker is None:
            early = {"early": EarlyStart(config, boot.rank)}
            make_worker = _default_worker()
        self._worker = make_worker(config, boot.rank)
        arm_worker(config.debug_config, self._worker)
        ready = self._worker.start(channel.send, boot.rendezvous, **early)
        answers: Answers = DirectAnswers(channel, boot.rank)
        if self._worker.is_asynchronous:
            answers = ThreadedAnswers(self)
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a stream is a stall: idle time is for it
        self._is_ready = True
        channel.send(ready)
        _serve(self._worker, channel, answers)

    def fail(self, channel: Channel, err: BaseException) -> NoReturn:
        """Say why this process ends, wait for the parent to hear it, and end."""
        stage = "import"
        if self._worker is not None:
            from executor.device import is_device_error

            stage = DEVICE_STAGE if is_device_error(err) else self._worker.phases.stage
        words = worker_error(self.boot.rank, stage, err)
        with contextlib.suppress(EngineError):  # the parent is gone: nobody is left to tell
            channel.send(words)
            channel.receive(LAST_WORDS_S)
        _end(exit_code(words, is_ready=self._is_ready))


def run(make_worker: MakeWorker | None = None) -> NoReturn:
    """Be a worker process until told to end.

    Args:
        make_worker: takes the place of ``executor.worker.Worker``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to decide
    boot = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Boot)
    die_with(boot.death_pipe)
    print_stacks_when_asked()
    channel: Channel = DealerChannel(
        core_to_worker_decoder, identity=identity_of(boot.token, boot.rank)
    )
    channel.connect(boot.address)
    rank = Rank(boot, make_worker)
    try:
        rank.run(channel)
    except Exception as err:
        rank.fail(channel, err)
    _end(0)


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Have torch's threads wait for each other awake for 0.3 ms, then asleep; users may differ.

    OpenMP's own limit is 20 ms. When another process takes a core for a moment, the other threads
    would burn that after each product, and a step take ten times as long.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = "5000"


def use_huge_pages(environment: MutableMapping[str, str]) -> None:
    """Have torch ask for pages of 2 MiB where it takes much at once: a CPU's weights, above all.

    A step reads them all. With small pages the processor stops reading ahead at each one's end,
    and it knows the addresses of few of them.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step instead of giving it back.

    A step frees and takes the same megabytes as the one before, and each page that comes back from
    the kernel is cleared first: a third of a prompt's time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's; others have no such thing
        mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _default_worker() -> MakeWorker:
    limit_spinning(os.environ)  # read when torch loads OpenMP
    use_huge_pages(os.environ)  # read when torch first takes memory
    keep_freed_memory()
    gc.disable()  # nothing that imports make is garbage, and looking takes a fifth of a second
    from executor.worker import Worker  # torch comes with it, and may fail to

    gc.freeze()
    gc.enable()
    return Worker


def _serve(worker: Any, channel: Channel, answers: Answers) -> None:
    """Do what arrives until ``Shutdown``; without messages do what can wait, then sleep."""
    timeout_s: float | None = PAUSE_S
    while True:
        received = channel.receive(timeout_s)
        if received is None:
            if worker.do_idle_work():
                timeout_s = 0.0  # look for a message, then go on
            elif timeout_s != IDLE_S:
                timeout_s = IDLE_S
            else:
                gc.collect()
                timeout_s = None
            continue
        timeout_s = PAUSE_S
        message, frames = received
        match message:
            case SchedulerOutput():
                answers.put(worker.execute(message, frames))
            case Call():
                channel.send(_call(worker, message))
            case Shutdown():
                return
            case GrammarMask():
                raise EngineError("grammar masks are not supported by this worker")


def _call(worker: Any, message: Call) -> CallResult:
    """Run a control operation; a refusal is an answer, anything else ends the worker."""
    try:
        result = worker.call(message.operation)
    except EngineError as err:
        kind = type(err).__name__
        return CallResult(message.call_id, error=str(err), error_kind=kind)
    return CallResult(message.call_id, msgspec.msgpack.encode(result))


def _end(code: int) -> NoReturn:
    """End without the interpreter's farewell, which with a GPU can take seconds or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
