"""The engine at the other end: the link to its present core, and the way to the next one.

A core that is lost is replaced by its supervisor, at the same address and with the next epoch.
Until the new one says Welcome nothing is sent: everything open is sent anew then, by whoever keeps
the journal. The engine itself ends when its supervisor does, or at the first loss where it has
none that replaces cores. Never waits.
"""

import logging
import os
import time

from frontend.core_link import CoreLink, Received
from frontend.launcher import Launch
from ipc.addresses import find_listener
from ipc.curve import CurveClientKeys
from ipc.errors import EngineDeadError, EngineRestartingError, ExitCode, ProtocolError
from ipc.messages import Call, FrontendToCore, Welcome
from ipc.operations import AnyOperation
from ipc.processes import is_readable
from ipc.tensors import Frames

WELCOME_LIMIT_S = 60.0  # for a core that runs, but may be busy
NOBODY_LIMIT_S = 5.0  # for an address where perhaps nobody listens
RETURN_LIMIT_S = 600.0  # for a new core, where nobody can be watched to know that none will come

logger = logging.getLogger(__name__)


class Engine:
    """Owns the link and the descriptors that tell of the ends of core and engine.

    Args:
        engine: a ``Launch``, which then belongs to this object, or the address of a daemon.
    """

    def __init__(self, engine: Launch | str, curve_keys: CurveClientKeys | None) -> None:
        self.launch = engine if isinstance(engine, Launch) else None
        self.welcome: Welcome | None = None  # of the latest core that said one
        self.loss: EngineDeadError | None = None  # set while there is no core
        self.needs_settling = False  # ``settle`` is to be called: what to watch will change
        self._lost_s = 0.0
        self._curve_keys = curve_keys
        self._is_closed = False
        self._owner_pid = os.getpid()
        self._core_pidfd: int | None = None
        self._own_pidfd: int | None = None  # of somebody else's engine
        self._outdated_pidfds: list[int] = []  # closed once nobody watches them any more
        if isinstance(engine, Launch):
            address = engine.wait_ready()
        else:
            address = engine
            self._own_pidfd = _watch(find_listener(address))
        try:
            self.link = self._connect(address)
        except BaseException:
            self._let_go()
            raise

    @property
    def end_pidfd(self) -> int | None:
        """Readable when the engine has ended for good; None when that cannot be seen."""
        return self._own_pidfd if self.launch is None else self.launch.pidfd

    @property
    def pidfds(self) -> list[int]:
        """What to wait for besides the link."""
        return [fd for fd in (self.end_pidfd, self._core_pidfd) if fd is not None]

    @property
    def welcome_limit_s(self) -> float:
        """How long to wait for the first core's welcome."""
        return NOBODY_LIMIT_S if self.end_pidfd is None else WELCOME_LIMIT_S

    @property
    def needs_ticks(self) -> bool:
        """Whether ``tick`` has something to do while nothing arrives."""
        link = self.link
        return link.has_pings or link.has_unsent or link.welcome is None

    def send(self, message: FrontendToCore, frames: Frames = ()) -> None:
        """Send to the present core; while there is none, nothing: the journal brings it up.

        Raises:
            EngineOverloadedError: too much is kept already; nothing was sent.
        """
        if self.loss is None:
            self.link.send(message, frames)

    def make_call(self, operation: AnyOperation) -> Call:
        """A call for the present core.

        Raises:
            EngineRestartingError: there is none.
        """
        if self.loss is not None:
            raise self.restarting_error()
        return self.link.make_call(operation)

    def restarting_error(self) -> EngineRestartingError:
        """What those are told who cannot wait for the next core."""
        return EngineRestartingError(f"the engine is restarting: {self.loss}")

    def receive(self) -> Received | None:
        """The next message, or None; the ``Welcome`` of each core but the first is one.

        Raises:
            EngineDeadError: the engine said that it ends.
            ProtocolError: the core does not accept this frontend.
        """
        try:
            received = self.link.receive()
        except EngineDeadError as err:
            self.lose(err)
            return None
        except ProtocolError as err:
            if self.link.welcome is None:
                raise
            self.lose(EngineDeadError(str(err)))  # it is another core than the one we know
            return None
        if self.link.welcome is not None and self.link.welcome is not self.welcome:
            welcome = self._meet(self.link.welcome)
            if welcome is not None:
                return welcome, []  # and nothing else: no core speaks before it is spoken to
        return None if self.loss is not None else received

    def acknowledge(self) -> None:
        """Give back credits, once that is worth a message."""
        if self.loss is None and self.link.welcome is not None:
            self.link.acknowledge()

    def tick(self) -> None:
        """Do what time asks for.

        Raises:
            EngineDeadError: the core has been silent for too long, or did not come back.
        """
        try:
            self.link.tick()
        except EngineDeadError as err:
            self.lose(err)
        if self.loss is not None and self.end_pidfd is None:
            waited_s = time.monotonic() - self._lost_s
            if waited_s > RETURN_LIMIT_S:
                raise EngineDeadError(f"{self.loss}, and no core came back in {waited_s:.0f} s")

    def lose(self, cause: EngineDeadError | None = None) -> None:
        """Note that the core is lost, whoever noticed it.

        Raises:
            EngineDeadError: nobody replaces it.
        """
        if self.loss is not None:
            return
        cause = cause or EngineDeadError(f"the engine core at {self.link.address} died")
        is_farewell = cause.exit_code == ExitCode.CLEAN and self.end_pidfd is None
        if self.welcome is None or not self.welcome.supervisor_pid or is_farewell:
            raise cause
        self.loss = cause
        self.needs_settling = True
        self._lost_s = time.monotonic()
        logger.warning("the engine core is lost, waiting for another one: %s", cause)

    def settle(self) -> None:
        """Leave what is outdated behind; nothing of it may be watched now.

        A lost core's connection is replaced once its process is gone: what listens at its
        address from then on is the next core.
        """
        self.needs_settling = False
        for pidfd in self._outdated_pidfds:
            os.close(pidfd)
        self._outdated_pidfds.clear()
        if self.loss is None or self.link.welcome is None:
            return
        if self._core_pidfd is None or is_readable(self._core_pidfd):
            address = self.link.address
            self.link.close(says_goodbye=False)
            self._drop_core_pidfd()
            self.link = self._connect(address)

    def describe_end(self) -> EngineDeadError:
        """The error for an engine whose process has ended."""
        failure = reason = None
        if self.launch is not None:
            reason, failure = self.launch.describe_end(), self.launch.failure
        if failure is not None:
            return EngineDeadError(failure.reason, failure.exit_code)
        if self.loss is not None:
            return EngineDeadError(str(self.loss), self.loss.exit_code)
        return EngineDeadError(reason or f"the engine at {self.link.address} ended")

    def close(self) -> None:
        """Leave the engine, and end it if it is ours. Harmless when repeated, or in a fork."""
        if not self._is_closed and os.getpid() == self._owner_pid:
            self._is_closed = True
            is_gone = any(is_readable(fd) for fd in self.pidfds)
            self.link.close(says_goodbye=self.loss is None and not is_gone)
            self._let_go()

    def _connect(self, address: str) -> CoreLink:
        return CoreLink(address, curve_keys=self._curve_keys, has_pings=self.end_pidfd is None)

    def _meet(self, welcome: Welcome) -> Welcome | None:
        """Note a core's welcome; the welcome itself when it stands in for one that was lost."""
        before, self.welcome = self.welcome, welcome
        self.needs_settling = True
        if before is not None and before.epoch == welcome.epoch and self.loss is None:
            return None  # it said it twice
        if welcome.supervisor_pid:
            self._watch_core(welcome, is_first=before is None)
        if before is None:
            return None
        logger.warning("the engine is back after %.2f s", time.monotonic() - self._lost_s)
        self.loss = None
        return welcome

    def _watch_core(self, welcome: Welcome, *, is_first: bool) -> None:
        """From now on watch this core, and its supervisor for the end of the engine."""
        self._drop_core_pidfd()
        if self.launch is None and is_first:
            is_local = find_listener(self.link.address) == welcome.core_pid
            if self._own_pidfd is not None:
                self._outdated_pidfds.append(self._own_pidfd)
            # Elsewhere, or in another process namespace, the numbers would mean somebody else.
            self._own_pidfd = _watch(welcome.supervisor_pid) if is_local else None
            self.link.has_pings = not is_local
        if self.end_pidfd is not None:
            self._core_pidfd = _watch(welcome.core_pid)
            if self._core_pidfd is None:
                self.lose()  # dead already

    def _drop_core_pidfd(self) -> None:
        if self._core_pidfd is not None:
            self._outdated_pidfds.append(self._core_pidfd)
            self._core_pidfd = None
            self.needs_settling = True

    def _let_go(self) -> None:
        self._drop_core_pidfd()
        for pidfd in self._outdated_pidfds:
            os.close(pidfd)
        self._outdated_pidfds.clear()
        if self._own_pidfd is not None:
            os.close(self._own_pidfd)
            self._own_pidfd = None
        if self.launch is not None:
            self.launch.terminate()


def _watch(pid: int | None) -> int | None:
    """A descriptor that becomes readable when a process of this machine ends."""
    if pid is None:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
