"""``heliograph compile-kernels MODEL``: compile a model's kernels ahead, so that no start has to.

Takes the engine's flags, since they decide which kernels there are: use those of the start to come.
The kernels go where Triton keeps what it compiles (``TRITON_CACHE_DIR``, else a directory in the
user's home) and must stay at that path. With ``--target`` no GPU is needed: images can ship them.
"""

import argparse
import time
from collections.abc import Sequence

from frontend.console import set_up_logging
from frontend.engine_args import AsyncEngineArgs
from frontend.launcher import ProgressLine
from frontend.model_files import choose_model
from ipc.compiling import CompilingProcess
from ipc.errors import ConfigError
from ipc.messages import LoadProgress


def main(argv: Sequence[str]) -> int:
    """Compile; the exit code."""
    args = _make_parser().parse_args(argv)
    set_up_logging("info")
    choose_model(args)
    if args.device == "cpu":
        raise ConfigError("--device cpu: there is nothing to compile for a CPU")
    args.device = "cuda"
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(is_here=args.target is None)
    process = CompilingProcess(config, args.target, args.jobs)
    line, started_s = ProgressLine(), time.monotonic()

    def show(done: int, total: int) -> None:
        elapsed_s = time.monotonic() - started_s
        line.show(LoadProgress(0, "compiling kernels", done, total, elapsed_s))

    exit_code = process.wait(show)
    line.close(is_ready=exit_code == 0)
    return exit_code


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heliograph compile-kernels",
        description="Compile a model's kernels ahead of its start, with the flags of that start.",
    )
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(
        "--target", help="GPU to compile for, sm_90 say; unset: the one of this machine"
    )
    parser.add_argument("--jobs", type=int, help="compilers at once; unset: one for each core")
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None)
    return parser
