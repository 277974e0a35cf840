"""The engine core's process from its first to its last moment: start, serve, say why it ended.

Whatever goes wrong becomes one ``EngineFailed`` with the real cause and an exit code that tells
the failures apart; the traceback goes to stderr.
"""

import logging
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from engine_core.core_server import CoreServer, settle_garbage_collection
from engine_core.drain import Drain
from engine_core.flight_record import FlightRecord
from engine_core.progress import ProgressPage
from engine_core.start import StartedCore, start_core
from ipc.channel import RouterChannel
from ipc.config import EngineConfig, decode_config
from ipc.curve import load_server_keys
from ipc.errors import ConfigError, EngineDeadError, EngineStartError, ExitCode
from ipc.failpoints import arm_core
from ipc.messages import (
    EngineFailed,
    FrontendToCore,
    LoadProgress,
    Welcome,
    frontend_to_core_decoder,
)
from ipc.processes import SignalWatch, die_with
from ipc.stacks import print_stacks_when_asked
from ipc.status import Listening, StatusWriter

_LAST_WORDS_S = 1.0  # for the last messages to leave before the sockets close

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CoreOptions:
    """What the supervisor tells a core besides its config, which comes through stdin."""

    listen: str
    curve_keys: Path | None
    epoch: int
    status_fd: int
    death_fd: int
    record_fd: int
    progress_fd: int | None = None
    drain_s: float = 0.0  # how long open requests may go on after a signal to stop


class CoreProcess:
    """Owns what lives as long as the process: the status pipe and the epoch."""

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self._status = StatusWriter(options.status_fd)
        self._phase = "starting"
        fd = options.progress_fd
        self._progress = None if fd is None else ProgressPage(fd)

    def run(self) -> ExitCode:
        """Start, serve until told to stop, and clean up."""
        die_with(self._options.death_fd)
        print_stacks_when_asked()
        try:
            config = with_own_loop(decode_config(sys.stdin.buffer.read()))
            channel = self._bind()
        except ConfigError as err:
            return self._fail(ExitCode.CONFIG, str(err))
        try:
            return self._start_and_serve(config, channel)
        finally:
            channel.close(linger_s=_LAST_WORDS_S)

    def _bind(self) -> "RouterChannel[FrontendToCore]":
        """Listen before anything slow, so that an address in use is an error at once."""
        keys = None if (path := self._options.curve_keys) is None else load_server_keys(path)
        channel = RouterChannel(frontend_to_core_decoder, curve_keys=keys)
        self._address = channel.bind(self._options.listen)
        return channel

    def _start_and_serve(
        self, config: EngineConfig, channel: "RouterChannel[FrontendToCore]"
    ) -> ExitCode:
        try:
            started = start_core(
                config,
                on_progress=self._note_progress,
                epoch=self._options.epoch,
                record=FlightRecord(self._options.record_fd),
            )
        except ConfigError as err:
            return self._fail(ExitCode.CONFIG, str(err))
        except EngineStartError as err:
            return self._fail(err.exit_code, str(err), err.killed_by)
        except Exception as err:
            logger.exception("the engine core could not start")
            return self._fail(ExitCode.START_FAILED, f"{self._phase}: {type(err).__name__}: {err}")
        try:
            return self._serve(started, channel)
        finally:
            started.executor.shutdown()

    def _serve(self, started: StartedCore, channel: "RouterChannel[FrontendToCore]") -> ExitCode:
        signals = SignalWatch(signal.SIGTERM, signal.SIGINT)
        welcome = self._introduce(started.welcome)
        drain = Drain(started.core, self._options.drain_s)
        server = CoreServer(
            started.core, started.executor, channel, welcome, signals, drain, self._progress
        )
        arm_core(decode_config(welcome.config).debug_config, started.core, server)
        settle_garbage_collection()
        self._status.write(Listening(self._address, os.getpid(), self._options.epoch))
        try:
            server.run()
        except EngineDeadError as err:
            server.announce_end(str(err), err.exit_code)
            return self._fail(err.exit_code, str(err), err.killed_by)
        except Exception as err:
            logger.exception("the engine core failed")
            reason = f"the engine core failed: {type(err).__name__}: {err}"
            server.announce_end(reason, ExitCode.CORE_DIED)
            return self._fail(ExitCode.CORE_DIED, reason)
        return ExitCode.CLEAN

    def _note_progress(self, progress: LoadProgress) -> None:
        self._phase = progress.phase
        self._status.write(progress)

    def _introduce(self, welcome: Welcome) -> Welcome:
        """Tell frontends whom to watch: this process, and who replaces it when it is lost."""
        recovers = decode_config(welcome.config).parallel_config.enable_recovery
        supervisor_pid = os.getppid() if recovers else 0
        return msgspec.structs.replace(welcome, core_pid=os.getpid(), supervisor_pid=supervisor_pid)

    def _fail(self, exit_code: ExitCode, reason: str, killed_by: int = 0) -> ExitCode:
        self._status.write(EngineFailed(self._options.epoch, reason, exit_code, killed_by))
        return exit_code


def with_own_loop(config: EngineConfig) -> EngineConfig:
    """What a core in a process of its own does besides: it can wake up to plan a step."""
    config = with_worker_processes(config)
    return replace(config, scheduler_config=replace(config.scheduler_config, plans_late=True))


def with_worker_processes(config: EngineConfig) -> EngineConfig:
    """In a process of its own, the core has workers in theirs unless the user says otherwise.

    So it answers while a step runs, and outlives nobody's crash unreported.
    """
    parallel = config.parallel_config
    if parallel.distributed_executor_backend is not None or parallel.executor_class is not None:
        return config
    return replace(config, parallel_config=replace(parallel, distributed_executor_backend="mp"))
