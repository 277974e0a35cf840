"""A worker with the bundled model, and what it reports. CPU only."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from executor import device as device_module
from executor.device import host_memory, set_up_device, usable_cores
from executor.failures import dead_error, exit_code, start_error, worker_error
from executor.worker import Worker
from ipc.config import EngineConfig, ModelConfig, SchedulerConfig
from ipc.errors import (
    ConfigError,
    DeviceDeadError,
    DeviceStartError,
    EngineDeadError,
    EngineStartError,
    ExitCode,
)
from ipc.messages import LoadProgress
from ipc.operations import StartProfile, StopProfile
from tests.executor.builders import GREEDY, make_new_row, make_plan
from tests.executor.configs import make_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "scripts" / "demo_models" / "tiny"
EXPECTED = json.loads((ROOT / "tests" / "expected.json").read_text())


def make_tiny_config(**cache: object) -> EngineConfig:
    config = make_config("tiny", **cache)
    model = ModelConfig(
        model="tiny",
        model_path=str(TINY),
        hf_config=json.loads((TINY / "config.json").read_text()),
        dtype="float32",
        max_model_len=64,
        deterministic=True,
    )
    scheduler = SchedulerConfig(max_num_batched_tokens=512, max_num_seqs=16, max_model_len=64)
    return dataclasses.replace(config, model_config=model, scheduler_config=scheduler)


@pytest.mark.parametrize("chunk", [pytest.param(512, id="whole"), pytest.param(5, id="chunked")])
def test_the_bundled_model_continues_as_hugging_face_does(chunk: int) -> None:
    worker = Worker(make_tiny_config(), 0)
    ready = worker.start(lambda _: None)
    assert ready.vocab_size == 8192
    cases = EXPECTED["base"]
    prompts = [case["prompt_ids"] for case in cases]
    outputs: list[list[int]] = [[] for _ in prompts]
    new_rows = [
        make_new_row(row, prompt, block_ids=list(range(1 + 8 * row, 9 + 8 * row)), params=GREEDY)
        for row, prompt in enumerate(prompts)
    ]
    left = [len(prompt) for prompt in prompts]
    while any(left):
        rows = [row for row, count in enumerate(left) if count]
        counts = [min(chunk, left[row]) for row in rows]
        for row, count in zip(rows, counts, strict=True):
            left[row] -= count
        answer, _ = worker.execute(make_plan(rows, counts, new_rows=new_rows)).resolve()
        new_rows = []
        ended = [row for row in rows if not left[row]]
        for row, token_id in zip(ended, answer.sampled_token_ids, strict=True):
            outputs[row].append(token_id)
    while pending := [row for row, output in enumerate(outputs) if len(output) < 32]:
        answer, _ = worker.execute(make_plan(pending)).resolve()
        for row, token_id in zip(pending, answer.sampled_token_ids, strict=True):
            outputs[row].append(token_id)

    assert outputs == [case["ids"] for case in cases]


def test_a_start_tells_its_phases_and_what_it_took() -> None:
    progress: list[LoadProgress] = []

    ready = Worker(make_tiny_config(num_gpu_blocks_override=20), 0).start(progress.append)

    assert list(ready.phases_s) == ["device", "loading weights", "memory", "warming up"]
    assert [part.phase for part in progress if part.done == 0] == list(ready.phases_s)
    loading = [part for part in progress if part.phase == "loading weights"]
    assert loading[-1].done == loading[-1].total > 1
    assert ready.num_gpu_blocks == 20
    assert ready.kv_cache_bytes == 20 * 8 * 7 * 2 * 2 * 64 * 4  # slots, layers, K and V, heads, D
    assert ready.weights_bytes > 14_000_000 * 4


def test_a_missing_checkpoint_is_named() -> None:
    config = make_tiny_config()
    model = dataclasses.replace(config.model_config, model_path="/nonexistent/model")
    worker = Worker(dataclasses.replace(config, model_config=model), 0)

    with pytest.raises((ConfigError, EngineStartError), match="/nonexistent/model"):
        worker.start(lambda _: None)

    assert worker.phases.stage == "loading weights"


def test_a_cut_checkpoint_is_named(tmp_path: Path) -> None:
    for source in TINY.iterdir():
        data = source.read_bytes()
        is_weights = source.suffix == ".safetensors"
        (tmp_path / source.name).write_bytes(data[: len(data) // 2] if is_weights else data)
    config = make_tiny_config()
    model = dataclasses.replace(config.model_config, model_path=str(tmp_path))
    worker = Worker(dataclasses.replace(config, model_config=model), 0)

    with pytest.raises(EngineStartError, match=r"model-0000\d-of-00002\.safetensors"):
        worker.start(lambda _: None)


def test_a_profile_becomes_a_trace_file(tmp_path: Path) -> None:
    worker = Worker(make_tiny_config(), 0)
    worker.start(lambda _: None)
    worker.call(StartProfile(directory=str(tmp_path / "traces")))
    worker.execute(make_plan([0], [2], new_rows=[make_new_row(0, [5, 6])])).resolve()

    (path,) = worker.call(StopProfile())  # type: ignore[misc]

    trace = json.loads(Path(path).read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device must be cuda or cpu"):
        set_up_device("tpu", 0, threads=None, deterministic=False)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="worker 3 needs a GPU of its own"):
            set_up_device("cuda", 3, threads=None, deterministic=False)


def test_a_containers_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    cores, (total, available) = usable_cores(), host_memory()
    assert available < total

    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_cores() == cores
    assert host_memory()[0] == total

    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert usable_cores() == 1
    assert host_memory() == (1_000_000, 600_000)


@pytest.mark.parametrize(
    ("stage", "cause", "at_start", "while_running", "code"),
    [
        pytest.param(
            "loading weights",
            FileNotFoundError("no file"),
            EngineStartError,
            EngineDeadError,
            ExitCode.START_FAILED,
            id="any failure",
        ),
        pytest.param(
            "memory",
            ConfigError("too small"),
            ConfigError,
            EngineDeadError,
            ExitCode.CONFIG,
            id="a wrong value",
        ),
        pytest.param(
            "device",
            RuntimeError("CUDA error: unspecified launch failure"),
            DeviceStartError,
            DeviceDeadError,
            ExitCode.DEVICE_UNUSABLE,
            id="the device",
        ),
    ],
)
def test_last_words_become_the_right_error(
    stage: str, cause: Exception, at_start: type, while_running: type, code: ExitCode
) -> None:
    words = worker_error(3, stage, cause)

    assert type(start_error(words)) is at_start
    assert type(dead_error(words)) is while_running
    assert str(cause) in str(start_error(words))
    assert exit_code(words, is_ready=False) is code
    assert "worker 3" in str(dead_error(words))
