"""The measurement of the HTTP path: a small one, from engine core to client processes."""

import argparse
import json

import bench_sse
import pytest

from tests.fuzz.servers import free_port


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--streams", "3", "--step-ms", "2"], id="streams at once"),
        pytest.param(["--streams", "3", "--step-ms", "0", "--chat"], id="chat, as fast as it goes"),
        pytest.param(
            ["--streams", "8", "--requests", "5", "--arrivals", "50", "--api-server-count", "2"],
            id="arrivals at two API processes",
        ),
    ],
)
def test_every_stream_is_read_to_its_end_and_every_token_counted(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    bench_sse.add_arguments(parser)
    args = parser.parse_args([*flags, "--output-len", "40", "--port", str(free_port())])

    assert bench_sse.run(args) == 0

    result = json.loads(capsys.readouterr().out)
    assert result["complete"]
    assert 0.0 < result["events_per_token"] <= 1.1  # roles and last chunks are events, too
    assert result["tok_s"] > 0
    assert result["client_us_per_token"] > 0.0


def test_a_mark_cut_by_two_reads_is_counted_once() -> None:
    seen = bench_sse.EventCounter()
    data = b"data: {1}\n\ndata: {2}\n\ndata: [DONE]\n\n"
    for cut in range(len(data) + 1):
        seen = bench_sse.EventCounter()
        assert seen.take(data[:cut]) + seen.take(data[cut:]) == 3
        assert seen.tail.endswith(b"[DONE]\n\n")
