"""``python -m engine_core``: an engine as a process tree of its own.

Three entries: a user's daemon (all engine flags, ``--listen``), a tree embedded in a user's process
(``--embedded``: the config comes through stdin, whose end is the parent's death), and the core
itself (``--core``), which the supervisor starts.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from engine_core.supervisor import Supervisor
from ipc.errors import ConfigError, ExitCode
from ipc.log_lines import log_to_stderr
from ipc.messages import EngineFailed, LoadProgress
from ipc.processes import child_environment, python_command
from ipc.status import Listening, Status, StatusWriter

_LENGTH_BYTES = 8  # of the config's length, big endian, in front of it on stdin


def main(arguments: list[str]) -> int:
    """Run the entry that the flags ask for; the exit code of this process."""
    options, engine_flags = _make_parser().parse_known_args(arguments)
    # Embedded, the terminal belongs to somebody else's program.
    level = logging.WARNING if options.embedded else logging.INFO
    log_to_stderr(level, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.core:
        return _run_core(options)
    try:
        if options.embedded:
            return _run_embedded(options)
        return _run_daemon(options, engine_flags)
    except ConfigError as err:
        sys.stderr.write(f"{err}\n")
        return ExitCode.CONFIG


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine_core",
        description="An engine that stands alone; frontends attach to its address.",
        epilog="Engine flags (--model MODEL, ...) are taken too: see 'heliograph serve --help'.",
        allow_abbrev=False,
    )
    parser.add_argument("--listen", help="ipc:///path or tcp://host:port; default: a private path")
    parser.add_argument("--curve-keys", type=Path, help="directory made by 'heliograph keys DIR'")
    parser.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long open requests may go on after a signal to stop; default %(default)s",
    )
    for name in ("--core", "--embedded"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name in (
        "--epoch",
        "--status-fd",
        "--death-fd",
        "--record-fd",
        "--progress-fd",
        "--parent-pid",
    ):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    return parser


def _run_core(options: argparse.Namespace) -> int:
    from engine_core.core_process import CoreOptions, CoreProcess  # not into the supervisor

    core_options = CoreOptions(
        listen=options.listen,
        curve_keys=options.curve_keys,
        epoch=options.epoch,
        status_fd=options.status_fd,
        death_fd=options.death_fd,
        drain_s=options.shutdown_timeout,
        record_fd=options.record_fd,
        progress_fd=options.progress_fd,
    )
    return CoreProcess(core_options).run()


def _run_embedded(options: argparse.Namespace) -> int:
    """Serve the process that started us, and end with it, however it ends."""
    try:
        parent_pidfd = os.pidfd_open(options.parent_pid)
    except ProcessLookupError:
        return ExitCode.CLEAN
    if os.getppid() != options.parent_pid:
        return ExitCode.CLEAN
    length = int.from_bytes(os.read(0, _LENGTH_BYTES), "big")
    config = b""
    while len(config) < length and (data := os.read(0, length - len(config))):
        config += data
    supervisor = Supervisor(
        config=config,
        listen=options.listen,
        curve_keys=options.curve_keys,
        parent=[0, parent_pidfd],
        is_embedded=True,
        report=StatusWriter(options.status_fd).write,
    )
    return supervisor.run()


def _run_daemon(options: argparse.Namespace, engine_flags: list[str]) -> int:
    """Resolve the flags in a process of the package that knows them, then serve anybody."""
    command = python_command("frontend.engine_args", "--encode", *engine_flags)
    signal.signal(signal.SIGTERM, _exit)  # so that this child does not outlive us
    resolved = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=child_environment()
    )
    if resolved.returncode != 0:
        return resolved.returncode
    supervisor = Supervisor(
        config=resolved.stdout,
        listen=options.listen,
        curve_keys=options.curve_keys,
        parent=[],
        is_embedded=False,
        report=_print_status,
        drain_s=options.shutdown_timeout,
    )
    return supervisor.run()


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"not a number: {text!r}") from err
    if not 0.0 <= seconds <= 86400.0:
        raise argparse.ArgumentTypeError(f"not between 0 and 86400: {text!r}")
    return seconds


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_status(status: Status) -> None:
    match status:
        case LoadProgress():
            done = f" {status.done}/{status.total}" if status.total else ""
            sys.stderr.write(f"rank {status.rank}: {status.phase}{done}\n")
        case Listening():
            sys.stdout.write(f"listening at {status.address}\n")
            sys.stdout.flush()
        case EngineFailed():
            sys.stderr.write(f"the engine ended: {status.reason}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
