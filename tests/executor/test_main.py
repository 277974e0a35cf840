"""What a worker process settles before torch is there, and what its loop does between messages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from executor.__main__ import IDLE_S, PAUSE_S, _serve, limit_spinning, use_huge_pages
from ipc.messages import SchedulerOutput, Shutdown


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {"GOMP_SPINCOUNT": "5000"}, id="nobody cared"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}, id="a count"),
        pytest.param({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}, id="a policy"),
    ],
)
def test_threads_spin_for_a_short_time_unless_the_user_decided(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    limit_spinning(given)
    assert given == expected


HUGE_PAGES = """
import os, sys
from executor.__main__ import use_huge_pages
use_huge_pages(os.environ)
import torch
weight = torch.empty(16 << 20)
weight.fill_(1.0)
for line in open("/proc/self/smaps"):
    if "-" in line.split()[0]:
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
    elif line.startswith("AnonHugePages") and start <= weight.data_ptr() < end:
        print(int(line.split()[1]))
"""


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(),
    reason="the kernel gives no huge pages to those who ask",
)
def test_weights_are_in_huge_pages() -> None:
    kib = subprocess.check_output([sys.executable, "-c", HUGE_PAGES], text=True)

    assert int(kib) >= 2048


def test_the_user_decides_about_huge_pages() -> None:
    given = {"THP_MEM_ALLOC_ENABLE": "0"}
    use_huge_pages(given)
    assert given == {"THP_MEM_ALLOC_ENABLE": "0"}


FAULTS = """
import ctypes, resource, sys
from executor.__main__ import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(8 << 20) for _ in range(12)]
    for block in blocks:
        libc.memset(block, 1, 8 << 20)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_of_one_step_serves_the_next_without_the_kernel() -> None:
    faults = {
        way: int(subprocess.check_output([sys.executable, "-c", FAULTS, way], text=True))
        for way in ("keep", "leave")
    }

    assert faults["keep"] < 100 < faults["leave"]


class ScriptedChannel:
    """Hands out messages, None for a time-out, and notes how long it would have waited."""

    def __init__(self, *messages: object) -> None:
        self.messages = list(messages)
        self.timeouts: list[float | None] = []

    def receive(self, timeout_s: float | None) -> tuple[Any, list[Any]] | None:
        self.timeouts.append(timeout_s)
        message = self.messages.pop(0)
        return None if message is None else (message, [])


class WorkerWithIdleWork:
    """Has a few things to do while nobody waits."""

    def __init__(self, num_things: int) -> None:
        self.num_things = num_things
        self.num_steps = 0

    def do_idle_work(self) -> bool:
        self.num_things -= 1
        return self.num_things >= 0

    def execute(self, plan: SchedulerOutput, frames: object) -> None:
        self.num_steps += 1


class NoAnswers:
    """Takes steps and tells nobody."""

    def put(self, step: Any) -> None:
        pass


def test_idle_moments_are_for_what_can_wait_and_messages_come_first() -> None:
    worker = WorkerWithIdleWork(3)
    step = SchedulerOutput(step_id=0, rows=[], num_new_tokens=[])
    channel = ScriptedChannel(None, None, step, None, None, None, Shutdown())

    _serve(worker, channel, NoAnswers())  # type: ignore[arg-type]

    assert worker.num_steps == 1
    assert channel.timeouts == [PAUSE_S, 0.0, 0.0, PAUSE_S, 0.0, IDLE_S, None]
