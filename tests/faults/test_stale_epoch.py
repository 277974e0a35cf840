"""Late outputs of a replaced core: passed over by the engine, flagged where a mutant takes them."""

import pytest

from frontend.output_processor import OutputProcessor
from ipc.messages import FinishReason
from tests.faults import mutant_engines, oracles
from tests.faults.history import Branch, History
from tests.frontend.builders import make_output, make_rig

WANTED, LATE = list(b"abcd"), list(b"xy")


def hear(*, has_late: bool) -> History:
    """One request over two cores; the first one may say something more after its end."""
    rig = make_rig()
    state = rig.open()
    rig.feed(make_output(state.req_id, 0, WANTED[:2]), epoch=0)
    state.entry.resume(1)
    if has_late:
        rig.feed(make_output(state.req_id, 2, LATE[:1]), epoch=0)
    at = len(state.branches[0].token_ids)
    last = make_output(state.req_id, at, WANTED[at:], finish_reason=FinishReason.LENGTH)
    rig.feed(last, epoch=1)
    output = state.take()
    assert output is not None
    (part,) = output.outputs
    history = History("a", "", {"stream": True, "max_tokens": 4}, status=200)
    history.branches[0] = Branch(list(part.token_ids), part.text, [str(part.finish_reason)])
    return history


@pytest.mark.parametrize("is_mutant", [False, True], ids=["engine", "mutant"])
def test_a_stale_output_that_is_taken_in_is_flagged(
    is_mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputProcessor, "process", OutputProcessor.process)  # put back at the end
    reference = {"a": hear(has_late=False)}
    if is_mutant:
        mutant_engines.accept_stale_epoch()

    found = oracles.check_equality([hear(has_late=True)], reference)

    assert bool(found) == is_mutant, found
