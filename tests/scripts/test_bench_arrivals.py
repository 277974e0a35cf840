"""The measurement of first tokens under arrivals: a small one, and the pace of its executor."""

import argparse
import json

import bench_arrivals
import pytest


def test_every_setting_is_measured_under_the_same_arrivals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    bench_arrivals.add_arguments(parser)
    flags = ["--rates", "20", "--seconds", "0.3", "--prompt-len", "900"]

    assert bench_arrivals.run(parser.parse_args(flags)) == 0

    early, late = map(json.loads, capsys.readouterr().out.splitlines())
    assert (early["setting"], late["setting"]) == ("max_steps_in_flight=2", "")
    assert early["requests"] == late["requests"] > 2
    for figures in (early, late):
        assert figures["ttft_ms_p50"] > 900 * bench_arrivals.LLAMA_8B["token_ms"]
        assert figures["itl_ms_p99"] >= figures["itl_ms_p50"] > 3.0
