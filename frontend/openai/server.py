"""The server process: socket, engine, signals, exit codes.

It ends with ``ipc.errors.ExitCode``: clean after a signal, else why the engine was given up.
"""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import CollectorRegistry

from frontend.openai.api_server import CorsOptions, build_app
from frontend.openai.connections import DEFAULT_MAX_CONNECTIONS, ConnectionTable, raise_file_limit
from frontend.openai.http_protocol import BoundedHttpProtocol
from frontend.openai.keep_alive import KeepAlive
from frontend.openai.state import ServerOptions, ServerState, make_state
from frontend.openai.user_middleware import UserMiddleware
from ipc.errors import ConfigError, EngineStartError
from ipc.failpoints import arm_frontend

if TYPE_CHECKING:
    from frontend.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

BACKLOG = 4096
SEND_BUFFER_BYTES = 256 << 10  # of the kernel, per connection: more only hides slow readers
GC_THRESHOLDS = (50_000, 50, 100)  # in case the server is never idle
TICKS_PER_GC = 10  # idle for a second at most before garbage is collected
TICKS_PER_STATS_LINE = 100  # ten seconds: what the last requests did is said soon, not at the next
GRACE_AFTER_DRAIN_S = 1.0  # for aborted requests to tell their clients
GRACE_AFTER_CLOSE_S = 2  # for connections to take what was written
GRACE_WHEN_FORCED_S = 0.4
HARD_EXIT_S = 5.0  # after the limit, whatever hangs
SECOND_SIGNAL_S = 2.0
GRACE_AFTER_DEATH_S = 1.0  # open requests still get their error


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where and how the server listens; each field is a flag of the same name."""

    host: str | None = None  # None: all interfaces
    port: int = 8000
    shares_port: bool = False  # other API processes of this server listen on it too
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = int(ssl.CERT_NONE)
    uvicorn_log_level: str = "info"
    access_log: bool = True
    shutdown_timeout: float = 30.0
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    cors: CorsOptions = field(default_factory=CorsOptions)
    middleware: tuple[UserMiddleware, ...] = ()


def bind(options: ListenOptions) -> socket.socket:
    """The listening socket, taken before the model loads so that a clash is known at once.

    Raises:
        EngineStartError: the address is taken, or cannot be listened on.
    """
    where = options.uds or f"{options.host or '*'}:{options.port}"
    try:
        if options.uds is not None:
            listener = _bind_unix(options.uds)
        else:
            listener = _bind_tcp(options.host, options.port, shares_port=options.shares_port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return listener
    except (OSError, OverflowError) as err:
        raise EngineStartError(f"cannot listen on {where}: {err}") from err


def _bind_tcp(host: str | None, port: int, *, shares_port: bool) -> socket.socket:
    listen = partial(socket.create_server, backlog=BACKLOG, reuse_port=shares_port)
    if host is None:
        try:
            return listen(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except (OSError, ValueError) as err:  # ValueError: no dual stack on this platform
            if getattr(err, "errno", None) == errno.EADDRINUSE:
                raise
        return listen(("", port))  # a host without IPv6
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return listen(address[:2], family=family)


def _bind_unix(path: str) -> socket.socket:
    """Listen on a path. A socket that nobody listens on is a leftover, and is replaced."""
    if os.path.exists(path):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError("somebody listens there already")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn's server, with an orderly end.

    The first signal drains: nothing new is admitted, open requests finish. When the time is up,
    what is left is aborted, and its streams end with that reason. A second signal does so at once.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, shutdown_timeout: float) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._state = state
        self._keep_alive = KeepAlive(state)
        self._shutdown_timeout = shutdown_timeout
        self._drain_until: float | None = None
        self._dead_since: float | None = None
        self._has_aborted = False
        self._is_forced = False  # by a second signal
        self._num_collected = 0  # requests whose garbage was collected

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the interpreter at SIGINT and SIGTERM."""
        if self._state.is_draining:
            self._is_forced = True
            self._drain_until = time.monotonic()
            _end_within(SECOND_SIGNAL_S)
            return
        self._state.is_draining = True
        self._drain_until = time.monotonic() + self._shutdown_timeout
        _end_within(self._shutdown_timeout + HARD_EXIT_S)
        logger.info("stopping: %d requests are open", self._state.num_open)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop."""
        self._keep_alive.tick(time.monotonic())
        if counter % TICKS_PER_STATS_LINE == TICKS_PER_STATS_LINE - 1:
            await self._state.engine.do_log_stats()
        if counter % TICKS_PER_GC == TICKS_PER_GC - 1:
            self._collect_garbage()
        if self._drain_until is not None and not self.should_exit:
            await self._drain(self._drain_until)
        elif self._state.engine.errored:
            self._leave_dead_engine()
        return await super().on_tick(counter)

    def _collect_garbage(self) -> None:
        """Look for the garbage of answered requests while no stream is held up by it."""
        num_requests = self.server_state.total_requests
        if self._state.num_open == 0 and num_requests != self._num_collected:
            self._num_collected = num_requests
            gc.collect()

    async def _drain(self, until: float) -> None:
        now = time.monotonic()
        grace_s = GRACE_WHEN_FORCED_S if self._is_forced else GRACE_AFTER_DRAIN_S
        if self._state.num_open == 0 or now > until + grace_s:
            self.should_exit = True
            self.force_exit = self._is_forced and self._state.num_open > 0
        elif now > until and not self._has_aborted:
            self._has_aborted = True
            logger.warning("aborting %d requests: the time is up", len(self._state.open_req_ids))
            await self._state.engine.abort(list(self._state.open_req_ids))

    def _leave_dead_engine(self) -> None:
        now = time.monotonic()
        if self._dead_since is None:
            self._dead_since = now
            error = self._state.engine.dead_error
            self.exit_code = int(error.exit_code)
            logger.error("the engine is dead: %s", error)
        elif now > self._dead_since + GRACE_AFTER_DEATH_S:
            self.should_exit = True


async def serve(
    engine: "AsyncLLM",
    listener: socket.socket,
    metrics: CollectorRegistry,
    options: ServerOptions,
    listen: ListenOptions,
) -> int:
    """Wait for the engine, serve until a signal or the engine's death; the exit code."""
    is_clean = False
    try:
        if not await _ready_or_signal(engine):
            return 0
        arm_frontend(engine.vllm_config.debug_config, engine)
        state = make_state(engine, options, metrics, created=int(time.time()))
        app = build_app(state, listen.cors, listen.middleware)
        server = HttpServer(uvicorn_config(app, listen), state, listen.shutdown_timeout)
        settle_garbage_collection()
        logger.info("serving %s on %s", state.model_name, _where(listener))
        await server.serve(sockets=[listener])
        is_clean = not server.force_exit
        return server.exit_code
    finally:
        engine.shutdown(timeout=HARD_EXIT_S if is_clean else 1.0)


