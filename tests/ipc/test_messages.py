"""The wire format: pinned byte by byte, closed to extension types, its digest sees every field."""

import subprocess
import sys
from typing import Any, get_args

import msgspec
import pytest

from ipc import messages as m
from ipc.operations import AnyOperation
from ipc.records import Message, Part
from tests.ipc.pinned_bytes import PINNED
from tests.ipc.samples import decoders, make_messages

ALL = [(wire, message) for wire, found in make_messages().items() for message in found]


def label(message: Message) -> str:
    """A name for a sample; calls are told apart by their operation."""
    if isinstance(message, m.Call):
        return f"Call({type(message.operation).__name__})"
    return type(message).__name__


@pytest.mark.parametrize(("wire", "message"), ALL, ids=[f"{w}-{label(x)}" for w, x in ALL])
def test_bytes_of_a_message_never_change(wire: str, message: Message) -> None:
    encoded = m.encoder.encode(message)

    assert encoded.hex() == PINNED[label(message)]
    assert decoders()[wire].decode(encoded) == message


def test_every_message_and_operation_has_a_sample() -> None:
    for wire, found in make_messages().items():
        union = get_args(getattr(m, wire))
        assert {type(message) for message in found} == set(union)
    operations = {type(x.operation) for _, x in ALL if isinstance(x, m.Call)}
    assert operations == set(get_args(AnyOperation))


def test_samples_leave_no_field_at_its_default() -> None:
    def check(value: object) -> None:
        if isinstance(value, Part):
            for field in msgspec.structs.fields(type(value)):
                found = getattr(value, field.name)
                assert field.default is msgspec.NODEFAULT or found != field.default, field.name
                check(found)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)

    for _, message in ALL:
        if not isinstance(message, m.Call):  # operations may have a natural default
            check(message)


def nested(value: object, depth: int) -> object:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("code", [0, 1, 5, 42, 127])
@pytest.mark.parametrize("wire", list(decoders()))
def test_extension_types_are_refused_wherever_they_stand(wire: str, code: int) -> None:
    extension = msgspec.msgpack.Ext(code, b"cos\nsystem\n")
    request = msgspec.msgpack.decode(m.encoder.encode(make_messages()["FrontendToCore"][1]))
    anywhere: list[Any] = [extension, [extension], ["Hello", extension, "h", "n", 2]]
    for key in ("extra_args", "logits_processors"):
        params = request[3] | {key: {"x": extension} if key == "extra_args" else [extension]}
        anywhere.append([*request[:3], params, *request[4:]])
    for data in anywhere:
        with pytest.raises((msgspec.MsgspecError, ValueError)):
            decoders()[wire].decode(msgspec.msgpack.encode(data))


def test_nesting_without_end_is_an_error_and_no_crash() -> None:
    bomb = b"\x93\xa4Call\x01\x92\xa5Sleep" + b"\x91" * 1_000_000

    with pytest.raises((msgspec.MsgspecError, RecursionError)):
        m.frontend_to_core_decoder.decode(bomb)


def test_fields_of_a_newer_version_are_passed_over() -> None:
    newer = msgspec.msgpack.encode(["Ack", 3, "a field of the future"])

    assert m.frontend_to_core_decoder.decode(newer) == m.Ack(3)


def test_the_schema_digest_is_the_same_in_every_process() -> None:
    command = "from ipc.messages import schema_hash; print(schema_hash())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, check=True)

    assert other.stdout.decode().strip() == m.schema_hash()


def test_the_schema_digest_sees_swapped_fields_of_one_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def digest(*names: str) -> str:
        struct = msgspec.defstruct("X", [(name, int) for name in names], array_like=True, tag=True)
        monkeypatch.setattr(m, "WorkerToCore", struct)
        return m.schema_hash.__wrapped__()

    assert digest("a", "b") == digest("a", "b")
    assert digest("a", "b") != digest("b", "a")
    assert digest("a", "b") != digest("a")
