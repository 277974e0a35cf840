"""What must hold of the histories of streams, whatever was done to the engine meanwhile.

Pure functions: histories in, sentences out. No sentence means that everything holds.
O1 integrity: no token or text is missing, repeated or contradicted; each stream ends once.
O2 equality: the tokens are those of the undisturbed run.
O4 leaks: what the engine held before, it holds after.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from tests.faults.histories import Choice, History

Decode = Callable[[list[int]], str]


def check_integrity(history: History, decode: Decode, *, num_choices: int = 1) -> list[str]:
    """O1 of one stream that was heard to its end.

    Args:
        decode: token ids to text, in one go, as the request asked for it.
    """
    found = []
    if history.lost is not None or history.ended_s is None:
        found.append(f"the connection broke: {history.lost}")
    if history.status != 200:
        found.append(f"status {history.status}")
        return _named(history, found)
    if history.errors:
        found.append(f"error event: {history.errors[0]}")
    if history.num_done != 1 or history.num_after_done:
        found.append(f"{history.num_done} [DONE], {history.num_after_done} events behind it")
    if len(history.ids) != 1 or len(history.created) != 1:
        found.append(f"ids {history.ids}, created {history.created}")
    if sorted(history.choices) != list(range(num_choices)):
        found.append(f"choices {sorted(history.choices)} of {num_choices}")
    for index, choice in history.choices.items():
        found += [f"choice {index}: {problem}" for problem in _check_choice(choice, decode)]
    if len(history.usages) != 1:
        found.append(f"{len(history.usages)} usages")
    elif history.usages[0]["completion_tokens"] != history.num_tokens:
        told = history.usages[0]["completion_tokens"]
        found.append(f"usage tells {told} tokens, {history.num_tokens} came")
    return _named(history, found)


def _check_choice(choice: Choice, decode: Decode) -> Iterable[str]:
    if len(choice.finish_reasons) != 1:
        yield f"finish reasons {choice.finish_reasons}"
    if choice.num_after_end:
        yield f"{choice.num_after_end} events with content behind the end"
    expected = decode(choice.token_ids)
    if choice.text != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(choice.text, expected, strict=False)) if a != b),
            min(len(choice.text), len(expected)),
        )
        yield f"text parts from its tokens at character {at}: {choice.text[at : at + 20]!r}"


def check_equality(history: History, reference: History) -> list[str]:
    """O2: the same tokens, and the same end, as the undisturbed stream of the same name."""
    assert history.name == reference.name
    found = []
    for index, choice in reference.choices.items():
        own = history.choices.get(index, Choice())
        if own.token_ids != choice.token_ids:
            at = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(own.token_ids, choice.token_ids, strict=False))
                    if a != b
                ),
                min(len(own.token_ids), len(choice.token_ids)),
            )
            found.append(
                f"choice {index} parts from the undisturbed run at token {at} "
                f"({len(own.token_ids)} of {len(choice.token_ids)} tokens)"
            )
        if own.finish_reasons != choice.finish_reasons:
            found.append(f"choice {index} ended {own.finish_reasons}, not {choice.finish_reasons}")
    return _named(history, found)


@dataclass(frozen=True)
class Holdings:
    """What an idle engine holds."""

    num_running: float
    num_waiting: float
    kv_usage: float  # share of the blocks that requests hold
    num_open: float  # requests that the server knows
    num_processes: int
    num_descriptors: int
    num_threads: int
    num_sockets: int
    num_shared_memory: int


def check_leaks(before: Holdings, after: Holdings, slack: Mapping[str, float]) -> list[str]:
    """O4: nothing is held that was not held before, but for the slack of each quantity."""
    return [
        f"{each.name} was {getattr(before, each.name)}, is {getattr(after, each.name)}"
        for each in fields(Holdings)
        if getattr(after, each.name) > getattr(before, each.name) + slack.get(each.name, 0)
    ]


def _named(history: History, found: Iterable[str]) -> list[str]:
    return [f"{history.name}: {problem}" for problem in found]
