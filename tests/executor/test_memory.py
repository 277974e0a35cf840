"""How many blocks fit, in numbers that can be checked by hand."""

import dataclasses
import logging

import pytest

from executor.memory import (
    GIB,
    DeviceMemory,
    Need,
    activation_bytes,
    check_swap_space,
    graph_temporaries_bytes,
    plan_cpu_blocks,
    plan_gpu_blocks,
    plan_swap_blocks,
)
from executor.model_config import ModelShape
from ipc.config import CacheConfig
from ipc.errors import ConfigError
from tests.executor.configs import HF_CONFIG

MIB = 2**20


def make_need(**changes: int) -> Need:
    """Blocks of 1 MiB; a request of the greatest length takes 8 of them."""
    need = Need(block_bytes=MIB, block_size=16, max_model_len=128, max_num_seqs=4)
    return dataclasses.replace(need, **changes)


def make_memory(**changes: int) -> DeviceMemory:
    memory = DeviceMemory(
        total=80 * GIB, free=60 * GIB, weights=16 * GIB, activations=2 * GIB, other=1 * GIB
    )
    return dataclasses.replace(memory, **changes)


def test_a_gpu_gives_the_cache_what_the_share_leaves() -> None:
    num_blocks = plan_gpu_blocks(
        make_memory(), CacheConfig(gpu_memory_utilization=0.5), make_need()
    )

    assert num_blocks == (40 - 16 - 2 - 1) * 1024


def test_recorded_steps_come_out_of_the_share() -> None:
    config = CacheConfig(gpu_memory_utilization=0.5)

    plain, recorded = (
        plan_gpu_blocks(make_memory(graphs=size * GIB), config, make_need()) for size in (0, 3)
    )
    crowded = plan_gpu_blocks(make_memory(free=30 * GIB, graphs=3 * GIB), config, make_need())

    assert plain - recorded == 3 * 1024
    assert crowded == min(recorded, (30 - 2 - 3) * 1024)
    with pytest.raises(ConfigError, match=r"recorded steps +30\.00 GiB"):
        plan_gpu_blocks(make_memory(graphs=30 * GIB), config, make_need())


def test_temporaries_of_recorded_steps_grow_with_tokens_and_with_logits() -> None:
    shape = ModelShape.from_hf(HF_CONFIG, max_model_len=64)
    sizes = {"tp_size": 1, "max_tokens": 512, "max_requests": 4, "item_size": 2}

    few, tokens, requests = (
        graph_temporaries_bytes(shape, **(sizes | changes))
        for changes in ({}, {"max_tokens": 50_000}, {"max_requests": 50_000})
    )

    assert tokens > few + 49_000 * 8 * shape.hidden_size
    assert requests > few + 49_000 * 6 * shape.vocab_size


def test_two_instances_share_a_gpu_and_none_takes_what_is_not_free() -> None:
    crowded = make_memory(free=30 * GIB)

    num_blocks = plan_gpu_blocks(crowded, CacheConfig(gpu_memory_utilization=0.9), make_need())

    assert num_blocks == (30 - 2) * 1024


def test_a_gpu_without_room_says_where_the_memory_went() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_gpu_blocks(make_memory(), CacheConfig(gpu_memory_utilization=0.2), make_need())

    text = str(caught.value)
    for part in ("weights", "16.00 GiB", "activations", "2.00 GiB", "--gpu-memory-utilization 0.2"):
        assert part in text
    assert "--max-model-len 128" in text


@pytest.mark.parametrize(
    ("blocks", "fits"),
    [pytest.param(9, True, id="eight and the null block"), pytest.param(8, False, id="one less")],
)
def test_one_request_of_the_greatest_length_must_fit(blocks: int, fits: bool) -> None:
    config = CacheConfig(cpu_kv_cache_space=blocks / 1024)

    if fits:
        assert plan_cpu_blocks(64 * GIB, config, make_need()) == blocks
    else:
        with pytest.raises(ConfigError, match=r"needs 0\.01 GiB of KV cache"):
            plan_cpu_blocks(64 * GIB, config, make_need())


