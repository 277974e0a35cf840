"""Worker processes: steps, control, every kind of death, and nothing left behind."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import pytest

from executor import multiproc
from executor.multiproc import MultiprocExecutor
from ipc.channel import wait
from ipc.config import EngineConfig
from ipc.errors import EngineDeadError, RequestError
from ipc.messages import LoadProgress, ModelRunnerOutput, RowParams, SampleRow
from ipc.operations import CheckWorkers, StopProfile
from ipc.tensors import Frames, FrameWriter, read
from tests.executor.builders import make_new_row, make_plan
from tests.executor.configs import VOCAB_SIZE, make_config
from tests.executor.fake_model import next_token
from tests.executor.fake_worker import ENDLESS_TOKEN, FAILING_TOKEN

FAKE = "tests.executor.fake_worker"


@contextlib.contextmanager
def started(config: EngineConfig | None = None) -> Iterator[MultiprocExecutor]:
    """A running executor with the fake model; afterwards no process of it may be left."""
    executor = MultiprocExecutor(config or make_config(), FAKE)
    executor.start(lambda _: None)
    pids = executor.pids
    try:
        yield executor
    finally:
        executor.shutdown()
        assert not any(psutil.pid_exists(pid) for pid in pids)


def wait_for_death(executor: MultiprocExecutor, within_s: float = 1.0) -> EngineDeadError:
    """The error that ``receive`` raises, which must come in time."""
    start_s = time.monotonic()
    with pytest.raises(EngineDeadError) as caught:
        executor.receive(30)
    assert time.monotonic() - start_s < within_s
    with pytest.raises(EngineDeadError):
        executor.check_health()
    return caught.value


def answer_of(executor: MultiprocExecutor) -> tuple[ModelRunnerOutput, Frames]:
    """The next answer, which must come."""
    answer = executor.receive(30)
    assert answer is not None
    return answer


def test_a_start_reports_progress_and_readiness() -> None:
    progress: list[LoadProgress] = []
    executor = MultiprocExecutor(make_config(), FAKE)

    ready = executor.start(progress.append)
    executor.shutdown()

    assert (ready.vocab_size, ready.model_digest) == (VOCAB_SIZE, "fake")
    assert ready.pid == executor.pids[0]
    assert set(ready.phases_s) == {"device", "loading weights", "memory", "warming up"}
    assert progress[0].phase == "importing"
    assert {"loading weights", "warming up"} <= {part.phase for part in progress}
    assert not psutil.pid_exists(ready.pid)
    executor.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        executor.submit(make_plan([0]))


def test_steps_logits_and_control_operations_cross_the_process_border() -> None:
    with started() as executor:
        assert executor.receive(0) is None
        processed = RowParams(seed=0, temperature=0.0, has_logits_processors=True)
        new_rows = [make_new_row(0, [1, 2]), make_new_row(1, [3, 4], params=processed)]
        executor.submit(make_plan([0, 1], [2, 2], new_rows=new_rows))
        executor.submit(make_plan([0]))  # two in flight
        (output, frames), (second, _) = answer_of(executor), answer_of(executor)
        first = next_token([1, 2])
        assert output.sampled_token_ids == [first]
        assert second.sampled_token_ids == [next_token([1, 2, first])]

        row, ref = output.logits_rows[0]
        logits = np.frombuffer(read(ref, frames), np.float32).copy()
        assert (row, int(logits.argmax())) == (1, next_token([3, 4]))
        logits[5] = 1000.0
        writer = FrameWriter()
        sample_rows = [SampleRow(1, writer.add(logits, "float32", [VOCAB_SIZE]))]
        executor.submit(make_plan([], sample_rows=sample_rows), writer.frames)
        assert wait(executor.channels, 30), "an answer wakes whoever waits for the channels"
        assert answer_of(executor)[0].sampled_token_ids == [5]

        os.kill(executor.pids[0], signal.SIGINT)  # a Ctrl-C in the terminal: ours to decide
        with pytest.raises(RequestError, match="no profile is running"):
            executor.call(StopProfile())
        (life,) = executor.call(CheckWorkers())
        assert (life.rank, life.pid, life.num_steps) == (0, executor.pids[0], 3)


def test_a_death_in_the_middle_of_a_step_is_told_at_once() -> None:
    with started() as executor:
        executor.submit(make_plan([0], [1], new_rows=[make_new_row(0, [ENDLESS_TOKEN])]))
        assert executor.receive(0.2) is None
        os.kill(executor.pids[0], signal.SIGKILL)

        assert "was killed by SIGKILL" in str(wait_for_death(executor))
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            executor.call(CheckWorkers())


def test_a_stopped_worker_is_named_and_ended() -> None:
    config = make_config()
    parallel = replace(config.parallel_config, iteration_timeout_s=0.3)
    with started(replace(config, parallel_config=parallel)) as executor:
        os.kill(executor.pids[0], signal.SIGSTOP)
        executor.submit(make_plan([0], [1], new_rows=[make_new_row(0, [1])]))

        text = str(wait_for_death(executor, within_s=3.0))
        assert f"worker 0 (process {executor.pids[0]}) seems stopped" in text
        assert "--engine-iteration-timeout" in text


def test_a_call_that_nobody_answers_does_not_wait_for_ever() -> None:
    config = make_config()
    parallel = replace(config.parallel_config, iteration_timeout_s=0.3)
    with started(replace(config, parallel_config=parallel)) as executor:
        os.kill(executor.pids[0], signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"worker 0 .* seems stopped"):
            executor.call(CheckWorkers())


def test_a_failing_step_carries_its_cause() -> None:
    with started() as executor:
        executor.submit(make_plan([0], [1], new_rows=[make_new_row(0, [FAILING_TOKEN])]))

        text = str(wait_for_death(executor))
        assert "stage 'step': RuntimeError: the fake model was told to fail" in text


def test_a_worker_that_hangs_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiproc, "SHUTDOWN_S", 0.2)
    with started() as executor:
        os.kill(executor.pids[0], signal.SIGSTOP)


def test_two_workers_live_and_die_together(capfd: pytest.CaptureFixture[str]) -> None:
    with started(make_config(num_workers=2)) as executor:
        executor.submit(make_plan([0], [2], new_rows=[make_new_row(0, [1, 2])]))
        answer = executor.receive(30)
        assert answer is not None
        assert answer[0].sampled_token_ids == [next_token([1, 2])]
        assert executor.receive(0.1) is None, "only the output rank answers"
        assert [life.rank for life in executor.call(CheckWorkers())] == [0, 1]

        os.kill(executor.pids[1], signal.SIGKILL)
        assert "worker 1 was killed by SIGKILL" in str(wait_for_death(executor))
        assert not any(psutil.pid_exists(pid) for pid in executor.pids)
