"""Recorded steps on a GPU give the tokens of eager ones, whatever is mixed, and compile nothing."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

from executor.worker import Worker
from frontend import LLMEngine, SamplingParams
from ipc.config import DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from ipc.messages import RowParams
from ipc.operations import Sleep, WakeUp
from tests.e2e.engines import tiny_args
from tests.executor.builders import GREEDY, make_new_row, make_plan, run_steps
from tests.executor.configs import make_config
from tests.executor.models.test_families import CASES, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

TINY = Path(__file__).parents[2] / "scripts" / "demo_models" / "tiny"
RANDOM = RowParams(seed=5, temperature=1.2, top_k=60, top_p=0.98)
MIXTURES = {
    "greedy": [GREEDY] * 5,
    "random": [
        RANDOM,
        GREEDY,
        RowParams(seed=9, temperature=0.9),
        RowParams(seed=2, temperature=1.0, min_p=0.1),
    ],
    "edits and log-probabilities": [
        GREEDY,
        RowParams(seed=1, temperature=0.0, repetition_penalty=1.5, num_logprobs=2),
        RANDOM,
        RowParams(seed=3, temperature=1.0, logit_bias=[(7, 4.0)], num_logprobs=0),
        RowParams(seed=4, temperature=0.0, min_tokens=3, stop_token_ids=[5, 6]),
        RowParams(seed=4, temperature=0.0, bad_words_token_ids=[[262, 266], [15]]),
        RowParams(seed=4, temperature=0.7, allowed_token_ids=list(range(50))),
    ],
}


def model_config(path: Path, **changes: Any) -> ModelConfig:
    values = {"dtype": "float32", "max_model_len": 64, "deterministic": True} | changes
    hf_config = json.loads((path / "config.json").read_text())
    return ModelConfig(model="test", model_path=str(path), hf_config=hf_config, **values)


def make_worker(path: Path = TINY, *, record_all: bool = True, **changes: Any) -> Worker:
    """A started worker with blocks for sixteen rows; all its steps are recorded."""
    config: EngineConfig = dataclasses.replace(
        make_config("tiny", num_gpu_blocks_override=300),
        model_config=model_config(path, **changes),
        device_config=DeviceConfig("cuda"),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=512, max_num_seqs=16, max_model_len=64
        ),
    )
    worker = Worker(config, 0)
    worker.start(lambda _: None)
    while record_all and worker.do_idle_work():
        pass
    return worker


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels that are compiled inside, or would be, were they not on the disk already."""
    names: list[str] = []

    def hook(**compiled: Any) -> None:
        names.append(compiled["repr"])

    knobs.runtime.jit_post_compile_hook = hook
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = None


@pytest.fixture(scope="module")
def eager() -> Worker:
    return make_worker(enforce_eager=True)


@pytest.fixture(scope="module")
def recorded() -> Worker:
    return make_worker()


def test_an_eager_worker_records_nothing(eager: Worker, recorded: Worker) -> None:
    assert eager._runner is not None
    assert eager._runner.graphs is None
    assert recorded._runner is not None
    assert recorded._runner.graphs is not None


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("steps_in_flight", [1, 2, 4])
def test_recorded_steps_answer_as_eager_ones(
    eager: Worker, recorded: Worker, name: str, steps_in_flight: int
) -> None:
    params = MIXTURES[name]

    expected = run_steps(eager.execute, params, 1, num_decodes=12)
    with compilations() as names:
        actual = run_steps(recorded.execute, params, steps_in_flight, num_decodes=12)

    for (ids, nan_rows, logprobs), wanted in zip(actual, expected, strict=True):  # type: ignore[misc]
        assert (ids, nan_rows) == wanted[:2]  # type: ignore[index]
        for part, other in zip(logprobs, wanted[2], strict=True):  # type: ignore[index]
            assert part.row == other.row
            assert part.chosen.token_ids == other.chosen.token_ids
            assert part.chosen.logprobs == pytest.approx(other.chosen.logprobs, abs=1e-3)
    assert names == []


