"""A session whose core was replaced: what is sent again, and what cannot go on."""

from typing import Any

import msgspec
import pytest

from frontend.engine_session import EngineSession
from frontend.recovery import find_difference
from frontend.stat_loggers import StatLoggerGroup
from ipc.messages import AddRequest, Welcome
from tests.frontend.builders import (
    FakeClient,
    FakeCore,
    always,
    make_config,
    make_limits,
    make_request,
    make_tokenizer,
)


class RestartingClient(FakeClient):
    """A client whose core can be exchanged between two steps."""

    def __init__(self, core: FakeCore) -> None:
        super().__init__(core)
        self.due: list[Welcome] = []

    def replace_core(self, core: FakeCore, **welcome: Any) -> None:
        self.core = core
        self.due.append(msgspec.structs.replace(core.welcome, **welcome))

    def receive(self, timeout_s: float | None) -> Any:
        return (self.due.pop(), ()) if self.due else super().receive(timeout_s)


def make_session(client: FakeClient) -> EngineSession:
    config = make_config()
    return EngineSession(client, config, make_tokenizer(), StatLoggerGroup(config, []))


def test_another_core_gets_everything_open_again_oldest_first() -> None:
    limits = make_limits(max_num_seqs=2, max_waiting_requests=2)
    client = RestartingClient(FakeCore(always("hello"), limits))
    session = make_session(client)
    for name in ("a", "b"):
        session.add(make_request(name))
    session.step()
    session.step()
    session.add(make_request("c"))
    session.abort(["a"])
    for name in ("d", "e"):
        session.add(make_request(name))  # "e" finds no room in the core

    second = FakeCore(always("llo"), limits, epoch=1)
    client.replace_core(second)
    assert session.step() == []

    sent = [message for message in second.sent if isinstance(message, AddRequest)]
    assert [len(message.resumed) for message in sent] == [1, 0, 0]
    assert len(sent[0].resumed[0].token_ids) == 2
    assert [message.num_attempts for message in sent] == [2, 2, 2]
    arrivals = [message.arrival_time_s for message in sent]
    assert arrivals == sorted(arrivals)


def test_another_model_ends_what_is_open_with_both_digests() -> None:
    client = RestartingClient(FakeCore(always("hello")))
    session = make_session(client)
    session.add(make_request("a"))
    session.step()
    client.replace_core(FakeCore(always("x"), epoch=1), model_digest="other")

    (output,) = session.step()
    assert output.finished
    assert output.error is not None
    assert "model other" in output.error
    assert "model digest" in output.error
    session.add(make_request("b"))
    while session.num_unfinished:
        outputs = session.step()
    assert outputs[0].outputs[0].text == "x"


@pytest.mark.parametrize(
    ("change", "is_different"),
    [
        ({}, False),
        ({"epoch": 5}, False),
        ({"limits": make_limits(max_model_len=17, num_gpu_blocks=3)}, False),
        ({"model_digest": "x"}, True),
        ({"limits": make_limits(vocab_size=3)}, True),
    ],
)
def test_only_another_model_or_vocabulary_keeps_requests_from_going_on(
    change: dict[str, Any], is_different: bool
) -> None:
    before = FakeCore(always("")).welcome
    now = msgspec.structs.replace(before, **change)
    assert (find_difference(before, now) is not None) is is_different
