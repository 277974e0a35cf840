"""The suite: every workload by which this engine is compared with others on one accelerator.

Measurements that need the same engine share one, since starting it takes longer than most of them.
Each result is on disk as soon as it is known, and nothing new is begun once the budget is spent,
so a run may be cut anywhere and continued by name.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_offline
import bench_workload
from bench_client import Load
from bench_limits import measure_limits
from bench_model import SCRIPTS, BenchModel, find_model, write_tokenizer
from bench_record import Recorder, describe_run
from bench_serve import Server, measure_serving
from bench_startup import measure_startup
from bench_workload import FULL, SMOKE, Sizes, Work

from frontend import LLMEngine

Result = dict[str, Any]
DEFAULT_OUTPUT = SCRIPTS / "bench_results" / "latest.jsonl"


class Suite:
    """One model's measurements. Owns the list of failures; engines live within one stage."""

    def __init__(
        self, model: BenchModel, sizes: Sizes, options: argparse.Namespace, recorder: Recorder
    ) -> None:
        self._model = model
        self._sizes = sizes
        self._options = options
        self._recorder = recorder
        self.failed: list[str] = []

    def names(self) -> list[str]:
        """Every measurement, in the order in which they run."""
        return [
            *self._offline_runs(),
            "prefix",
            *(f"serve.rate{rate:g}" for rate in self._sizes.serve_rates),
            "startup",
        ]

    def run(self) -> None:
        """Run what was chosen, stage by stage."""
        chosen = [name for name in self.names() if is_chosen(name, self._options.only)]
        runs = {name: run for name, run in self._offline_runs().items() if name in chosen}
        rates = [rate for rate in self._sizes.serve_rates if f"serve.rate{rate:g}" in chosen]
        pending = [(round, name) for round in range(self._options.rounds) for name in runs]
        while pending and self._has_time("the offline engine"):
            with self._guard("the offline engine", pending):
                self._run_offline(runs, pending)
        if "prefix" in chosen and self._has_time("the engine with prefix caching"):
            with self._guard("prefix"):
                self._run_prefix()
        if rates and self._has_time("the server"):
            with self._guard("serve"):
                self._run_serving(rates)
        if "startup" in chosen and self._has_time("start-up"):
            with self._guard("startup"):
                self._run_startup()

    @contextlib.contextmanager
    def _guard(self, stage: str, pending: list[tuple[int, str]] | None = None) -> Iterator[None]:
        """Note a failure and go on: device time is dear, and the other stages may work.

        Args:
            pending: emptied when the stage failed before any measurement of it began.
        """
        num_pending = len(pending or ())
        try:
            yield
        except Exception:
            traceback.print_exc(file=sys.stdout)
            self.failed.append(f"{self._model.name} {stage}")
            if pending is not None and len(pending) == num_pending:
                pending.clear()

    # ------------------------------------------------------------ offline

    def _offline_runs(self) -> dict[str, Callable[[LLMEngine], Result]]:
        """By name: what to do with an engine that caches no prefixes."""
        sizes = self._sizes
        runs: dict[str, Callable[[LLMEngine], Result]] = {}
        for batch in sizes.decode_batches:
            runs[f"decode.b{batch}"] = self._measuring(
                bench_offline.measure_decode, batch, *sizes.decode_lens
            )
        for num_prompts, length in sizes.prefills:
            name = f"{length}" if num_prompts == 1 else f"{num_prompts}x{length}"
            runs[f"prefill.{name}"] = self._measuring(
                bench_offline.measure_prefill, num_prompts, length, 1
            )
        runs["offline.sharegpt"] = lambda engine: bench_offline.measure_throughput(
            engine,
            bench_workload.sharegpt_like(
                sizes.sharegpt_requests, self._model.id_range, sizes.scale
            ),
        )
        for num_requests, input_len, output_len in sizes.fixed:
            runs[f"offline.{input_len}x{output_len}"] = self._measuring(
                bench_offline.measure_throughput, num_requests, input_len, output_len
            )
        return runs

    def _measuring(
        self,
        measure: Callable[[LLMEngine, Work], Result],
        num_requests: int,
        input_len: int,
        output_len: int,
    ) -> Callable[[LLMEngine], Result]:
        def run(engine: LLMEngine) -> Result:
            ids = self._model.id_range
            return measure(engine, bench_workload.fixed(num_requests, input_len, output_len, ids))

        return run

    def _run_offline(
        self, runs: dict[str, Callable[[LLMEngine], Result]], pending: list[tuple[int, str]]
    ) -> None:
        """Work off ``pending``; what was begun is taken off it."""
        with self._engine(enable_prefix_caching=False) as engine:
            while pending:
                round, name = pending.pop(0)
                if self._has_time(name):
                    self._record(name, runs[name](engine), round)

    def _run_prefix(self) -> None:
        """Cold, then new requests behind the same prefix, then the very same requests again."""
        sizes = self._sizes
        with self._engine(enable_prefix_caching=True) as engine:
            for round in range(self._options.rounds):
                if not self._has_time("prefix"):
                    return
                engine.reset_prefix_cache()
                for name, seed in (("cold", 11), ("warm", 12), ("repeat", 12)):
                    work = bench_workload.shared_prefix(
                        sizes.prefix_requests,
                        sizes.prefix_lens,
                        self._model.id_range,
                        prefix_seed=10,
                        seed=seed,
                    )
                    result = bench_offline.measure_prefix(engine, work)
                    self._record(f"prefix.{name}", result, round)

    @contextlib.contextmanager
    def _engine(self, *, enable_prefix_caching: bool) -> Iterator[LLMEngine]:
        """An offline engine, warm."""
        started = time.perf_counter()
        args = self._engine_args() | {"enable_prefix_caching": enable_prefix_caching}
        engine = bench_offline.open_engine(args)
        try:
            say(f"engine ready after {time.perf_counter() - started:.1f} s")
            for batch in (1, min(64, self._sizes.max_num_seqs)):
                work = bench_workload.fixed(batch, 32, 8, self._model.id_range)
                bench_offline.run_requests(engine, work)
            time.sleep(self._sizes.settle_s)
            yield engine
        finally:
            engine.shutdown()

    def _engine_args(self) -> dict[str, Any]:
        args: dict[str, Any] = self._common_args() | {
            "max_num_batched_tokens": self._sizes.offline_tokens,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        return args | dict(map(parse_setting, self._options.engine_arg))

    def _common_args(self) -> dict[str, Any]:
        model = self._model
        return {
            "model": str(model.path),
            "load_format": model.load_format,
            "device": self._options.device,
            "max_model_len": model.max_model_len,
            "max_seq_len_to_capture": model.max_model_len,
            "max_num_seqs": self._sizes.max_num_seqs,
            "gpu_memory_utilization": 0.92,
        }

    def _run_startup(self) -> None:
        for name, result in measure_startup(self._engine_args()).items():
            self._record(f"startup.{name}", result, 0)

    # ------------------------------------------------------------ online

    def _run_serving(self, rates: list[float]) -> None:
        with tempfile.TemporaryDirectory(prefix="bench-tokenizer-") as directory:
            flags = self._server_flags(Path(directory))
            with Server(flags, self._options.port) as server:
                started = {"ready_s": server.ready_s, "first_answer_s": server.first_answer_s}
                self._record("serve.startup", started, 0)
                measure_serving(server, self._load(server, rate=16, duration_s=1.0))
                time.sleep(self._sizes.settle_s)
                for round in range(self._options.rounds):
                    for rate in rates:
                        name = f"serve.rate{rate:g}"
                        if self._has_time(name):
                            load = self._load(server, rate, self._options.serve_s)
                            self._record(name, measure_serving(server, load), round)

    def _load(self, server: Server, rate: float, duration_s: float | None) -> Load:
        return Load(
            host="127.0.0.1",
            port=server.port,
            model=server.model,
            id_range=self._model.id_range,
            rate_per_s=rate,
            duration_s=duration_s or self._sizes.serve_s,
            scale=self._sizes.scale,
        )

    def _server_flags(self, directory: Path) -> list[str]:
        args = self._common_args() | {"max_num_batched_tokens": self._sizes.serve_tokens}
        if not self._model.has_tokenizer:
            write_tokenizer(directory, self._model.vocab_size)
            args["tokenizer"] = str(directory)
        args["enable_prefix_caching"] = False
        flags = ["--disable-log-requests", "--disable-access-log"]
        settings = [*self._options.engine_arg, *self._options.server_arg]
        for name, value in (args | dict(map(parse_setting, settings))).items():
            flags += _flag(name.replace("_", "-"), value)
        return flags

    # ------------------------------------------------------------ bookkeeping

    def _record(self, measure: str, figures: Result, round: int) -> None:
        self._recorder.add(measure, figures, model=self._model.name, round=round)

    def _has_time(self, name: str) -> bool:
        """Whether the budget allows to begin; says so when it does not."""
        is_left: bool = time.monotonic() < self._options.deadline_s
        say(f"{self._model.name}: {name}" + ("" if is_left else " not begun: the time is up"))
        return is_left


def is_chosen(name: str, only: list[str]) -> bool:
    """Whether ``only`` names this measurement or a group that it belongs to; nothing names all."""
    return not only or any(name == each or name.startswith(f"{each}.") for each in only)


def parse_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where VALUE may be a number or true or false."""
    name, _, value = text.partition("=")
    constants = {"true": True, "false": False}
    if value in constants:
        return name, constants[value]
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            pass
    return name, value


def _flag(name: str, value: object) -> list[str]:
    """An engine argument on the command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def say(text: str) -> None:
    """One line of progress, with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's flags."""
    add = parser.add_argument
    add("--model", nargs="+", default=["llama-8b", "qwen3-0.6b"], help="names or directories")
    add(
        "--only",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,…",
        help="measurements or groups: limits, decode, decode.b32, prefill.2048, offline, …",
    )
    add("--list", action="store_true", help="print the measurements' names and end")
    add("--rounds", type=int, default=1, help="of every measurement but limits and start-up")
    add("--budget-s", type=float, default=float("inf"), help="begin nothing new after so long")
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="file that lines are appended to")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--smoke", action="store_true", help="tiny sizes: proves the suite, measures nothing")
    add("--serve-s", type=float, default=None, help="length of a serving run; default 60")
    add("--port", type=int, default=8231)
    add("--commit", help="recorded with the results; unset: what git says")
    add(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further engine argument, for trying things; repeatable",
    )
    add(
        "--server-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the server alone, such as api_server_count=2; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for."""
    args.deadline_s = time.monotonic() + args.budget_s
    recorder = Recorder(None if args.list else args.output, describe_run(args.commit))
    sizes = SMOKE if args.smoke else FULL
    suites = [Suite(find_model(name), sizes, args, recorder) for name in args.model]
    if args.list:
        print("\n".join(dict.fromkeys(["limits", *(n for suite in suites for n in suite.names())])))
        return 0
    failed = []
    if is_chosen("limits", args.only) and args.budget_s > 0:
        say("limits")
        try:
            recorder.add("limits", measure_limits(args.device, is_small=args.smoke), model=None)
        except subprocess.CalledProcessError:  # it has said why
            failed.append("limits")
    for suite in suites:
        suite.run()
        failed += suite.failed
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0