@pytest.mark.parametrize("num_rows", range(1, 16))
def test_padding_changes_nothing(eager: Worker, recorded: Worker, num_rows: int) -> None:
    params = [GREEDY if row % 3 else RANDOM for row in range(num_rows)]

    assert run_steps(recorded.execute, params, 2) == run_steps(eager.execute, params, 2)


@pytest.mark.parametrize("case", CASES)
def test_every_family_can_be_recorded(case: str, tmp_path: Path) -> None:
    make_model(*CASES[case]).save_pretrained(tmp_path)
    params = [GREEDY, RANDOM, GREEDY]
    found = []
    for enforce_eager in (True, False):
        worker = make_worker(tmp_path, enforce_eager=enforce_eager)
        with compilations() as names:
            found.append(run_steps(worker.execute, params, 2, num_decodes=8))
        assert names == []
    assert found[1] == found[0]


@pytest.mark.parametrize("level", [1, 2])
def test_steps_are_recorded_again_after_sleep(level: int, eager: Worker) -> None:
    worker = make_worker(record_all=False)
    params = MIXTURES["random"]
    expected = run_steps(eager.execute, params, 2)
    assert run_steps(worker.execute, params, 2) == expected

    worker.call(Sleep(level=level))
    asleep = torch.cuda.memory_allocated()
    worker.call(WakeUp())

    assert run_steps(worker.execute, params, 2) == expected
    while worker.do_idle_work():
        pass
    assert run_steps(worker.execute, params, 2) == expected
    assert asleep < torch.cuda.memory_allocated()


def test_contexts_beyond_what_is_captured_run_eagerly(eager: Worker) -> None:
    worker = make_worker(max_seq_len_to_capture=10)

    with compilations() as names:
        found = run_steps(worker.execute, [GREEDY, RANDOM], 2, num_decodes=12)

    assert found == run_steps(eager.execute, [GREEDY, RANDOM], 2, num_decodes=12)
    assert names == []


def test_a_nan_is_named_and_its_blocks_are_cleaned(recorded: Worker) -> None:
    new_rows = [make_new_row(row, [5, 6, 7]) for row in range(3)]
    recorded.execute(make_plan([0, 1, 2], [3, 3, 3], new_rows=new_rows)).resolve()
    assert recorded._runner is not None
    cache = recorded._runner._kv_cache.layers[0]
    block = new_rows[1].block_ids[0]
    cache.value[block, 1] = torch.nan

    answer = recorded.execute(make_plan([0, 1, 2])).resolve()[0]
    recorded.execute(make_plan([], freed_rows=[0, 1, 2])).resolve()

    assert answer.nan_rows == [1]
    assert cache.value[block].isfinite().all()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_an_engine_under_pressure_gives_the_tokens_of_an_eager_one(steps_in_flight: int) -> None:
    # 40 blocks of 16 for twelve requests that need up to 5 each: some are preempted.
    found = []
    for enforce_eager in (True, False):
        args = tiny_args(
            device="cuda",
            max_num_batched_tokens=128,
            max_steps_in_flight=steps_in_flight,
            num_gpu_blocks_override=40,
            max_model_len=256,
            enforce_eager=enforce_eager,
        )
        engine = LLMEngine.from_engine_args(args, enable_multiprocessing=False)
        try:
            for i in range(12):
                params = SamplingParams(
                    temperature=0.0 if i % 2 else 0.8,
                    seed=i,
                    max_tokens=40,
                    ignore_eos=True,
                    logprobs=1 if i % 5 == 0 else None,
                    repetition_penalty=1.2 if i % 4 == 3 else 1.0,
                )
                prompt = [100 + (7 * i + j) % 900 for j in range(20 + 9 * i)]
                engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
            done = {}
            with compilations() as names:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            done[output.request_id] = list(output.outputs[0].token_ids)
            assert names == []
            found.append(done)
        finally:
            engine.shutdown()
    assert len(found[0]) == 12
    assert found[1] == found[0]