@pytest.mark.parametrize(
    ("available_gib", "space_gib", "expected"),
    [
        pytest.param(64, None, 4096, id="at most 4 GiB"),
        pytest.param(4, None, 1024, id="a quarter of a small machine"),
        pytest.param(4, 2.0, 2048, id="the flag overrules both"),
    ],
)
def test_a_cpu_cache_is_bounded(available_gib: int, space_gib: float | None, expected: int) -> None:
    need = make_need(max_num_seqs=10_000)

    config = CacheConfig(cpu_kv_cache_space=space_gib)

    assert plan_cpu_blocks(available_gib * GIB, config, need) == expected


def test_a_cpu_cache_takes_no_more_than_requests_can_use() -> None:
    assert plan_cpu_blocks(64 * GIB, CacheConfig(), make_need()) == 4 * 8 + 1


def test_lookahead_slots_count() -> None:
    assert make_need(num_lookahead_slots=1).blocks_per_request == 9


@pytest.mark.parametrize("plan", [plan_gpu_blocks, plan_cpu_blocks])
def test_the_override_is_exact_and_warns_when_it_is_short(
    plan: object, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_memory() if plan is plan_gpu_blocks else 64 * GIB

    with caplog.at_level(logging.WARNING):
        num_blocks = plan(source, CacheConfig(num_gpu_blocks_override=5), make_need())  # type: ignore[operator]

    assert num_blocks == 5
    assert "holds 64 tokens, fewer than --max-model-len 128" in caplog.text


@pytest.mark.parametrize(
    ("swap_gib", "workers", "outcome"),
    [
        pytest.param(8.0, 1, "refused", id="80 % of the host"),
        pytest.param(4.0, 2, "refused", id="the default, twice"),
        pytest.param(5.0, 1, "warned", id="half"),
        pytest.param(0.0, 1, "fine", id="none"),
        pytest.param(4.0, 1, "fine", id="the default never fails"),
    ],
)
def test_swap_space_against_the_hosts_memory(
    swap_gib: float, workers: int, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        if outcome == "refused":
            with pytest.raises(ConfigError, match=r"--swap-space .* 80%"):
                check_swap_space(swap_gib, num_workers=workers, host_bytes=10 * GIB)
        else:
            check_swap_space(swap_gib, num_workers=workers, host_bytes=10 * GIB)

    assert ("--swap-space" in caplog.text) is (outcome == "warned")


def test_the_swap_pool_is_bounded_by_the_flag_the_host_and_its_use() -> None:
    need = make_need()

    def plan(swap_gib: float, host_gib: int, num_gpu_blocks: int = 100_000) -> int:
        return plan_swap_blocks(
            swap_gib, need, host_bytes=host_gib * GIB, num_gpu_blocks=num_gpu_blocks
        )

    assert plan(4.0, 64) == 4096
    assert plan(4.0, 1) == 1024
    assert plan(0.0, 64) == 0
    assert plan(4.0, 64, num_gpu_blocks=10) == need.useful_blocks


def test_the_activation_peak_grows_with_tokens_rows_and_vocabulary() -> None:
    shape = ModelShape.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 32,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        }
    )

    def peak(tokens: int, rows: int, tp_size: int = 1) -> int:
        return activation_bytes(
            shape, tp_size=tp_size, max_num_batched_tokens=tokens, max_num_seqs=rows, item_size=2
        )

    layer = 8192 * (4 * 4096 + 3 * 14336) * 2
    logits = 256 * 128256 * 24 + 8192 * 2 * 4096 * 2
    assert peak(8192, 256) == max(layer, logits)
    assert peak(65536, 256) == 65536 * (4 * 4096 + 3 * 14336) * 2
    assert peak(65536, 256, tp_size=2) < peak(65536, 256)
    assert peak(8192, 512) > peak(8192, 256)
