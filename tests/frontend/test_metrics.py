"""What a scrape shows, under our names and under vLLM's."""

import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from frontend.metrics import EngineMetrics, Histogram, Throughput, render_metrics
from frontend.stat_loggers import (
    FinishedRequestStats,
    IterationStats,
    LoggingStatLogger,
    PrometheusStatLogger,
    StatLoggerGroup,
)
from ipc.config import CacheConfig, EngineConfig, ModelConfig
from ipc.messages import FinishReason, SchedulerStats

VLLM_2024 = {
    "gauge": [
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_swapped",
        "gpu_cache_usage_perc",
        "cpu_cache_usage_perc",
        "avg_prompt_throughput_toks_per_s",
        "avg_generation_throughput_toks_per_s",
    ],
    "counter": ["num_preemptions", "prompt_tokens", "generation_tokens", "request_success"],
    "histogram": [
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_best_of",
        "request_params_n",
    ],
}
VLLM_2026 = {
    "gauge": ["kv_cache_usage_perc"],
    "counter": ["prefix_cache_queries", "prefix_cache_hits", "corrupted_requests"],
    "histogram": [
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "request_params_max_tokens",
        "request_max_num_generation_tokens",
        "iteration_tokens_total",
        "request_prefill_kv_computed_tokens",
    ],
}


def make_config(**options: Any) -> EngineConfig:
    """A config with two served names."""
    model_config = ModelConfig("m", max_model_len=1000, served_model_name=["first", "second"])
    return EngineConfig(model_config=model_config, cache_config=CacheConfig(**options))


def scrape(source: Any) -> dict[str, tuple[str, dict[tuple[str, ...], float]]]:
    """Name -> (type, sample values by (name, model name, further label))."""
    body, content_type = render_metrics(source)
    assert content_type.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {
        family.name: (
            family.type,
            {_key(sample.name, sample.labels): sample.value for sample in family.samples},
        )
        for family in families
    }


def _key(name: str, labels: dict[str, str]) -> tuple[str, ...]:
    further = [value for label, value in labels.items() if label != "model_name"]
    return (name, labels["model_name"], *further)


def make_request(**overrides: Any) -> FinishedRequestStats:
    """A finished request with all times."""
    options: dict[str, Any] = {
        "finish_reason": FinishReason.LENGTH,
        "num_prompt_tokens": 30,
        "num_generation_tokens": 8,
        "e2e_latency_s": 2.0,
        "n": 2,
        "best_of": 4,
        "max_tokens": 16,
        "max_branch_tokens": 5,
        "num_cached_tokens": 16,
        "queue_time_s": 0.25,
        "prefill_time_s": 0.5,
        "decode_time_s": 1.0,
    }
    return FinishedRequestStats(**(options | overrides))


@pytest.mark.parametrize("names", [VLLM_2024, VLLM_2026], ids=["2024", "2026"])
def test_the_first_scrape_shows_every_name_of_vllm_that_applies(
    names: dict[str, list[str]],
) -> None:
    families = scrape(PrometheusStatLogger(make_config()))
    for prefix in ("vllm:", "heliograph:"):
        for kind, group in names.items():
            for name in group:
                found_kind, samples = families[prefix + name]
                assert found_kind == kind, name
                assert samples
                assert all(labels[1] == "first" for labels in samples), name


def test_the_cache_configuration_is_an_info_line() -> None:
    body, _ = render_metrics(PrometheusStatLogger(make_config(block_size=8)))
    [line] = [
        line for line in body.decode().splitlines() if line.startswith("vllm:cache_config_info{")
    ]
    for label in ('block_size="8"', 'model_name="first"', 'enable_prefix_caching="True"'):
        assert label in line
    assert line.endswith(" 1.0")


def test_vllms_names_can_be_left_out() -> None:
    families = scrape(PrometheusStatLogger(make_config(), vllm_names=False))
    assert families
    assert all(name.startswith("heliograph:") for name in families)


