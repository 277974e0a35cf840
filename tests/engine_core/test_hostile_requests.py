"""A frontend that trusts nobody's checks: every field of a request at values that break things.

The bytes come as from the wire. Either they do not decode, or the request is refused with a field
and a sentence, or it becomes branches that the scheduler and a worker can run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine_core.block_hash import BlockHasher
from engine_core.intake import Intake
from engine_core.request_checks import RequestLimits
from ipc.config import SchedulerConfig
from ipc.errors import RequestError
from ipc.messages import AddRequest, encoder, frontend_to_core_decoder
from ipc.sampling_params import SamplingParams
from tests.engine_core.builders import CLIENT, Rig, make_request
from tests.fuzz.values import BOUNDARIES

VOCAB_SIZE = 61
LIMITS = RequestLimits(
    vocab_size=VOCAB_SIZE, max_model_len=64, max_logprobs=20, num_usable_blocks=8, block_size=8
)
HOSTILE: list[Any] = [
    value for value in BOUNDARIES if not isinstance(value, int) or -(2**63) <= value < 2**64
]
HOSTILE += [
    2**64 - 1, [2**63], [[2**63]], {2**40: 1.0}, {-1: 1.0}, ["x" * 10**6], ["x"] * 2000,
    [[]] * 3000, [list(range(2000))], [[-1, 70]], msgspec.msgpack.Ext(5, b"x"),
    b"\x00\xff", [b"x"], "x" * 10**6,
]  # fmt: skip


def intake() -> Intake:
    return Intake(SchedulerConfig(), BlockHasher(b"k" * 16, 8), LIMITS, is_caching=True)


def encoded(message: AddRequest) -> list[Any]:
    fields: list[Any] = msgspec.msgpack.decode(encoder.encode(message))
    return fields


def what_comes_of(data: bytes) -> str:
    """ "dropped", "refused" or "accepted"; anything else raises."""
    try:
        message = frontend_to_core_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return "dropped"
    assert isinstance(message, AddRequest)
    try:
        group = intake().admit(b"client", message, now_s=1.0, newest_place=0)
    except RequestError as err:
        return "refused" if err.param is not None else "refused without a field"
    assert 1 <= len(group.branches) <= 128
    for branch in group.branches:
        params = branch.row_params
        for ids in (params.stop_token_ids, *params.bad_words_token_ids):
            assert all(0 <= i < VOCAB_SIZE for i in ids)
        assert all(0 <= i < VOCAB_SIZE for i in params.allowed_token_ids or ())
        assert all(0 <= i < VOCAB_SIZE for i, _ in params.logit_bias)
        assert branch.max_output_tokens <= 64
        msgspec.msgpack.encode(params)
    return "accepted"


def test_the_pattern_itself_is_accepted() -> None:
    message = AddRequest("r", [1, 2, 3], SamplingParams(seed=1, max_tokens=2), 0.0)
    assert what_comes_of(encoder.encode(message)) == "accepted"


def outcomes_of_request_field(field: str) -> list[str]:
    """What comes of each hostile value in a field of the request."""
    message = AddRequest("r", [1, 2, 3], SamplingParams(seed=1, max_tokens=2), 0.0)
    fields = encoded(message)
    place = 1 + AddRequest.__struct_fields__.index(field)  # the tag comes first
    fields += [None] * (place + 1 - len(fields))
    outcomes = []
    for value in HOSTILE:
        fields[place] = value
        outcomes.append(what_comes_of(_pack(fields)))
    return outcomes


def outcomes_of_params_field(field: str) -> list[str]:
    """What comes of each hostile value in a field of the parameters, alone and beside others."""
    message = AddRequest("r", [1, 2, 3], SamplingParams(seed=1, max_tokens=2), 0.0)
    fields = encoded(message)
    place = 1 + AddRequest.__struct_fields__.index("params")
    outcomes = []
    for value in HOSTILE:
        for more in ({}, {"n": 3, "temperature": 0.5}, {"temperature": 0.0}):
            fields[place] = {"seed": 1, "max_tokens": 2, **more, field: value}
            outcomes.append(what_comes_of(_pack(fields)))
    return outcomes


@pytest.mark.parametrize("field", AddRequest.__struct_fields__)
def test_a_hostile_field_of_a_request_harms_nobody(field: str) -> None:
    outcomes = set(outcomes_of_request_field(field))
    assert outcomes <= {"dropped", "refused", "accepted"}
    assert outcomes & {"dropped", "refused"}


@pytest.mark.parametrize("field", SamplingParams.__struct_fields__)
def test_a_hostile_field_of_the_parameters_harms_nobody(field: str) -> None:
    outcomes = set(outcomes_of_params_field(field))
    assert outcomes <= {"dropped", "refused", "accepted"}
    assert outcomes & {"dropped", "refused"}


def all_outcomes() -> dict[str, list[str]]:
    """Every field's outcomes."""
    found = {name: outcomes_of_request_field(name) for name in AddRequest.__struct_fields__}
    return found | {
        name: outcomes_of_params_field(name) for name in SamplingParams.__struct_fields__
    }


def test_the_same_is_refused_where_assertions_check_nothing() -> None:
    program = (
        "import json\n"
        "from tests.engine_core.test_hostile_requests import all_outcomes\n"
        "print(json.dumps([__debug__, all_outcomes()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONOPTIMIZE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    has_assertions, outcomes = json.loads(done.stdout)
    assert not has_assertions
    assert outcomes == all_outcomes()


def _pack(fields: list[Any]) -> bytes:
    """As a hostile peer would: whatever the strings hold."""
    try:
        return msgspec.msgpack.encode(fields)
    except UnicodeEncodeError:  # lone surrogates cannot be sent as text; as bytes they can
        return msgspec.msgpack.encode([repr(field).encode() for field in fields])


def test_nobody_stops_what_another_frontend_asked_nor_what_only_begins_alike() -> None:
    rig = Rig()
    for req_id in ("r", "r1", "other"):
        rig.add(make_request(req_id, 5, max_tokens=12, n=2, temperature=1.0))
    rig.step()
    for stranger in (b"", b"stranger", CLIENT[:-1], CLIENT + b"x"):
        rig.core.abort_requests(stranger, ["r", "r1", "other", "", "*"])
        rig.core.abort_branches(stranger, [("r", 0), ("r1", 1), ("other", 0)])
        rig.core.remove_client(stranger)
    rig.core.abort_requests(CLIENT, ["", "othe", "other1", "R", "*", "r*"])
    rig.core.abort_branches(CLIENT, [("r", 2), ("r", -1), ("", 0)])
    rig.run()
    for req_id in rig.requests:
        rig.check_solo(req_id)
