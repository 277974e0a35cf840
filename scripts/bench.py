"""The benchmark command: one JSON line per measurement, a table, and a plot when asked for.

Ratios between engines come from one run on one machine; a figure alone says little. Each run
begins with the machine's own limits, measured there and then.
"""

import argparse
import asyncio
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import bench_offline
import bench_serve
import bench_workload
from bench_workload import Work

Result = dict[str, Any]
DEMO_MODEL = Path(__file__).resolve().parent / "demo_models" / "tiny"
DEMO_IDS = (300, 8000)
REAL_IDS = (1000, 100_000)
SCRIPTED = "tests.engine_core.scripted_executor:ScriptedExecutor"


def main() -> int:
    """Run what the command line names."""
    args = make_parser().parse_args()
    report = Report(Path(args.output) if args.output else None)
    report.add("machine", machine_limits(args.device))
    for _ in range(args.rounds):
        COMMANDS[args.command](args, report)
    report.print_table()
    if args.plot:
        report.plot(Path(args.plot))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("command", choices=sorted(COMMANDS), help="what to measure")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="model directory")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights of the shape")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="latency: sizes")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--requests", type=int, default=32, help="throughput, serve: how many")
    parser.add_argument(
        "--lengths", default="mixed", choices=["mixed", "fixed"], help="mixed: as in chat traffic"
    )
    parser.add_argument("--scale", type=float, default=0.5, help="shrinks the mixed lengths")
    parser.add_argument("--rate", type=float, default=4.0, help="serve: requests per second")
    parser.add_argument("--streams", type=int, default=256, help="bus: streams at once")
    parser.add_argument("--port", type=int, default=8231)
    parser.add_argument("--peer", choices=["hf"], help="the same work by another engine, too")
    parser.add_argument(
        "--in-process", action="store_true", help="latency, throughput: no processes of our own"
    )
    parser.add_argument("--rounds", type=int, default=1, help="repeats, interleaved with the peer")
    parser.add_argument("--output", help="file that the JSON lines are appended to")
    parser.add_argument("--plot", help="file for a bar chart (needs the extra `bench`)")
    return parser


def engine_options(args: argparse.Namespace, max_num_seqs: int) -> dict[str, Any]:
    """EngineArgs of every offline measurement."""
    options: dict[str, Any] = {
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "load_format": args.load_format,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if not (Path(args.model) / "tokenizer.json").exists():
        options["skip_tokenizer_init"] = True
    return options


def make_work(args: argparse.Namespace, num_requests: int) -> Work:
    """The requests that the flags describe."""
    ids = DEMO_IDS if Path(args.model) == DEMO_MODEL else REAL_IDS
    if args.lengths == "mixed" and args.command != "latency":
        return bench_workload.sharegpt_like(num_requests, ids, args.scale)
    return bench_workload.fixed(num_requests, args.input_len, args.output_len, ids)


def run_latency(args: argparse.Namespace, report: "Report") -> None:
    """N requests at once, for each N."""
    for batch in args.batch:
        work = make_work(args, batch)
        result = bench_offline.measure_latency(
            engine_options(args, max(batch, 8)), work, in_process=args.in_process
        )
        report.add("latency", {"engine": "heliograph", "batch": batch} | result)
        if args.peer:
            report.add("latency", {"engine": "hf", "batch": batch} | _peer(args, work))


def run_throughput(args: argparse.Namespace, report: "Report") -> None:
    """Everything submitted at once."""
    work = make_work(args, args.requests)
    result = bench_offline.measure_throughput(
        engine_options(args, 256), work, in_process=args.in_process
    )
    report.add("throughput", {"engine": "heliograph"} | result)
    if args.peer:
        report.add("throughput", {"engine": "hf"} | _peer(args, work))


def _peer(args: argparse.Namespace, work: Work) -> Result:
    device = "cpu" if args.device in ("auto", "cpu") else args.device
    dtype = args.dtype
    if dtype == "auto":
        config = json.loads((Path(args.model) / "config.json").read_text())
        dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
    return bench_offline.measure_hugging_face(args.model, dtype, device, work)


def run_serve(args: argparse.Namespace, report: "Report") -> None:
    """A server under Poisson arrivals."""
    arrivals = bench_workload.poisson_arrivals_s(args.rate, args.requests / args.rate)
    work = make_work(args, len(arrivals))
    flags = ["--model", args.model, "--dtype", args.dtype, "--load-format", args.load_format]
    flags += ["--device", args.device, "--disable-log-requests"]
    if args.max_model_len:
        flags += ["--max-model-len", str(args.max_model_len)]
    result = bench_serve.serve_and_measure(flags, args.port, work, arrivals)
    report.add("serve", {"engine": "heliograph", "rate": args.rate} | result)


def run_bus(args: argparse.Namespace, report: "Report") -> None:
    """Frontend and core with an executor that answers at once."""
    result = asyncio.run(
        bench_serve.measure_bus(SCRIPTED, args.model, args.streams, args.output_len)
    )
    report.add("bus", {"engine": "heliograph"} | result)


COMMANDS = {
    "latency": run_latency,
    "throughput": run_throughput,
    "serve": run_serve,
    "bus": run_bus,
}


def machine_limits(device: str) -> Result:
    """What the machine can do at most: read bandwidth and matrix rate, measured now."""
    import torch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    size, num_bytes = (8192, 2**33) if on_gpu else (1024, 2**28)
    a = torch.randn(size, size, device=where, dtype=dtype)
    b = torch.randn(size, size, device=where, dtype=dtype)
    big = torch.ones(num_bytes // 4, device=where, dtype=torch.float32)
    matmul_s = _best_s(lambda: torch.mm(a, b), on_gpu)
    read_s = _best_s(lambda: big.sum(), on_gpu)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "matmul_tflop_s": round(2 * size**3 / matmul_s / 1e12, 2),
        "read_gb_s": round(num_bytes / read_s / 1e9, 1),
    }


def _best_s(work: Any, on_gpu: bool) -> float:
    import torch

    best = float("inf")
    for _ in range(8):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


class Report:
    """Collects results; every one is a JSON line at once, so that a crash loses none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: list[Result] = []

    def add(self, kind: str, result: Result) -> None:
        """Keep and print one measurement."""
        row = {"kind": kind} | result
        self._rows.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")

    def print_table(self) -> None:
        """Everything measured, one row each, aligned."""
        for kind in dict.fromkeys(row["kind"] for row in self._rows):
            rows = [row for row in self._rows if row["kind"] == kind]
            columns = [k for k in dict.fromkeys(k for row in rows for k in row) if k != "kind"]
            cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
            widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
            print(f"\n{kind}", file=sys.stderr)
            for line in cells:
                print(
                    "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)),
                    file=sys.stderr,
                )

    def plot(self, path: Path) -> None:
        """Bars of output tokens per second, engine beside engine."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = [row for row in self._rows if "tok_s" in row]
        labels = [f"{r['kind']} {r.get('batch', '')}\n{r['engine']}" for r in rows]
        figure, axes = pyplot.subplots(figsize=(max(4, 1.2 * len(rows)), 4))
        axes.bar(range(len(rows)), [row["tok_s"] for row in rows])
        axes.set_xticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylabel("output tokens per second")
        figure.tight_layout()
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
