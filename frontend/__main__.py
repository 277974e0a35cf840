"""The OpenAI server as a process: ``python -m frontend --model MODEL``, or ``heliograph serve``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from frontend.console import report, set_up_logging
from frontend.engine_args import AsyncEngineArgs
from frontend.model_files import choose_model
from frontend.openai.server import check_certificates, run
from frontend.openai.server_args import (
    listen_options,
    make_parser,
    server_options,
)
from frontend.stat_loggers import PrometheusStatLogger
from frontend.usage_context import UsageContext
from ipc.curve import load_client_keys
from ipc.errors import EngineError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from frontend.async_llm import AsyncLLM

logger = logging.getLogger("heliograph")


def main(argv: Sequence[str] | None = None, prog: str = "python -m frontend") -> int:
    """Serve until a signal; the exit code."""
    args = make_parser(prog).parse_args(argv)
    set_up_logging(args.uvicorn_log_level)
    try:
        if args.attach is None:
            choose_model(args)
        options = server_options(args, os.environ)
        listen = listen_options(args)
        check_certificates(listen)
        return run(partial(make_engine, args), options, listen)
    except EngineError as err:
        return report(err)


def make_engine(args: argparse.Namespace, metrics: "CollectorRegistry") -> "AsyncLLM":
    """Start an engine, or attach to one. Inside an event loop it returns at once.

    Args:
        metrics: the registry that the engine's numbers go to.
    """
    from frontend.async_llm import AsyncLLM

    vllm_names = not args.disable_vllm_metric_names
    loggers = [partial(PrometheusStatLogger, registry=metrics, vllm_names=vllm_names)]
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


if __name__ == "__main__":
    sys.exit(main())