def test_numbers_are_those_that_were_recorded() -> None:
    stat_logger = PrometheusStatLogger(make_config())
    stats = SchedulerStats(
        num_running=3,
        num_gpu_blocks=101,
        num_free_gpu_blocks=75,
        num_preemptions=2,
        prefix_cache_queries=40,
        prefix_cache_hits=16,
        num_steps=1,
        step_num_tokens=12,
    )
    iteration = IterationStats(
        num_prompt_tokens=30,
        num_generation_tokens=4,
        time_to_first_token_s=[0.3],
        inter_token_latency_s=[0.02, 0.03],
        finished=[make_request()],
    )
    stat_logger.record(stats, iteration)
    stat_logger.record(stats, IterationStats(num_generation_tokens=1))  # no step since
    values = {
        key[0]: value
        for _, samples in scrape(stat_logger).values()
        for key, value in samples.items()
        if len(key) == 2
    }
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:gpu_cache_usage_perc": 0.25,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 2,
        "vllm:prompt_tokens_total": 30,
        "vllm:generation_tokens_total": 5,
        "vllm:prefix_cache_queries_total": 40,
        "vllm:prefix_cache_hits_total": 16,
        "heliograph:engine_steps_total": 1,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:time_to_first_token_seconds_sum": 0.3,
        "vllm:time_per_output_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_sum": 0.05,
        "vllm:e2e_request_latency_seconds_sum": 2.0,
        "vllm:request_inference_time_seconds_sum": 1.5,
        "vllm:request_time_per_output_token_seconds_sum": 0.25,
        "vllm:request_prompt_tokens_sum": 30,
        "vllm:request_generation_tokens_sum": 8,
        "vllm:request_max_num_generation_tokens_sum": 5,
        "vllm:request_prefill_kv_computed_tokens_sum": 14,
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_best_of_sum": 4,
        "vllm:request_params_max_tokens_sum": 16,
        "vllm:iteration_tokens_total_sum": 12,
        "vllm:iteration_tokens_total_count": 1,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_ends_are_counted_by_reason() -> None:
    stat_logger = PrometheusStatLogger(make_config())
    reasons = [FinishReason.STOP, FinishReason.STOP, FinishReason.ABORT]
    finished = [make_request(finish_reason=reason) for reason in reasons]
    stat_logger.record(None, IterationStats(finished=finished))
    _, samples = scrape(stat_logger)["vllm:request_success"]
    counts = {key[2]: value for key, value in samples.items()}
    assert counts == {"stop": 2, "length": 0, "abort": 1, "error": 0, "timeout": 0}


def test_counters_survive_a_restart_of_the_core() -> None:
    stat_logger = PrometheusStatLogger(make_config())
    for num_preemptions in (5, 7, 1, 2):  # the core was restarted after the second
        stat_logger.record(SchedulerStats(num_preemptions=num_preemptions), IterationStats())
    _, samples = scrape(stat_logger)["vllm:num_preemptions"]
    assert list(samples.values()) == [9]


def test_missing_times_are_not_observed() -> None:
    stat_logger = PrometheusStatLogger(make_config())
    request = make_request(queue_time_s=None, max_tokens=None, decode_time_s=None)
    stat_logger.record(None, IterationStats(finished=[request]))
    families = scrape(stat_logger)
    for name in ("request_queue_time_seconds", "request_params_max_tokens"):
        _, samples = families[f"vllm:{name}"]
        assert samples[f"vllm:{name}_count", "first"] == 0


def test_engines_in_one_process_do_not_clash() -> None:
    first, second = (PrometheusStatLogger(make_config()) for _ in range(2))
    first.record(None, IterationStats(num_generation_tokens=5))
    assert scrape(first)["vllm:generation_tokens"][1] != scrape(second)["vllm:generation_tokens"][1]


def test_metrics_come_from_a_logger_a_group_or_a_registry() -> None:
    registry = CollectorRegistry()
    stat_logger = PrometheusStatLogger(make_config(), registry=registry)
    group = StatLoggerGroup(make_config(), [LoggingStatLogger, lambda config, index: stat_logger])
    assert scrape(registry) == scrape(stat_logger) == scrape(group)
    assert scrape(StatLoggerGroup(make_config(), [])) == {}


def test_buckets_hold_what_is_at_most_their_end() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(None)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 14.0


def test_throughput_is_that_of_the_last_window_and_falls_to_zero() -> None:
    now_s = 0.0
    throughput = Throughput(lambda: now_s)
    for now_s in (0.0, 1.0, 2.0, 3.0, 4.0):  # noqa: B007 - the clock reads it
        throughput.add(10)
    assert throughput.update() == 0.0
    now_s = 5.0
    assert throughput.update() == 10.0
    now_s = 11.0
    assert throughput.update() == 0.0


def test_recording_a_large_step_is_quick() -> None:
    metrics = EngineMetrics(make_config())
    iteration = IterationStats(
        num_generation_tokens=256,
        time_to_first_token_s=[0.1],
        inter_token_latency_s=[0.02] * 255,
        finished=[make_request()],
    )
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        metrics.record(SchedulerStats(), iteration)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 500e-6
