"""Processor time by role, read from /proc."""

import os
import subprocess
import sys
import threading
import time

from bench_processes import Usage, usage_by_role, used_between

BURN_S = 0.15


def burn() -> None:
    end = time.thread_time() + BURN_S
    while time.thread_time() < end:
        pass


def test_work_of_the_main_thread_and_of_others_is_told_apart() -> None:
    before = usage_by_role(os.getpid(), "me")
    burn()
    used = used_between(before, usage_by_role(os.getpid(), "me"))["me"]
    assert used.main_s >= 0.9 * BURN_S
    done, go_on = threading.Event(), threading.Event()

    def work() -> None:
        burn()
        done.set()
        go_on.wait()

    before = usage_by_role(os.getpid(), "me")
    thread = threading.Thread(target=work)
    thread.start()
    done.wait()
    used = used_between(before, usage_by_role(os.getpid(), "me"))["me"]
    go_on.set()
    thread.join()
    assert used.others_s >= 0.9 * BURN_S
    assert used.main_s < 0.5 * BURN_S
    assert used.rss_bytes > 2**20


def test_descendants_are_found_and_named_by_what_they_run() -> None:
    sleeping = [sys.executable, "-m", "timeit", "-n", "1", "-r", "1", "-s", "import time"]
    before = set(usage_by_role(os.getpid(), "me"))  # other tests may have left processes to end
    with subprocess.Popen([*sleeping, "time.sleep(9)"]) as child:
        try:
            deadline = time.monotonic() + 5
            while "timeit" not in (roles := usage_by_role(os.getpid(), "me")):
                assert time.monotonic() < deadline, roles
        finally:
            child.kill()
    assert set(roles) == before | {"me", "timeit"}


def test_a_role_that_appeared_later_counts_from_zero() -> None:
    late = {"core": Usage(1.0, 0.5, 7)}
    assert used_between({}, late) == late
