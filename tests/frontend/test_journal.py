"""The journal: what was accepted counts once, what is missing is noticed, all can be sent again."""

import pytest

from frontend.journal import Journal
from ipc.errors import EngineGenerateError
from ipc.messages import AddRequest, ResumedBranch, TokenLogprobs, encoder
from ipc.messages import frontend_to_core_decoder as decoder
from ipc.sampling_params import SamplingParams
from tests.frontend.builders import make_output


def make_add_request(req_id: str = "1", n: int = 1) -> AddRequest:
    params = SamplingParams(n=n, seed=5, max_tokens=9)
    return AddRequest(req_id, [1, 2, 3], params, 12.5, [2], priority=-1, cache_salt="s")


def test_tokens_in_order_are_new() -> None:
    entry = Journal().open(make_add_request(), epoch=0)
    assert entry.new_tokens(make_output("1", 0, [7, 8])) == [7, 8]


@pytest.mark.parametrize(
    ("first_index", "ids", "new"),
    [
        pytest.param(0, [7], None, id="a duplicate from the start"),
        pytest.param(1, [8], None, id="a duplicate of the last one"),
        pytest.param(1, [8, 9], [9], id="half known"),
        pytest.param(2, [9], [9], id="new"),
        pytest.param(2, [], [], id="an end without a token"),
    ],
)
def test_accepted_tokens_are_not_accepted_again(
    first_index: int, ids: list[int], new: list[int] | None
) -> None:
    entry = Journal().open(make_add_request(), epoch=0)
    entry.branches[0].token_ids += [7, 8]
    assert entry.new_tokens(make_output("1", first_index, ids)) == new


def test_a_gap_is_an_error_that_names_the_missing_tokens() -> None:
    entry = Journal().open(make_add_request(), epoch=0)
    entry.branches[0].token_ids += [7]
    with pytest.raises(EngineGenerateError, match="tokens 1 to 2 of sequence 0"):
        entry.new_tokens(make_output("1", 3, [9]))


def test_a_finished_branch_accepts_nothing() -> None:
    entry = Journal().open(make_add_request(), epoch=0)
    entry.branches[0].is_finished = True
    assert entry.new_tokens(make_output("1", 0, [9])) is None


def test_a_request_sent_again_is_the_request_and_its_accepted_tokens() -> None:
    request = make_add_request(n=3)
    journal = Journal()
    entry = journal.open(request, epoch=0)
    entry.branches[0].token_ids += [7, 8]
    entry.branches[1].token_ids += [9]
    entry.branches[1].is_finished = True

    again = journal.resume_all(epoch=4)

    assert [message.req_id for message in again] == ["1"]
    sent = decoder.decode(encoder.encode(again[0]))
    assert sent.resumed == [ResumedBranch(0, [7, 8]), ResumedBranch(1, [9], is_finished=True)]
    assert sent.params.seed == 5
    assert (sent.prompt_token_ids, sent.eos_token_ids) == ([1, 2, 3], [2])
    assert (sent.priority, sent.cache_salt, sent.arrival_time_s) == (-1, "s", 12.5)
    assert (entry.epoch, entry.attempts) == (4, 2)
    assert entry.new_tokens(make_output("1", 2, [10])) == [10]  # and goes on where it was


def test_requests_are_sent_again_oldest_first() -> None:
    journal = Journal()
    for req_id in ("b", "a", "c"):
        journal.open(make_add_request(req_id), epoch=0)
    journal.close("a")
    assert [message.req_id for message in journal.resume_all(1)] == ["b", "c"]


def test_prompt_logprobs_of_a_request_sent_again_count_once() -> None:
    positions = [TokenLogprobs([i], [-1.0], 1) for i in range(3)]
    entry = Journal().open(make_add_request(), epoch=0)
    first = make_output("1", 0, [], prompt_logprobs=positions[:2])
    assert entry.new_prompt_logprobs(first) == positions[:2]
    entry.resume(1)
    assert entry.new_prompt_logprobs(first) == []
    last = make_output("1", 0, [], prompt_logprobs=positions[2:])
    assert entry.new_prompt_logprobs(last) == positions[2:]
