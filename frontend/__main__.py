"""The OpenAI server as a process: ``python -m frontend --model MODEL``, or ``heliograph serve``."""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from frontend.console import report, set_up_logging
from frontend.engine_args import AsyncEngineArgs
from frontend.model_files import choose_model
from frontend.openai.api_processes import (
    ApiProcess,
    hold_port,
    read_arguments,
    serve_with_processes,
    spawn,
)
from frontend.openai.server import ListenOptions, bind, check_certificates, run
from frontend.openai.server_args import (
    listen_options,
    make_parser,
    server_options,
)
from frontend.shared_metrics import MetricsExchange
from frontend.stat_loggers import PrometheusStatLogger
from frontend.usage_context import UsageContext
from ipc.addresses import make_ipc_directory
from ipc.curve import load_client_keys
from ipc.errors import EngineError
from ipc.processes import KEY_VARIABLE, die_with

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from frontend.async_llm import AsyncLLM

logger = logging.getLogger("heliograph")


def main(argv: Sequence[str] | None = None, prog: str = "python -m frontend") -> int:
    """Serve until a signal; the exit code."""
    args = make_parser(prog).parse_args(argv)
    if args.arguments_fd is not None:
        argv = [*read_arguments(args.arguments_fd), "--death-fd", str(args.death_fd)]
        args = make_parser(prog).parse_args(argv)
    set_up_logging(args.uvicorn_log_level)
    try:
        if args.attach is None:
            choose_model(args)
        options = server_options(args, os.environ)
        listen = listen_options(args)
        check_certificates(listen)
        if args.api_server_count > 1:
            return run_api_processes(sys.argv[1:] if argv is None else argv, args, listen)
        if args.death_fd is not None:
            die_with(args.death_fd)
        return run(partial(make_engine, args), options, listen)
    except EngineError as err:
        return report(err)


def make_engine(args: argparse.Namespace, metrics: "CollectorRegistry") -> "AsyncLLM":
    """Start an engine, or attach to one. Inside an event loop it returns at once.

    Args:
        metrics: the registry that the engine's numbers go to.
    """
    from frontend.async_llm import AsyncLLM

    loggers = [
        partial(
            PrometheusStatLogger,
            registry=metrics,
            vllm_names=not args.disable_vllm_metric_names,
            exchange=None if args.shared_metrics is None else MetricsExchange(args.shared_metrics),
        )
    ]
    if args.attach is None:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs.from_cli_args(args),
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=loggers,
        )
    keys = None if args.attach_keys is None else load_client_keys(Path(args.attach_keys))
    return AsyncLLM.attach(
        args.attach,
        keys,
        stat_loggers=loggers,
        log_stats=not args.disable_log_stats,
        log_requests=not args.disable_log_requests,
        max_log_len=args.max_log_len,
    )


def run_api_processes(argv: Sequence[str], args: argparse.Namespace, listen: ListenOptions) -> int:
    """Serve with several processes like this one, which only looks after them; the exit code.

    Raises:
        EngineError: the start failed; nothing is left behind.
    """
    from frontend.engine_setup import assemble_config

    config = None
    if args.attach is None:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        draft = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        config = assemble_config(draft, {})
    directory = make_ipc_directory()
    holder = hold_port(bind(listen))
    own_flags = ["--api-server-count", "1", "--port", str(holder.getsockname()[1])]
    own_flags += ["--shared-metrics", str(directory)]
    if key := os.environ.get(KEY_VARIABLE):  # not in the environment of any child
        own_flags += ["--api-key", key]

    def make_start(address: str | None) -> Callable[[], ApiProcess]:
        attached = [] if address is None else ["--attach", address]
        return partial(spawn, [*argv, *own_flags, *attached])

    try:
        return serve_with_processes(
            config, make_start, args.api_server_count, args.shutdown_timeout
        )
    finally:
        holder.close()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
