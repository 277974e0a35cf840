"""What this machine can do at most, measured now: reading, copying, matrix products, graph nodes.

Run as a process of its own, so that no memory of the device stays taken: ``measure_limits`` does
that. Data is random: constant inputs raise the matrix rate.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
GRAPH_NODES = 500


def measure_limits(device: str, *, is_small: bool = False) -> Result:
    """Measure in a child process.

    Args:
        device: "cuda", "cpu", or "auto": a GPU where there is one.
        is_small: take little memory and time; the figures then say little.
    """
    command = [sys.executable, __file__, "--device", device, *(["--small"] if is_small else [])]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: Result = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    import torch

    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not on_gpu:
        raise SystemExit("there is no GPU that torch can use")
    print(json.dumps(_measure("cuda" if on_gpu else "cpu", is_small=args.small or not on_gpu)))


def _measure(device: str, *, is_small: bool) -> Result:
    import torch

    num_bytes, size = (2**27, 512) if is_small else (2**33, 8192)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    read_s, copy_s = _memory_s(num_bytes, device)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    matmul_s = _median_s(lambda: torch.mm(a, b), device, repeats=40)
    return {
        "read_tb_s": _rounded(num_bytes / read_s / 1e12),
        "copy_tb_s": _rounded(2 * num_bytes / copy_s / 1e12),
        "matmul_tflop_s": _rounded(2 * size**3 / matmul_s / 1e12),
        "graph_node_us": _graph_node_us() if device == "cuda" else None,
        "threads": None if device == "cuda" else torch.get_num_threads(),
    }


def _memory_s(num_bytes: int, device: str) -> tuple[float, float]:
    """Times to read this much and to copy it. The memory is free again afterwards."""
    import torch

    values = torch.rand(num_bytes // 4, device=device)
    target = torch.empty_like(values)
    return _median_s(values.sum, device), _median_s(lambda: target.copy_(values), device)


def _median_s(work: Callable[[], object], device: str, repeats: int = 12) -> float:
    """Median time of one call, after a warm-up. On a GPU all calls are queued at once."""
    for _ in range(3):
        work()
    if device == "cpu":
        return statistics.median(_timed_s(work) for _ in range(repeats))
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times_ms: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times_ms) / 1000


def _timed_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _graph_node_us() -> float:
    """GPU time of one empty kernel within a captured graph of many."""
    import torch
    import triton

    @triton.jit
    def empty(pointer):  # type: ignore[no-untyped-def]
        pass

    pointer = torch.zeros(1, device="cuda")
    empty[(1,)](pointer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_NODES):
            empty[(1,)](pointer)
    return _rounded(_median_s(graph.replay, "cuda") * 1e6 / GRAPH_NODES)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