def _end_within(seconds: float) -> None:
    """Whatever hangs: the kernel ends this process then, and all others end with it."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def settle_garbage_collection() -> None:
    """Take what start-up made out of the collector's sight, and make it run seldom.

    Tokens make short-lived objects without cycles: there is nothing to find among them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def _ready_or_signal(engine: "AsyncLLM") -> bool:
    """True when the engine is ready; False when a signal to stop came first."""
    loop = asyncio.get_running_loop()
    waiting = asyncio.ensure_future(engine.wait_until_ready())
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, waiting.cancel)
    try:
        await asyncio.wait([waiting])
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    if waiting.cancelled():
        return False
    waiting.result()
    return True


def check_certificates(listen: ListenOptions) -> None:
    """Load what the TLS flags name, before an engine is started.

    Raises:
        ConfigError: certificates that cannot be used.
    """
    if not listen.ssl_certfile:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            if getattr(listen, name):
                raise ConfigError(f"--{name.replace('_', '-')} needs --ssl-certfile")
        return
    if listen.ssl_cert_reqs and not listen.ssl_ca_certs:
        raise ConfigError(
            f"--ssl-cert-reqs {listen.ssl_cert_reqs} needs --ssl-ca-certs: without authorities no "
            f"client's certificate can be checked"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(listen.ssl_certfile, listen.ssl_keyfile)
        if listen.ssl_ca_certs:
            context.load_verify_locations(listen.ssl_ca_certs)
    except OSError as err:  # ssl.SSLError is one
        raise ConfigError(f"--ssl-keyfile, --ssl-certfile or --ssl-ca-certs: {err}") from err


def uvicorn_config(app: Any, listen: ListenOptions) -> uvicorn.Config:
    """uvicorn's configuration."""
    return uvicorn.Config(
        app,
        http=partial(  # type: ignore[arg-type]  # uvicorn calls it, as it would the class
            BoundedHttpProtocol, table=ConnectionTable(raise_file_limit(listen.max_connections))
        ),
        ws="none",
        loop="auto",
        log_config=None,  # its lines go where this process's lines go
        log_level=listen.uvicorn_log_level,
        access_log=listen.access_log,
        ssl_keyfile=listen.ssl_keyfile,
        ssl_certfile=listen.ssl_certfile,
        ssl_ca_certs=listen.ssl_ca_certs,
        ssl_cert_reqs=listen.ssl_cert_reqs,
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_AFTER_CLOSE_S,
        server_header=False,
    )


def run(
    make_engine: Callable[[CollectorRegistry], "AsyncLLM"],
    options: ServerOptions,
    listen: ListenOptions,
) -> int:
    """Bind, start the engine, serve; the exit code.

    Args:
        make_engine: called in the event loop with the registry that its metrics go to.

    Raises:
        EngineError: the start failed; nothing is left behind.
    """
    listener = bind(listen)

    async def start_and_serve() -> int:
        metrics = CollectorRegistry()
        return await serve(make_engine(metrics), listener, metrics, options, listen)

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(start_and_serve())
    finally:
        listener.close()
        if listen.uds is not None and os.path.exists(listen.uds):
            os.unlink(listen.uds)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.new_event_loop


def _where(listener: socket.socket) -> str:
    name = listener.getsockname()
    return name if isinstance(name, str) else f"port {name[1]}"
