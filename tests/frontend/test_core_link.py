"""The connection below the clients: credits, pings, messages that wait, results of calls."""

import time
from pathlib import Path
from typing import Any

import pytest

from frontend import core_link
from frontend.core_engine import Engine
from frontend.core_link import CoreLink, read_result
from ipc.channel import RouterChannel, wait
from ipc.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    ProtocolError,
    UnsupportedError,
)
from ipc.messages import (
    PROTOCOL_VERSION,
    Ack,
    CallResult,
    EngineFailed,
    EngineOutputs,
    Goodbye,
    Heartbeat,
    Hello,
    Refused,
    SchedulerStats,
    Welcome,
    WorkerInfo,
    encoder,
    frontend_to_core_decoder,
    schema_hash,
)
from ipc.operations import CheckWorkers, GetStats, IsPaused
from tests.engine_core.fake_core import make_limits

LIMIT_S = 10.0


class Rig:
    """A link and the bare router at its other end."""

    def __init__(self, *, credits: int = 8, has_pings: bool = False) -> None:
        self.router: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
        self.link = CoreLink(self.router.bind(), curve_keys=None, has_pings=has_pings)
        self.peer, hello = self.hear()
        assert isinstance(hello, Hello)
        limits = make_limits(credits)
        self.welcome = Welcome(PROTOCOL_VERSION, schema_hash(), 0, "digest", limits, b"")

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close(says_goodbye=False)
        self.router.close()

    def hear(self) -> tuple[bytes, Any]:
        """The next message of the link."""
        while (received := self.router.receive()) is None:
            assert wait([self.router], LIMIT_S), "the link said nothing"
        return received[0], received[1]

    def say(self, *messages: Any) -> None:
        """Send messages to the link, and wait until they are there."""
        for message in messages:
            assert self.router.send(self.peer, message)
        assert wait([self.link.channel], LIMIT_S)

    def greet(self) -> None:
        """Welcome the link."""
        self.say(self.welcome)
        while self.link.welcome is None:
            assert self.link.receive() is None

    def take(self) -> Any:
        """The next message that the link hands on."""
        deadline = time.monotonic() + LIMIT_S
        while (received := self.link.receive()) is None:
            assert time.monotonic() < deadline
            wait([self.link.channel], 0.1)
        return received[0]


def test_a_welcome_is_kept_and_not_handed_on() -> None:
    with Rig() as rig:
        rig.greet()

        assert rig.link.welcome == rig.welcome


def test_credits_go_back_a_quarter_at_a_time() -> None:
    with Rig(credits=8) as rig:
        rig.greet()
        for step in range(5):
            rig.say(EngineOutputs(0, step, []))
            assert rig.take().step_id == step
            rig.link.acknowledge()

        assert [rig.hear()[1] for _ in range(2)] == [Ack(2), Ack(2)]
        assert rig.router.receive() is None


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (EngineFailed(0, "out of luck", 4), EngineDeadError("out of luck")),
        (Refused("no"), ProtocolError("the engine refused us: no")),
    ],
    ids=["last words", "refusal"],
)
def test_bad_news_is_raised(message: Any, error: EngineError) -> None:
    with Rig() as rig:
        rig.greet()
        rig.say(message)

        with pytest.raises(type(error), match=str(error)):
            rig.take()


def test_pings_are_sent_only_where_nothing_better_watches() -> None:
    for has_pings in (False, True):
        with Rig(has_pings=has_pings) as rig:
            rig.greet()
            rig.link.tick()
            rig.link.tick()  # too soon for another

            assert bool(wait([rig.router], 0.2)) is has_pings
            if has_pings:
                assert isinstance(rig.hear()[1], Heartbeat)
                assert rig.router.receive() is None


def test_silence_counts_from_the_first_unanswered_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_link, "PING_EVERY_S", 0.0)
    now = [100.0]
    monkeypatch.setattr(core_link.time, "monotonic", lambda: now[0])
    with Rig(has_pings=True) as rig:
        rig.greet()
        now[0] += 3600.0  # the caller did something else for an hour: no death
        rig.link.tick()
        now[0] += 4.0
        rig.link.tick()
        rig.say(Heartbeat(0.0))
        rig.link.receive()
        rig.link.tick()
        now[0] += 4.9
        rig.link.tick()
        now[0] += 0.2
        with pytest.raises(EngineDeadError, match=r"is silent for 5\.1 s"):
            rig.link.tick()


def test_messages_without_room_wait_in_order_and_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_link, "MAX_UNSENT", 3)
    with Rig() as rig:
        rig.greet()
        has_room = False
        real_send = rig.link.channel.try_send
        monkeypatch.setattr(
            rig.link.channel, "try_send", lambda *parts: has_room and real_send(*parts)
        )
        for number in range(3):
            rig.link.send(Ack(number))
        with pytest.raises(EngineOverloadedError, match="has not taken 3 messages"):
            rig.link.send(Ack(3))
        assert rig.link.has_unsent

        has_room = True
        assert rig.link.receive() is None
        assert not rig.link.has_unsent
        assert [rig.hear()[1] for _ in range(3)] == [Ack(0), Ack(1), Ack(2)]


def test_a_goodbye_is_said_to_who_can_hear_it() -> None:
    with Rig() as rig:
        rig.greet()
        rig.link.close(says_goodbye=True)
        assert isinstance(rig.hear()[1], Goodbye)

    with Rig() as rig:
        rig.link.close(says_goodbye=True)  # never welcomed
        assert not wait([rig.router], 0.1)


def test_results_have_the_type_that_the_operation_documents() -> None:
    stats = SchedulerStats(num_running=3)
    info = WorkerInfo(0, 1, "cpu", 2, 3)

    assert read_result(GetStats(), CallResult(1, encoder.encode(stats))) == stats
    assert read_result(CheckWorkers(), CallResult(1, encoder.encode([info]))) == [info]
    assert read_result(IsPaused(), CallResult(1, encoder.encode(True))) is True


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("UnsupportedError", UnsupportedError),
        ("EngineError", EngineError),
        ("SystemExit", EngineError),
        ("IntEnum", EngineError),
        ("__name__", EngineError),
    ],
)
def test_errors_have_the_class_that_the_core_named_if_it_is_one_of_ours(
    kind: str, expected: type[Exception]
) -> None:
    with pytest.raises(EngineError) as caught:
        read_result(IsPaused(), CallResult(1, None, "why", kind))
    assert type(caught.value) is expected
    assert str(caught.value) == "why"


def test_an_address_where_nobody_seems_to_listen_is_waited_for_only_shortly(tmp_path: Path) -> None:
    engine = Engine(f"ipc://{tmp_path}/nobody", None)
    assert engine.welcome_limit_s == 5.0
    engine.close()


def test_an_engine_that_is_known_to_run_may_be_busy() -> None:
    with Rig() as rig:
        engine = Engine(rig.link.address, None)
        assert engine.welcome_limit_s == 60.0
        engine.close()
