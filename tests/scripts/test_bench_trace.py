"""Traces summed up: groups, gaps, steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_trace import Span, break_down, group_of, read_spans


def write_trace(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


def event(name: str, cat: str, ts: float, dur: float, tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": {}}


def steps(num_steps: int) -> list[Span]:
    """Steps of 100 us: two products that overlap, a gap of 30, a sampler, a gap of 20."""
    spans = []
    for i in range(num_steps):
        at = 100.0 * i
        spans += [
            Span("nvjet_tst_128x64", at, at + 30),
            Span("nvjet_tst_128x64", at + 20, at + 40),
            Span("_draw_kernel", at + 70, at + 80),
        ]
    return spans


def test_only_device_work_is_read_and_in_order(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "t.json",
        [
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
            event("b", "kernel", 20.5, 2.0),
            event("cudaLaunchKernel", "cuda_runtime", 1.0, 3.0),
            event("Memcpy DtoH", "gpu_memcpy", 10.0, 1.0),
            event("aten::mm", "cpu_op", 0.0, 5.0),
        ],
    )
    assert read_spans(trace) == [Span("Memcpy DtoH", 10.0, 11.0), Span("b", 20.5, 22.5)]


def test_without_a_gpu_the_outermost_operators_stand_for_kernels(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "t.json",
        [
            event("aten::linear", "cpu_op", 0.0, 10.0),
            event("aten::mm", "cpu_op", 0.0, 9.0),
            event("aten::copy_", "cpu_op", 2.0, 1.0, tid=8),
            event("aten::add", "cpu_op", 10.0, 1.0),
        ],
    )
    assert [span.name for span in read_spans(trace)] == ["aten::linear", "aten::copy_", "aten::add"]


def test_idle_time_is_what_no_kernel_covers() -> None:
    found = break_down(steps(10), expected_steps=10)
    assert found.step_us == pytest.approx(100)
    assert found.busy_us == pytest.approx(50)
    assert found.idle_share == pytest.approx(0.5)
    assert [(gap.name[0], gap.count, gap.us) for gap in found.gaps] == [("c", 2.0, 50.0)]


def test_time_is_shared_out_by_group_largest_first() -> None:
    found = break_down(steps(10), expected_steps=10)
    assert [(g.name, g.count, round(g.us)) for g in found.groups] == [
        ("matmul", 2.0, 50),
        ("sampling", 1.0, 10),
    ]


def test_what_the_ends_of_a_recording_disturb_is_left_out() -> None:
    late = [Span(s.name, s.start_us + 5000, s.end_us + 5000) for s in steps(10)[6:]]
    assert break_down([*steps(10)[:6], *late], expected_steps=10).idle_share == pytest.approx(0.5)


def test_kernels_that_run_once_a_step_tell_how_many_there_were() -> None:
    assert break_down(steps(10), expected_steps=12).num_steps == 3  # 9 whole ones, less 3 and 3
    rare = break_down(steps(10), expected_steps=40)  # nothing ran about as often
    assert (rare.num_steps, rare.step_us) == (40, pytest.approx(980 / 40))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_fused_add_rms_norm_kernel", "norm"),
        ("_decode_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matmul"),
        ("_vector_kernel", "matmul"),
        ("_rotary_kernel", "rope and store"),
        ("_qkv_rope_store_kernel", "rope and store"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("_gated_kernel", "activation"),
        ("_pick_kernel", "sampling"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str) -> None:
    assert group_of(kernel) == group
