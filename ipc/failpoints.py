"""Named moments at which a process can be made to fail, for those who test what comes of it.

A spec is ``MOMENT=ACTION[:ARGUMENT][@COUNT][%TOKEN]``:

    core.before_schedule=kill@100      the hundredth time, SIGKILL
    worker.in_forward=sleep:40@7       the seventh time, sleep 40 seconds
    worker.before_forward=abort%4711   whenever a prompt with token 4711 enters, SIGABRT

Without a count the action happens each time. A process that was started again counts from one.

Nothing is asked while the engine runs: a moment that was armed replaces a method of one object
when its process starts, and one that was not armed leaves no trace at all.
"""

import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipc.config import DebugConfig
from ipc.errors import ConfigError

MOMENTS = (
    "core.before_schedule",
    "core.after_schedule",
    "core.before_publish",
    "core.after_publish",
    "worker.during_load",
    "worker.before_forward",
    "worker.in_forward",
    "worker.after_forward",
    "frontend.after_accept",
)
_ACTIONS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "abort": signal.SIGABRT,
    "segv": signal.SIGSEGV,
}
_SPEC = re.compile(
    r"(?P<moment>[a-z_.]+)=(?P<action>[a-z]+)(:(?P<argument>[0-9.]+))?"
    r"(@(?P<count>[1-9][0-9]*))?(%(?P<token>[0-9]+))?"
)


class FailpointError(Exception):
    """What the action ``raise`` raises."""


@dataclass
class Failpoint:
    """One armed moment: it counts, and acts when it is due."""

    moment: str
    action: str
    argument: float = 0.0
    count: int | None = None  # act at this time only; None: each time
    token: int | None = None  # count only what brings this token
    num_hits: int = 0

    def hit(self, *arguments: Any) -> None:
        """The moment has come, with these arguments of the method."""
        if self.token is not None and not _brings(arguments, self.token):
            return
        self.num_hits += 1
        if self.count in (None, self.num_hits):
            self._act()

    def _act(self) -> None:
        if self.action == "raise":
            raise FailpointError(f"failpoint {self.moment}")
        if self.action == "sleep":
            time.sleep(self.argument)
        else:
            os.kill(os.getpid(), _ACTIONS[self.action])


def parse(spec: str) -> Failpoint:
    """A failpoint from its text.

    Raises:
        ConfigError: no such moment or action, or not of this form.
    """
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise ConfigError(f"--failpoints: {spec[:80]!r} is not MOMENT=ACTION[:ARG][@COUNT][%TOKEN]")
    moment, action, argument = found["moment"], found["action"], found["argument"]
    if moment not in MOMENTS:
        raise ConfigError(f"--failpoints: no moment {moment!r}; there are {', '.join(MOMENTS)}")
    if action not in (*_ACTIONS, "raise", "sleep"):
        raise ConfigError(f"--failpoints: no action {action!r}")
    if (argument is not None) != (action == "sleep"):
        raise ConfigError(f"--failpoints: sleep alone takes an argument, in seconds: {spec[:80]!r}")
    if found["token"] is not None and moment != "worker.before_forward":
        raise ConfigError("--failpoints: a token is seen only at worker.before_forward")
    try:
        seconds = float(argument or 0)
    except ValueError as err:
        raise ConfigError(f"--failpoints: {argument!r} is no number") from err
    count, token = (None if found[key] is None else int(found[key]) for key in ("count", "token"))
    return Failpoint(moment, action, seconds, count, token)


def make_debug_config(specs: str | Sequence[str] | None, *, is_debug: bool) -> DebugConfig:
    """The checked config of these specs, before anything is started.

    Raises:
        ConfigError: unusable, or given without the flag that admits them.
    """
    specs = (specs,) if isinstance(specs, str) else tuple(specs or ())
    if specs and not is_debug:
        raise ConfigError("--failpoints breaks the engine on purpose: give --debug-faults as well")
    for spec in specs:
        parse(spec)
    return DebugConfig(specs)


def arm(
    debug: DebugConfig, prefix: str, owner: Any, moments: Mapping[str, tuple[str, str]]
) -> None:
    """Put what was armed for an object's moments before or after its methods.

    Args:
        prefix: the process, as moments begin.
        moments: what follows the prefix -> ("before" or "after", a method of ``owner``).
    """
    for failpoint in map(parse, debug.failpoints):
        process, _, moment = failpoint.moment.partition(".")
        if process == prefix and moment in moments:
            where, method = moments[moment]
            around = _before if where == "before" else _after
            setattr(owner, method, around(getattr(owner, method), failpoint))


def arm_core(debug: DebugConfig, core: Any, server: Any) -> None:
    """Arm the moments of a core's process."""
    around = {"before_schedule": ("before", "submit_steps")}
    around["after_schedule"] = ("after", "submit_steps")
    arm(debug, "core", core, around)
    around = {"before_publish": ("before", "_publish"), "after_publish": ("after", "_publish")}
    arm(debug, "core", server, around)


def arm_worker(debug: DebugConfig, worker: Any) -> None:
    """Arm the moments of a worker's process."""
    around = {"during_load": ("before", "_load_weights"), "before_forward": ("before", "execute")}
    around["after_forward"] = ("after", "execute")
    arm(debug, "worker", worker, around)
    if debug.failpoints:
        start = worker.start

        def start_and_arm(*arguments: Any, **named: Any) -> Any:
            ready = start(*arguments, **named)
            # Not before: forwards that warm up are no steps of requests.
            arm(debug, "worker", worker._runner, {"in_forward": ("before", "_forward")})
            return ready

        worker.start = start_and_arm


def arm_frontend(debug: DebugConfig, engine: Any) -> None:
    """Arm the moments of an API process."""
    for failpoint in map(parse, debug.failpoints):
        if failpoint.moment == "frontend.after_accept":
            engine.add_request = _after_awaiting(engine.add_request, failpoint)


def _before(method: Callable[..., Any], failpoint: Failpoint) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        failpoint.hit(*arguments)
        return method(*arguments, **named)

    return call


def _after(method: Callable[..., Any], failpoint: Failpoint) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        result = method(*arguments, **named)
        failpoint.hit(*arguments)
        return result

    return call


def _after_awaiting(
    method: Callable[..., Awaitable[Any]], failpoint: Failpoint
) -> Callable[..., Awaitable[Any]]:
    async def call(*arguments: Any, **named: Any) -> Any:
        result = await method(*arguments, **named)
        failpoint.hit()
        return result

    return call


def _brings(arguments: Sequence[Any], token: int) -> bool:
    """Whether a step's plan enters a row with this token."""
    return any(token in row.token_ids for plan in arguments[:1] for row in plan.new_rows)
