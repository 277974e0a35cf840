"""The suite end to end at tiny sizes on the CPU: every workload, as the command runs it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_gpu import is_chosen, parse_setting
from bench_record import read_rows

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"decode.b1": 12, "decode.b2": 24}
EVERYTHING = {
    "limits", "decode.b1", "decode.b2", "prefill.48", "offline.sharegpt", "offline.32x8",
    "prefix.cold", "prefix.warm", "prefix.repeat", "serve.startup", "serve.rate8",
    "startup.cold", "startup.warm",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bench(*arguments: str, exit_code: int = 0) -> str:
    """Run the command as a user does; its output."""
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, check=False
    )
    assert finished.returncode == exit_code, finished.stdout
    return finished.stdout


def positive(row: dict[str, Any], *names: str) -> None:
    for name in names:
        assert row[name] > 0, (name, row)


def test_every_workload_runs_on_the_cpu_and_leaves_its_line(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["gpu", "--smoke", "--model", "tiny", "--device", "cpu", "--output", str(output)]
    bench(*arguments, "--port", str(free_port()), "--commit", "abc123")
    rows = {row["measure"]: row for row in read_rows(output)}
    assert rows.keys() == EVERYTHING
    assert {row["commit"] for row in rows.values()} == {"abc123"}
    assert {row["model"] for name, row in rows.items() if name != "limits"} == {"tiny"}
    positive(rows["limits"], "read_tb_s", "copy_tb_s", "matmul_tflop_s")
    for name, num_tokens in GENERATED.items():
        assert rows[name]["output_tokens"] == num_tokens
        positive(rows[name], "step_ms_mean", "steady_tok_s", "step_ms_p99")
    positive(rows["prefill.48"], "ttft_ms")
    assert rows["offline.32x8"]["output_tokens"] == 32
    assert rows["offline.sharegpt"]["requests"] == 6
    for name in ("prefix.cold", "prefix.warm", "prefix.repeat"):
        positive(rows[name], "ttft_ms_p50")
    served = rows["serve.rate8"]
    assert served["failed"] == 0
    positive(served, "ttft_ms_p50", "itl_ms_p99", "api_us_per_token", "core_worker_cores")
    for name in ("startup.cold", "startup.warm"):
        row = rows[name]
        assert 0 < row["imported_s"] < row["ready_s"] <= row["first_token_s"]
        assert "loading weights" in row["phases_s"]


def test_a_profile_tells_where_a_steps_time_goes(tmp_path: Path) -> None:
    output = tmp_path / "profile.jsonl"
    arguments = ["--device", "cpu", "--model", "tiny", "--batch", "2", "--input-len", "8"]
    sizes = ["--steps", "8", "--traced-steps", "12"]
    text = bench("profile", *arguments, *sizes, "--output", str(output))
    (row,) = read_rows(output)
    assert row["measure"] == "profile.b2"
    assert row["gpu_busy_ms"] > 0
    assert 1 <= row["traced_steps"] <= 14
    positive(row["cpu_us"], "frontend", "core", "worker")
    assert {"matmul", "attention", "norm"} <= row["groups_us"].keys()
    assert "idle share" in text


def test_nothing_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["gpu", "--smoke", "--model", "tiny", "--device", "cpu", "--output", str(output)]
    text = bench(*arguments, "--only", "decode,serve,startup", "--budget-s", "0")
    assert not output.exists()
    assert text.count("not begun: the time is up") == 3


def test_a_measurement_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["gpu", "--smoke", "--model", "tiny", "--device", "cpu", "--output", str(output)]
    too_small = ["--engine-arg", "num_gpu_blocks_override=4"]  # 48 tokens, of which 49 are wanted
    text = bench(*arguments, *too_small, "--only", "prefill,offline.32x8", exit_code=1)
    assert [row["measure"] for row in read_rows(output)] == ["offline.32x8"]
    assert "FAILED: tiny the offline engine" in text


def test_an_engine_that_cannot_serve_at_all_is_not_tried_for_ever(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["gpu", "--smoke", "--model", "tiny", "--device", "cpu", "--output", str(output)]
    broken = ["--engine-arg", "num_gpu_blocks_override=2"]
    text = bench(*arguments, *broken, "--only", "decode", exit_code=1)
    assert not output.exists()
    assert text.count("Traceback") >= 1


def test_the_names_can_be_listed_without_measuring() -> None:
    names = bench("gpu", "--list").split()
    assert {"limits", "decode.b256", "offline.sharegpt", "prefill.32768", "serve.rate40"} <= {
        *names
    }
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("only", "is_expected"),
    [
        ([], True),
        (["decode"], True),
        (["decode.b32"], True),
        (["offline", "decode.b32"], True),
        (["decode.b3"], False),
        (["prefill"], False),
    ],
)
def test_measurements_are_chosen_by_name_or_group(only: list[str], is_expected: bool) -> None:
    assert is_chosen("decode.b32", only) is is_expected


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("enforce_eager=true", ("enforce_eager", True)),
        ("max_num_seqs=64", ("max_num_seqs", 64)),
        ("gpu_memory_utilization=0.5", ("gpu_memory_utilization", 0.5)),
        ("dtype=float16", ("dtype", "float16")),
    ],
)
def test_engine_arguments_are_read_by_what_they_look_like(
    text: str, setting: tuple[str, Any]
) -> None:
    assert parse_setting(text) == setting
    assert json.loads(json.dumps(parse_setting(text)[1])) == setting[1]
