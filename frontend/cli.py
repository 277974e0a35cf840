"""The command ``heliograph``: serve, complete, chat, run, run-batch, compile-kernels, replay, keys.

Each command imports what it needs when it runs, so that ``--version`` and ``--help`` are instant.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from ipc.sampling_params import SamplingParams

INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Errors are one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["-V"]):
        print(f"heliograph {_version()}")
        return 0
    commands = {name: command for name, (command, _) in COMMANDS.items()}
    if not words or words[0] not in commands:
        return _usage(words)
    if words[0] == "run":  # the errors of somebody else's program keep their traceback
        return run(words[1:])
    try:
        return commands[words[0]](words[1:])
    except EngineError as err:
        from frontend.console import report

        return report(err)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, ``head`` say, has seen enough
        sys.stderr.close()
        return 128 + signal.SIGPIPE


def serve(argv: Sequence[str]) -> int:
    """Serve a model over HTTP."""
    from frontend.__main__ import main as serve_main

    return serve_main(argv, prog="heliograph serve")


def complete(argv: Sequence[str]) -> int:
    """Print the completion of one prompt as it is generated."""
    from frontend.completion import print_completion
    from frontend.engine_args import AsyncEngineArgs
    from frontend.model_files import choose_model

    parser = argparse.ArgumentParser(
        prog="heliograph complete", description="Print the completion of a prompt, and exit."
    )
    parser.add_argument("prompt_text", nargs="?", metavar="PROMPT", help="the same as --prompt")
    parser.add_argument("--prompt", help="text to continue; - reads it from standard input")
    parser.add_argument("--echo", action="store_true", help="print the prompt first")
    _add_sampling_flags(parser)
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, disable_log_stats=True, disable_log_requests=True)
    args = parser.parse_args(argv)
    _set_up_logging()
    prompt = args.prompt if args.prompt is not None else args.prompt_text
    if prompt is None:
        raise ConfigError("--prompt must be given")
    if prompt == "-":
        prompt = sys.stdin.read()
    choose_model(args)
    params = _sampling_params(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    asyncio.run(print_completion(engine_args, prompt, params, echo=args.echo))
    return 0


def chat(argv: Sequence[str]) -> int:
    """Talk to a model in the terminal."""
    from frontend.engine_args import AsyncEngineArgs
    from frontend.model_files import choose_model
    from frontend.terminal import EngineChat, UrlChat, talk

    parser = argparse.ArgumentParser(
        prog="heliograph chat",
        description="Talk to a model. /reset forgets, Ctrl-C stops an answer, Ctrl-D ends.",
    )
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(
        "--url", help="a running server, http://localhost:8000 say; unset: load one"
    )
    parser.add_argument("--api-key", help="key for --url")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--chat-template", help="Jinja file, or the template itself")
    _add_sampling_flags(parser, max_tokens=512, temperature=0.7)
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(model=None, disable_log_stats=True, disable_log_requests=True)
    args = parser.parse_args(argv)
    _set_up_logging()
    params = _sampling_params(args)
    if args.url is not None:
        model = args.model or args.model_tag
        return talk(UrlChat(args.url, args.api_key, model, params), args.system)
    choose_model(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    with EngineChat(engine_args, params, args.chat_template) as source:
        return talk(source, args.system)


def run(argv: Sequence[str]) -> int:
    """Run a Python program written for vLLM."""
    if len(argv) > 1 and argv[0] == "-m":
        from frontend.compat import run_module

        run_module(argv[1], list(argv[2:]))
        return 0
    if not argv or argv[0].startswith("-"):
        print("usage: heliograph run SCRIPT.py [ARGUMENT ...]", file=sys.stderr)
        print("       heliograph run -m MODULE [ARGUMENT ...]", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    if not Path(argv[0]).is_file():
        print(f"heliograph run: there is no file {argv[0]}", file=sys.stderr)
        return 2
    from frontend.compat import run_script

    run_script(argv[0], list(argv[1:]))
    return 0


def keys(argv: Sequence[str]) -> int:
    """Make the key pairs that engines on tcp:// addresses need."""
    from ipc.curve import make_key_directory

    parser = argparse.ArgumentParser(
        prog="heliograph keys", description="Make a server's and a client's key pair."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory to write them to")
    args = parser.parse_args(argv)
    for path in make_key_directory(args.directory):
        print(path)
    return 0


def run_batch(argv: Sequence[str]) -> int:
    """Answer the requests of a JSONL file."""
    from frontend.openai.run_batch import main as batch_main

    return batch_main(argv)


def compile_kernels(argv: Sequence[str]) -> int:
    """Compile a model's kernels ahead of its start."""
    from frontend.compile_kernels import main as compile_main

    return compile_main(argv)


Command = Callable[[Sequence[str]], int]


def replay(argv: Sequence[str]) -> int:
    """Run a recording of a lost engine core again."""
    from frontend.replay import main as replay_main

    return replay_main(argv)


COMMANDS: dict[str, tuple[Command, str]] = {
    "serve": (serve, "serve a model over HTTP"),
    "complete": (complete, "print the completion of one prompt"),
    "chat": (chat, "talk to a model in the terminal"),
    "run": (run, "run a Python program written for vLLM"),
    "run-batch": (run_batch, "answer the requests of a JSONL file"),
    "compile-kernels": (compile_kernels, "compile a model's kernels ahead of its start"),
    "replay": (replay, "run a recorded engine's scheduler again"),
    "keys": (keys, "make key pairs for engines on tcp:// addresses"),
}


def _usage(words: Sequence[str]) -> int:
    is_asked = bool(words) and words[0] in ("-h", "--help")
    out = sys.stdout if is_asked else sys.stderr
    if words and not is_asked:
        print(f"heliograph: no command {words[0]!r}", file=out)
    print("usage: heliograph COMMAND ...   (heliograph COMMAND --help says more)", file=out)
    for name, (_, text) in COMMANDS.items():
        print(f"  {name:<15} {text}", file=out)
    return 0 if is_asked else 2


def _add_sampling_flags(
    parser: argparse.ArgumentParser, *, max_tokens: int = 64, temperature: float = 0.0
) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, default=max_tokens, help="most tokens to generate")
    add("--temperature", type=float, default=temperature, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="share of the likeliest tokens to draw from")
    add("--top-k", type=int, default=-1, help="number of likeliest tokens to draw from; -1: all")
    add("--stop", action="append", help="text that ends the answer; repeatable")


def _sampling_params(args: argparse.Namespace) -> "SamplingParams":
    from ipc.sampling_params import RequestOutputKind, SamplingParams

    try:
        return SamplingParams(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            stop=args.stop,
            output_kind=RequestOutputKind.DELTA,
        )
    except ValueError as err:
        raise ConfigError(f"--{str(err).replace('_', '-', 1)}") from err


def _set_up_logging() -> None:
    from frontend.console import set_up_logging

    set_up_logging("warning")


def _version() -> str:
    import frontend

    return frontend.__version__
