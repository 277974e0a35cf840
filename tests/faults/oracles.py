"""The oracles: pure functions from evidence to violations. Silence means that nothing was found.

O1 integrity, O2 equality with an undisturbed run, O3 noise floor, O4 leaks, O5 still well.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from tests.faults.history import Branch, History

Decode = Callable[[Sequence[int]], str]

ENDS = frozenset({"stop", "length"})


def check_integrity(history: History, decode: Decode, *, ends: frozenset[str] = ENDS) -> list[str]:
    """O1 of one answer that its client read to the end; of one it left, what came is judged.

    Args:
        decode: ids to text in one go, as the request asked for it.
        ends: finish reasons that are in order here (a drain adds "abort").
    """
    found = list(history.contradictions)
    if len(history.answer_ids) > 1 or len(history.created) > 1:
        found.append(f"ids {history.answer_ids} and times {history.created}: more than one")
    for index, branch in sorted(history.branches.items()):
        found += [f"choice {index}: {words}" for words in _check_branch(history, branch, decode)]
    if not history.is_cut:
        found += _check_end(history, ends)
    return [f"O1 {history.name}: {words}" for words in found]


def _check_branch(history: History, branch: Branch, decode: Decode) -> list[str]:
    found = []
    num_tokens, text = len(branch.token_ids), decode(branch.token_ids)
    is_whole = bool(branch.finish_reasons)
    has_stop = bool(history.body.get("stop"))
    if is_whole and not has_stop and branch.text != text:
        found.append(f"text {branch.text[-60:]!r} is not that of its ids, {text[-60:]!r}")
    # Before the end, a character or a stop string may be held back.
    if not (is_whole and not has_stop) and not text.startswith(branch.text.rstrip("\ufffd")):
        found.append(f"text {branch.text[-60:]!r} does not begin that of its ids, {text[-60:]!r}")
    if num_tokens > history.max_tokens:
        found.append(f"{num_tokens} tokens, at most {history.max_tokens}")
    if branch.finish_reasons == ["length"] and num_tokens != history.max_tokens:
        found.append(f"ended by length after {num_tokens} tokens of {history.max_tokens}")
    if len(branch.finish_reasons) > 1:
        found.append(f"ended {len(branch.finish_reasons)} times: {branch.finish_reasons}")
    if branch.num_after_finish:
        found.append(f"{branch.num_after_finish} events after its end")
    if branch.num_prompts_told > 1:
        found.append(f"prompt told {branch.num_prompts_told} times")
    if branch.num_roles > 1:
        found.append(f"role told {branch.num_roles} times")
    return found


def _check_end(history: History, ends: frozenset[str]) -> list[str]:
    found = []
    if history.status != 200 or history.errors or history.is_broken:
        broken = "connection broken, " if history.is_broken else ""
        return [f"{broken}status {history.status}, errors {history.errors}"]
    if sorted(history.branches) != list(range(history.num_branches)):
        found.append(f"choices {sorted(history.branches)}, asked for {history.num_branches}")
    for index, branch in history.branches.items():
        if not branch.finish_reasons or not set(branch.finish_reasons) <= ends:
            found.append(f"choice {index}: ended by {branch.finish_reasons}")
    if len(history.usages) != 1:
        found.append(f"usage told {len(history.usages)} times")
    elif history.usages[0]["completion_tokens"] != history.num_tokens:
        told = history.usages[0]["completion_tokens"]
        found.append(f"usage tells {told} tokens, {history.num_tokens} came")
    if history.num_done != int(history.is_stream) or history.num_after_done:
        found.append(f"{history.num_done} x [DONE], {history.num_after_done} events after it")
    return found


def check_equality(histories: Iterable[History], reference: Mapping[str, History]) -> list[str]:
    """O2: every token is that of the undisturbed run; those of a client that left, as a prefix."""
    found = []
    for history in histories:
        expected = reference[history.name]
        for index, branch in sorted(history.branches.items()):
            wanted = expected.branch(index)
            ids, wanted_ids = branch.token_ids, wanted.token_ids
            if history.is_cut:
                wanted_ids = wanted_ids[: len(ids)]
            at = first_difference(ids, wanted_ids)
            if at is not None:
                found.append(
                    f"O2 {history.name}: choice {index} differs from token {at} on: "
                    f"{ids[at : at + 3]} instead of {wanted_ids[at : at + 3]}"
                )
            elif not history.is_cut and branch.text != wanted.text:
                found.append(f"O2 {history.name}: choice {index} has another text")
            elif not history.is_cut and branch.finish_reasons != wanted.finish_reasons:
                found.append(f"O2 {history.name}: choice {index} ended otherwise")
    return found


def first_difference(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """The first position at which two lists differ, in length too; None when they are equal."""
    if list(ids) == list(wanted):
        return None
    pairs = zip(ids, wanted, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(wanted)))


def check_noise(num_different: int, num_noise: int, num_streams: int) -> list[str]:
    """O3: faults make no more streams differ than a rerun without faults does, plus one point."""
    if num_different <= num_noise + num_streams / 100:
        return []
    return [f"O3 {num_different} of {num_streams} streams differ, {num_noise} in a rerun"]


@dataclass(frozen=True, slots=True)
class Holdings:
    """What an engine holds: zero where it must be idle, else as many as before."""

    running: int = 0
    waiting: int = 0
    leaked_blocks: int = 0
    blocks_in_use: float = 0  # those of cached prefixes do not count
    journal: int = 0
    tasks: int = 0
    fds: int = 0
    threads: int = 0
    processes: int = 0
    shared_memory: int = 0


ZERO_WHEN_IDLE = ("running", "waiting", "leaked_blocks", "blocks_in_use", "journal")


def check_leaks(before: Holdings, after: Holdings) -> list[str]:
    """O4: an idle engine holds nothing, and everything else is as it was."""
    found = [f"O4 {name} is {getattr(after, name)}" for name in ZERO_WHEN_IDLE
             if getattr(after, name)]  # fmt: skip
    for name in (f.name for f in fields(Holdings) if f.name not in ZERO_WHEN_IDLE):
        was, now = getattr(before, name), getattr(after, name)
        if now > was:
            found.append(f"O4 {name} went from {was} to {now}")
    return found


def check_well(
    canaries: Iterable[History], reference: Mapping[str, History], decode: Decode
) -> list[str]:
    """O5: each canary answer is whole and right."""
    canaries = list(canaries)
    broken = [words for canary in canaries for words in check_integrity(canary, decode)]
    return [f"O5 canary: {words}" for words in broken + check_equality(canaries, reference)]


def check_same_process(before: Sequence[int], after: Sequence[int]) -> list[str]:
    """O5: nobody died unnoticed."""
    return [] if list(before) == list(after) else [f"O5 core {before} became {after}"]
