"""The worker on a GPU: same tokens as on the CPU, steps in flight, swapping, sleep, memory."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from executor.attention_metadata import KVCacheSpec
from executor.kv_cache import KVCache
from executor.multiproc import MultiprocExecutor
from executor.request_states import RowTable
from executor.transfer import upload_all
from executor.weights import move_weights
from executor.worker import CONTEXT_BYTES, Worker
from ipc.config import DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from ipc.messages import RowParams
from ipc.operations import Sleep, WakeUp
from tests.executor.builders import GREEDY, make_new_row, make_plan
from tests.executor.configs import make_config

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TINY = ROOT / "scripts" / "demo_models" / "tiny"
CASES = json.loads((ROOT / "tests" / "expected.json").read_text())["base"]


def make_gpu_config(device: str = "cuda", **cache: object) -> EngineConfig:
    model = ModelConfig(
        model="tiny",
        model_path=str(TINY),
        hf_config=json.loads((TINY / "config.json").read_text()),
        dtype="float32",
        max_model_len=64,
        deterministic=True,
    )
    return dataclasses.replace(
        make_config("tiny", **cache),
        model_config=model,
        device_config=DeviceConfig(device),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=512, max_num_seqs=16, max_model_len=64
        ),
    )


def make_worker(device: str = "cuda", **cache: object) -> Worker:
    cache.setdefault("num_gpu_blocks_override", 300)
    worker = Worker(make_gpu_config(device, **cache), 0)
    worker.start(lambda _: None)
    return worker


def generate(worker: Worker, params: RowParams = GREEDY, num_tokens: int = 32) -> list[list[int]]:
    """All prompts together, with two steps in flight throughout."""
    prompts = [case["prompt_ids"] for case in CASES]
    rows = list(range(len(prompts)))
    new_rows = [make_new_row(row, prompt, params=params) for row, prompt in enumerate(prompts)]
    steps = [worker.execute(make_plan(rows, [len(p) for p in prompts], new_rows=new_rows))]
    answers = []
    for _ in range(num_tokens - 1):
        steps.append(worker.execute(make_plan(rows)))
        answers.append(steps.pop(0).resolve()[0])
    answers.append(steps.pop(0).resolve()[0])
    worker.execute(make_plan([], freed_rows=rows)).resolve()
    assert all(answer.device_time_s > 0 for answer in answers)
    return [list(tokens) for tokens in zip(*(a.sampled_token_ids for a in answers), strict=True)]


def test_greedy_tokens_equal_hugging_faces() -> None:
    assert generate(make_worker()) == [case["ids"] for case in CASES]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(RowParams(seed=7, temperature=0.8, top_k=40, top_p=0.9), id="filtered"),
        pytest.param(RowParams(seed=7, temperature=1.0, min_p=0.02), id="min-p"),
        pytest.param(
            RowParams(
                seed=7,
                temperature=0.0,
                repetition_penalty=1.3,
                frequency_penalty=0.2,
                logit_bias=[(266, 2.0)],
                bad_words_token_ids=[[262, 266], [15]],
                min_tokens=32,
                stop_token_ids=[202],
            ),
            id="edited",
        ),
    ],
)
def test_sampled_tokens_equal_those_of_the_cpu(params: RowParams) -> None:
    # Two starts of the same float32 arithmetic: a token may only differ where two are near-equal.
    on_gpu, on_cpu = (generate(make_worker(device), params, 16) for device in ("cuda", "cpu"))

    same = sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True))
    assert same >= len(CASES) - 1


def test_logprobs_equal_those_of_the_cpu() -> None:
    params = RowParams(seed=0, temperature=0.0, num_logprobs=3, num_prompt_logprobs=2)
    found = []
    for device in ("cuda", "cpu"):
        worker = make_worker(device)
        prompt = CASES[0]["prompt_ids"]
        plan = make_plan([0], [len(prompt)], new_rows=[make_new_row(0, prompt, params=params)])
        (part,) = worker.execute(plan).resolve()[0].logprobs
        assert part.chosen is not None
        assert part.prompt is not None
        found.append([*part.prompt, part.chosen])

    for gpu, cpu in zip(*found, strict=True):
        assert gpu.token_ids == cpu.token_ids
        assert gpu.logprobs == pytest.approx(cpu.logprobs, abs=1e-3)


@pytest.mark.parametrize("level", [1, 2])
def test_a_worker_gives_its_memory_back_while_asleep(level: int) -> None:
    worker = make_worker()
    awake = torch.cuda.memory_reserved()
    expected = generate(worker)

    worker.call(Sleep(level=level))
    asleep = torch.cuda.memory_allocated()
    worker.call(WakeUp())

    assert asleep < awake / 4 + 66 * 2**20  # cuBLAS keeps a workspace for each of two streams
    assert generate(worker) == expected


def test_total_use_stays_within_the_share() -> None:
    free_before, total = torch.cuda.mem_get_info()
    config = make_gpu_config(gpu_memory_utilization=0.3)
    worker = Worker(config, 0)

    ready = worker.start(lambda _: None)

    used = free_before - torch.cuda.mem_get_info()[0] + CONTEXT_BYTES
    assert used <= 0.32 * total
    assert ready.kv_cache_bytes >= 0.25 * total


def test_worker_processes_run_steps_on_a_gpu() -> None:
    executor = MultiprocExecutor(make_gpu_config(num_gpu_blocks_override=300))
    executor.start(lambda _: None)
    try:
        prompt, expected = CASES[0]["prompt_ids"], CASES[0]["ids"]
        executor.submit(make_plan([0], [len(prompt)], new_rows=[make_new_row(0, prompt)]))
        tokens = []
        for _ in range(32):
            executor.submit(make_plan([0]))
            answer = executor.receive(60)
            assert answer is not None
            tokens += answer[0].sampled_token_ids
        assert tokens == expected
    finally:
        executor.shutdown()


def test_blocks_survive_the_swap_pool() -> None:
    specs = [KVCacheSpec(2, 64)] * 3
    cache = KVCache(
        specs,
        num_blocks=40,
        num_swap_blocks=20,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
    before = [layer.key[3:9].clone() for layer in cache.layers]

    cache.swap_out([(3 + i, 2 * i) for i in range(6)])
    for layer in cache.layers:
        layer.key[3:9] = 0
    cache.swap_in([(2 * i, 20 + i) for i in range(6)])
    cache.copy_blocks([(20 + i, 3 + i) for i in range(6)])

    for layer, wanted in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.key[3:9], wanted)


def test_writes_to_a_table_travel_together() -> None:
    table = RowTable(4, 8, torch.device("cuda"))
    table.write(1, 2, [5, 6])
    table.write(3, 0, [7])
    assert not table.tensor.any()

    table.flush()

    assert table.tensor.nonzero().tolist() == [[1, 2], [1, 3], [3, 0]]


def test_vectors_of_several_types_travel_as_one() -> None:
    arrays = [np.arange(3), np.arange(5, dtype=np.int32), np.array([0.5], dtype=np.float32)]

    tensors = upload_all(arrays, torch.device("cuda"))

    assert [t.tolist() for t in tensors] == [a.tolist() for a in arrays]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def test_weights_move_with_what_they_share() -> None:
    model = nn.Module()
    model.a, model.b = (nn.Linear(2, 2, bias=False, device="cuda") for _ in range(2))
    model.b.weight.data = model.a.weight.data  # two parameters, one memory
    parameters = list(model.parameters())
    values = parameters[0].tolist()

    move_weights(model, torch.device("cpu"))  # type: ignore[arg-type]
    assert parameters[0].data.is_set_to(parameters[1].data)
    assert parameters[0].is_pinned()
    move_weights(model, torch.device("cuda"))  # type: ignore[arg-type]

    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert parameters[0].is_cuda
    assert parameters[0].data.is_set_to(parameters[1].data)
    assert parameters[1].tolist() == values
