"""The benchmark command: one JSON line per measurement, tables, and plots.

Ratios between engines come from one run on one machine; a figure alone says little. Each run
begins with the machine's own limits, measured there and then.

  gpu         the suite that the published figures come from (also runs small on a CPU)
  report      its results beside other engines', the limits and the aims: table and plot
  profile     where the time of a decode step goes
  latency     N requests at once        throughput  everything at once
  serve       a server under load       bus         frontend and core without a model
  sse         the HTTP path alone: CPU time per token of API process and core
  arrivals    first tokens and gaps while requests arrive, at the pace of a GPU, without one
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_arrivals
import bench_bus
import bench_gpu
import bench_offline
import bench_profile
import bench_report
import bench_sse
import bench_workload
from bench_client import Load
from bench_limits import measure_limits
from bench_model import find_model
from bench_serve import Server, measure_serving
from bench_workload import Work

Result = dict[str, Any]
SCRIPTED = "tests.engine_core.scripted_executor:ScriptedExecutor"


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the exit code."""
    args = make_parser().parse_args(arguments)
    result: int = args.run(args)
    return result


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in {
        "gpu": bench_gpu,
        "report": bench_report,
        "profile": bench_profile,
        "sse": bench_sse,
        "arrivals": bench_arrivals,
    }.items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    for name, work in COMMANDS.items():
        command = commands.add_parser(name, description=work.__doc__)
        add_ad_hoc_arguments(command)
        command.set_defaults(run=run_ad_hoc, work=work, command=name)
    return parser


def add_ad_hoc_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of measurements whose sizes are free."""
    parser.add_argument("--model", default="tiny", help="model directory, or a name of ours")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", help="int8: on a CPU")
    parser.add_argument("--load-format", help="dummy: random weights of the shape")
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


def run_ad_hoc(args: argparse.Namespace) -> int:
    """The machine's limits, then the rounds, then a table."""
    report = Report(Path(args.output) if args.output else None)
    report.add("machine", measure_limits(args.device))
    for _ in range(args.rounds):
        args.work(args, report)
    report.print_table()
    return 0


def engine_options(args: argparse.Namespace, max_num_seqs: int) -> dict[str, Any]:
    """EngineArgs of every offline measurement."""
    model = find_model(args.model)
    return {
        "model": str(model.path),
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "load_format": args.load_format or model.load_format,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": not model.has_tokenizer,
    }


def make_work(args: argparse.Namespace, num_requests: int) -> Work:
    """The requests that the flags describe."""
    ids = find_model(args.model).id_range
    if args.lengths == "mixed" and args.command != "latency":
        return bench_workload.sharegpt_like(num_requests, ids, args.scale)
    return bench_workload.fixed(num_requests, args.input_len, args.output_len, ids)


def run_latency(args: argparse.Namespace, report: "Report") -> None:
    """N requests at once, for each N."""
    for batch in args.batch:
        work = make_work(args, batch)
        engine = bench_offline.open_engine(
            engine_options(args, max(batch, 8)), in_process=args.in_process
        )
        try:
            result = bench_offline.measure_decode(engine, work)
        finally:
            engine.shutdown()
        report.add("latency", {"engine": "heliograph", "batch": batch} | result)
        if args.peer:
            report.add("latency", {"engine": "hf", "batch": batch} | _peer(args, work))


def run_throughput(args: argparse.Namespace, report: "Report") -> None:
    """Everything submitted at once."""
    work = make_work(args, args.requests)
    engine = bench_offline.open_engine(engine_options(args, 256), in_process=args.in_process)
    try:
        warm = Work(prompts=work.prompts[:8], output_lens=[8] * len(work.prompts[:8]))
        bench_offline.run_requests(engine, warm)
        result = bench_offline.measure_throughput(engine, work)
    finally:
        engine.shutdown()
    report.add("throughput", {"engine": "heliograph"} | result)
    if args.peer:
        report.add("throughput", {"engine": "hf"} | _peer(args, work))


def _peer(args: argparse.Namespace, work: Work) -> Result:
    path = find_model(args.model).path
    device = "cpu" if args.device in ("auto", "cpu") else args.device
    dtype = args.dtype
    if dtype == "auto":
        config = json.loads((path / "config.json").read_text())
        dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
    return bench_offline.measure_hugging_face(str(path), dtype, device, work)


def run_serve(args: argparse.Namespace, report: "Report") -> None:
    """A server under Poisson arrivals."""
    model = find_model(args.model)
    flags = ["--model", str(model.path), "--dtype", args.dtype, "--device", args.device]
    flags += ["--load-format", args.load_format or model.load_format, "--disable-log-requests"]
    if args.quantization:
        flags += ["--quantization", args.quantization]
    if args.max_model_len:
        flags += ["--max-model-len", str(args.max_model_len)]
    with Server(flags, args.port) as server:
        load = Load(
            host="127.0.0.1",
            port=args.port,
            model=server.model,
            id_range=model.id_range,
            rate_per_s=args.rate,
            duration_s=args.requests / args.rate,
            scale=args.scale,
        )
        result = measure_serving(server, load) | {"ready_s": server.ready_s}
    report.add("serve", {"engine": "heliograph", "rate": args.rate} | result)


def run_bus(args: argparse.Namespace, report: "Report") -> None:
    """Frontend and core with an executor that answers at once."""
    path = str(find_model(args.model).path)
    result = asyncio.run(bench_bus.measure_bus(SCRIPTED, path, args.streams, args.output_len))
    report.add("bus", {"engine": "heliograph"} | result)


COMMANDS: dict[str, Callable[[argparse.Namespace, "Report"], None]] = {
    "latency": run_latency,
    "throughput": run_throughput,
    "serve": run_serve,
    "bus": run_bus,
}


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


if __name__ == "__main__":
    sys.exit(main())
