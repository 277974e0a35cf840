"""The report: medians, scaled aims, verdicts, table and plot."""

from pathlib import Path
from typing import Any

import bench_report
import pytest
from bench_record import Recorder, read_rows

RUN = {"device": "D", "torch": "2", "triton": "3", "python": "3.12", "commit": "abc"}
LIMITS = {"read_tb_s": 4.26, "copy_tb_s": 4.2, "matmul_tflop_s": 689.0, "graph_node_us": None}


def lines_of(tmp_path: Path, *measured: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    recorder = Recorder(tmp_path / "run.jsonl", RUN)
    recorder.add("limits", LIMITS, model=None)
    for round, (model, measure, figures) in enumerate(measured):
        recorder.add(measure, figures, model=model, round=round)
    return read_rows(tmp_path / "run.jsonl")


def row_of(lines: list[dict[str, Any]], work: str, **limits: float) -> bench_report.Row:
    found = bench_report.find_limits(lines)
    assert found is not None
    rows = bench_report.make_rows(lines, found | limits)
    (row,) = [row for row in rows if row.work.startswith(work)]
    return row


def test_rounds_count_as_their_median_beside_the_peer(tmp_path: Path) -> None:
    rounds = [("llama-8b", "decode.b1", {"step_ms_mean": ms}) for ms in (4.2, 3.9, 3.95)]
    row = row_of(lines_of(tmp_path, *rounds), "8B decode, batch 1,")
    assert (row.ours, row.peer, row.verdict) == (3.95, 4.931, "must")
    assert row.speed(row.ours) == pytest.approx(4.931 / 3.95)
    assert row.limit == pytest.approx(3.53, abs=0.01)


@pytest.mark.parametrize(
    ("tok_s", "verdict"),
    [(12_999.0, "missed"), (13_000.0, "must"), (15_000.0, "wished")],
    ids=["below", "at the aim", "at the wish"],
)
def test_for_throughput_more_is_better(tmp_path: Path, tok_s: float, verdict: str) -> None:
    lines = lines_of(tmp_path, ("llama-8b", "offline.sharegpt", {"tok_s": tok_s}))
    row = row_of(lines, "8B offline, 1000")
    assert row.verdict == verdict
    assert row.speed(row.ours) == pytest.approx(tok_s / 10_794.5)


def test_aims_bound_by_arithmetic_follow_the_matmul_rate(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    faster = 689.0 * 1.1
    assert row_of(lines, "8B decode, batch 256", matmul_tflop_s=faster).must == (
        pytest.approx(9.4 / 1.1)
    )
    assert row_of(lines, "8B offline, 1000", matmul_tflop_s=faster).must == (
        pytest.approx(13_000 * 1.1)
    )
    assert row_of(lines, "8B decode, batch 1,", matmul_tflop_s=faster).must == 4.0


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    row = row_of(lines_of(tmp_path), "8B decode, batch 8")
    assert (row.ours, row.verdict, row.speed(row.ours)) == (None, "not measured", None)


def test_the_table_names_run_machine_and_every_aim(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, ("llama-8b", "decode.b1", {"step_ms_mean": 3.9, "tok_s": 250.0}))
    limits = bench_report.find_limits(lines)
    text = bench_report.describe(lines, limits) + bench_report.table(
        bench_report.make_rows(lines, limits)
    )
    assert "commit abc" in text
    assert "matmul_tflop_s 689" in text
    assert (
        "| 8B decode, batch 1, ms a token | 4.93 | 3.53 | ≤ 4 | ≤ 3.7 | 3.9 | 1.26 | must |" in text
    )
    assert "| llama-8b decode.b1 | tok_s | 250 | 201 |" in bench_report.lesser_table(lines)


def test_the_command_writes_table_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench

    lines_of(tmp_path, ("llama-8b", "decode.b1", {"step_ms_mean": 3.9}))
    assert bench.main(["report", str(tmp_path / "run.jsonl"), "--to", str(tmp_path / "out")]) == 0
    assert "8B decode, batch 1," in (tmp_path / "out" / "run.md").read_text()
    assert "</svg>" in (tmp_path / "out" / "run.svg").read_text()
    assert "3.9" in capsys.readouterr().out
