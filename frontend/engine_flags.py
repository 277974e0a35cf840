"""Command-line flags made from dataclass fields, and the checks on what callers put into them.

A field declares its flag, default and help once. Knows nothing of engines: any dataclass whose
fields are made by ``flag`` will do.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, get_type_hints

import msgspec

from ipc.errors import ConfigError

JsonObject = str | dict[str, Any]  # or its text
Names = str | list[str]


class _UnsetFalse(int):
    """False that nobody asked for. Equal to False, yet told apart from an explicit one."""

    def __repr__(self) -> str:
        return "False"


UNSET_FALSE: Any = _UnsetFalse(0)


def is_unset(value: object) -> bool:
    """Whether a flag of default ``UNSET_FALSE`` was left alone."""
    return isinstance(value, _UnsetFalse)


def flag(
    default: Any,
    *,
    help: str,
    choices: tuple[str, ...] | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Declare a dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "aliases": aliases})


def flag_name(field_name: str) -> str:
    """The flag of a field."""
    return "--" + field_name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Kind:
    """What values of one type annotation look like, in Python and on the command line."""

    words: str
    accepts: Callable[[Any], bool]
    options: Mapping[str, Any]  # for add_argument


def add_flags(
    parser: argparse.ArgumentParser, record: type, title: str, *, besides: type | None = None
) -> None:
    """Add one flag per field of ``record``, in order of declaration.

    Args:
        besides: leave out the fields of this dataclass, whose flags are there already.
    """
    group = parser.add_argument_group(title)
    known = {f.name for f in fields(besides)} if besides else set()
    for f, kind, is_optional in _described_fields(record):
        if f.name in known:
            continue
        options = dict(kind.options)
        if is_optional and "type" in options:
            options["type"] = _none_or(options["type"])
        if f.metadata["choices"]:
            options |= {"choices": f.metadata["choices"], "metavar": None}
        group.add_argument(
            flag_name(f.name),
            *f.metadata["aliases"],
            dest=f.name,
            default=f.default,
            help=f.metadata["help"].replace("%", "%%"),
            **options,
        )


def check_fields(record: Any) -> None:
    """Check every field's type and choices, so that no later check meets a surprise.

    Raises:
        ConfigError: the first field at fault, by the name of its flag.
    """
    for f, kind, is_optional in _described_fields(type(record)):
        value = getattr(record, f.name)
        if value is None and is_optional:
            continue
        if not kind.accepts(value):
            words = f"{kind.words} or unset" if is_optional else kind.words
            raise ConfigError(f"{flag_name(f.name)} must be {words}, got {_short(value)}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(
                f"{flag_name(f.name)} must be one of {', '.join(choices)}, got {_short(value)}"
            )


def as_json_object(name: str, value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """A JSON object from a dict or its text.

    Raises:
        ConfigError: neither, naming the flag.
    """
    if not isinstance(value, str):
        return value
    try:
        return _json_object(value)
    except argparse.ArgumentTypeError as err:
        raise ConfigError(f"{name}: {err}") from err


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise argparse.ArgumentTypeError(f"not JSON: {_short(text)}") from err
    if not _is_plain_dict(value):
        raise argparse.ArgumentTypeError(f"not a JSON object: {_short(text)}")
    assert isinstance(value, dict)
    return value


def _float_list(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"not numbers with commas: {_short(text)}") from err


def _none_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_none(text: str) -> Any:
        return None if text in ("None", "none") else parse(text)

    parse_or_none.__name__ = parse.__name__  # argparse quotes it in errors
    return parse_or_none


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63


def _is_plain_dict(value: Any) -> bool:
    """Whether a dict survives the way to another process."""
    if not isinstance(value, dict) or not all(_is_text(key) for key in value):
        return False
    try:
        msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
    return True


def _is_text_list(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_real_list(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_real, value))


_KINDS: dict[Any, Kind] = {
    bool: Kind(
        "true or false",
        lambda value: isinstance(value, (bool, _UnsetFalse)),
        {"action": argparse.BooleanOptionalAction},
    ),
    int: Kind("a whole number", _is_whole, {"type": int}),
    float: Kind("a finite number", _is_real, {"type": float}),
    str: Kind("a string", _is_text, {"type": str}),
    Names: Kind("a string or a list of strings", _is_text_list, {"nargs": "+"}),
    JsonObject: Kind(
        "a JSON object",
        lambda value: _is_text(value) or _is_plain_dict(value),
        {"type": _json_object, "metavar": "JSON"},
    ),
    tuple[float, ...]: Kind(
        "a list of numbers", _is_real_list, {"type": _float_list, "metavar": "X,Y,…"}
    ),
}


def _described_fields(record: type) -> tuple[tuple[Any, Kind, bool], ...]:
    """(field, kind, whether None is allowed) of each field made by ``flag``."""
    hints = get_type_hints(record)
    described = []
    for f in fields(record):
        if "help" not in f.metadata:
            continue
        hint = hints[f.name]
        is_optional = type(None) in getattr(hint, "__args__", ())
        if is_optional:
            hint = _without_none(hint)
        described.append((f, _KINDS[hint], is_optional))
    return tuple(described)


def _without_none(hint: Any) -> Any:
    kinds = [kind for kind in hint.__args__ if kind is not type(None)]
    union = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return union


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
