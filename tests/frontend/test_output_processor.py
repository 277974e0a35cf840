"""Engine outputs into request outputs: text, tokens, logprobs, ends, ranking, times, statistics."""

import pytest

from frontend.request_state import RequestState
from ipc.errors import DeviceDeadError, EngineGenerateError, EngineOverloadedError
from ipc.messages import FinishReason, LogitsRow, ResumedBranch, TokenLogprobs
from ipc.records import TensorRef
from ipc.sampling_params import RequestOutputKind
from tests.frontend.builders import EOS, make_output, make_rig

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def texts(state: RequestState) -> list[str]:
    output = state.take()
    assert output is not None
    return [completion.text for completion in output.outputs]


def test_cumulative_outputs_grow() -> None:
    rig = make_rig()
    state = rig.open()
    seen = []
    for letter in "abc":
        rig.say(state, letter)
        output = state.take()
        assert output is not None
        seen.append((output.outputs[0].text, output.outputs[0].token_ids, output.finished))
    assert seen == [("a", [97], False), ("ab", [97, 98], False), ("abc", [97, 98, 99], False)]


def test_earlier_cumulative_outputs_do_not_change_afterwards() -> None:
    rig = make_rig()
    state = rig.open(logprobs=1)
    rig.say(state, "a", logprobs=[TokenLogprobs([97, 97], [-0.5, -0.5], 1)])
    first = state.take()
    rig.say(state, "b", logprobs=[TokenLogprobs([98, 98], [-0.5, -0.5], 1)])
    state.take()
    assert first is not None
    assert first.outputs[0].token_ids == [97]
    assert len(first.outputs[0].logprobs or []) == 1


def test_deltas_hold_what_is_new() -> None:
    rig = make_rig()
    state = rig.open(output_kind=DELTA)
    rig.say(state, "ab")
    rig.say(state, "c")
    assert texts(state) == ["abc"]  # a slow consumer gets steps merged
    rig.say(state, "d")
    output = state.take()
    assert output is not None
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("d", [100])
    assert state.take() is None


def test_final_only_gives_one_output() -> None:
    rig = make_rig()
    state = rig.open(output_kind=FINAL_ONLY)
    rig.say(state, "ab")
    assert state.take() is None
    rig.say(state, [EOS], finish_reason=FinishReason.STOP)
    output = state.take()
    assert output is not None
    assert (output.finished, output.outputs[0].text) == (True, "ab")


def test_an_unfinished_character_waits_for_its_bytes() -> None:
    rig = make_rig()
    state = rig.open(output_kind=DELTA)
    first, *rest = "€".encode()
    rig.say(state, [first])
    assert texts(state) == [""]
    rig.say(state, rest)
    assert texts(state) == ["€"]


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    rig = make_rig()
    state = rig.open()
    rig.say(state, [0xE2], finish_reason=FinishReason.LENGTH)
    assert texts(state) == ["\ufffd"]


def test_the_end_of_text_token_is_a_token_but_no_text() -> None:
    rig = make_rig()
    state = rig.open(skip_special_tokens=False)
    rig.say(state, [*b"ab", EOS], finish_reason=FinishReason.STOP)
    output = state.take()
    assert output is not None
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == ("ab", [97, 98, EOS])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


def test_a_stop_token_is_shown_when_asked_for() -> None:
    rig = make_rig()
    state = rig.open(include_stop_str_in_output=True)
    rig.say(state, "ab", finish_reason=FinishReason.STOP, stop_reason=98)
    output = state.take()
    assert output is not None
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("ab", 98)


def test_a_stop_string_over_three_tokens_never_shows_and_stops_the_core() -> None:
    rig = make_rig()
    state = rig.open(stop=["###"], output_kind=DELTA)
    shown = ""
    for letter in "ab##":
        result = rig.say(state, letter)
        assert result.stopped_branches == []
        shown += texts(state)[0]
        assert "#" not in shown
    result = rig.say(state, "#cd")
    output = state.take()
    assert output is not None
    assert result.stopped_branches == [(state.req_id, 0)]
    assert shown + output.outputs[0].text == "ab"
    assert output.outputs[0].token_ids == [35]  # up to the token that completed it, no further
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "###")
    assert output.finished
    assert rig.outputs.num_open == 0


def test_outputs_behind_a_stop_string_are_dropped() -> None:
    rig = make_rig()
    state = rig.open(n=2, stop="#")
    rig.say(state, "a#")
    assert rig.say(state, "xyz").moved == []
    rig.say(state, "bc", index=1, finish_reason=FinishReason.LENGTH)
    assert texts(state) == ["a", "bc"]


def test_what_was_held_back_comes_out_when_no_stop_string_follows() -> None:
    rig = make_rig()
    state = rig.open(stop=["###"])
    rig.say(state, "ab##")
    assert texts(state) == ["ab"]
    rig.say(state, [EOS], finish_reason=FinishReason.STOP)
    assert texts(state) == ["ab##"]


def test_a_stop_string_completed_by_the_last_token_is_the_reason_and_needs_no_message() -> None:
    rig = make_rig()
    state = rig.open(stop="b")
    result = rig.say(state, "ab", finish_reason=FinishReason.LENGTH)
    output = state.take()
    assert output is not None
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "b")
    assert result.stopped_branches == []


def test_stop_strings_do_not_stop_before_min_tokens() -> None:
    rig = make_rig()
    state = rig.open(stop="#", min_tokens=3)
    rig.say(state, "a#b#c")
    assert texts(state) == ["a#b"]


def test_logprobs_name_tokens_and_stop_with_the_tokens() -> None:
    rig = make_rig()
    state = rig.open(stop="#", logprobs=2)
    positions = [
        TokenLogprobs([97, 98, 97], [-1.5, -0.5, -1.5], 2),
        TokenLogprobs([35, 35, 97], [-0.25, -0.25, -2.0], 1),
        TokenLogprobs([99, 99, 97], [-0.25, -0.25, -2.0], 1),
    ]
    rig.say(state, "a#c", logprobs=positions)
    output = state.take()
    assert output is not None
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert [list(position) for position in completion.logprobs] == [[97, 98], [35, 97]]
    chosen = completion.logprobs[0][97]
    assert (chosen.logprob, chosen.rank, chosen.decoded_token) == (-1.5, 2, "a")
    assert completion.logprobs[0][98].rank == 1
    assert completion.cumulative_logprob == -1.75


def test_prompt_logprobs_begin_with_none_and_come_once_in_deltas() -> None:
    rig = make_rig()
    state = rig.open(prompt="abc", prompt_logprobs=1, output_kind=DELTA)
    positions = [TokenLogprobs([98, 98], [-1.0, -1.0], 1), TokenLogprobs([99, 98], [-2.0, -1.0], 5)]
    rig.say(state, "x", prompt_logprobs=positions)
    output = state.take()
    assert output is not None
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert [list(position or ()) for position in output.prompt_logprobs[1:]] == [[98], [99, 98]]
    rig.say(state, "y")
    output = state.take()
    assert output is not None
    assert output.prompt_logprobs is None


def test_a_prompt_of_one_token_has_prompt_logprobs_of_none() -> None:
    rig = make_rig()
    state = rig.open(prompt="a", prompt_logprobs=1)
    rig.say(state, "x")
    output = state.take()
    assert output is not None
    assert output.prompt_logprobs == [None]


def test_the_best_branches_are_chosen_by_likelihood() -> None:
    rig = make_rig()
    state = rig.open(n=2, best_of=3)
    assert state.entry.request.params.logprobs == 0  # asked for, to rank by
    for index, (letter, logprob) in enumerate([("a", -3.0), ("b", -1.0), ("c", -2.0)]):
        position = TokenLogprobs([ord(letter)], [logprob], 1)
        rig.say(state, letter, index=index, logprobs=[position], finish_reason=FinishReason.LENGTH)
    output = state.take()
    assert output is not None
    assert [(c.index, c.text, c.cumulative_logprob) for c in output.outputs] == [
        (0, "b", -1.0),
        (1, "c", -2.0),
    ]
    assert all(completion.logprobs is None for completion in output.outputs)


def test_deltas_of_a_ranked_request_come_at_the_end() -> None:
    rig = make_rig()
    state = rig.open(n=1, best_of=2, output_kind=DELTA)
    position = TokenLogprobs([97], [-1.0], 1)
    rig.say(state, "a", logprobs=[position])
    assert state.take() is None
    rig.say(state, "b", logprobs=[position], finish_reason=FinishReason.LENGTH)
    rig.say(state, "c", index=1, logprobs=[position], finish_reason=FinishReason.LENGTH)
    assert texts(state) == ["c"]


def test_deltas_hold_only_the_branches_that_moved() -> None:
    rig = make_rig()
    state = rig.open(n=2, output_kind=DELTA)
    rig.say(state, "a", index=1)
    output = state.take()
    assert output is not None
    assert [completion.index for completion in output.outputs] == [1]


def test_outputs_of_another_epoch_are_dropped() -> None:
    rig = make_rig()
    state = rig.open()
    assert rig.feed(make_output(state.req_id, 0, [97]), epoch=1).moved == []
    state.entry.resume(1)
    assert rig.feed(make_output(state.req_id, 0, [97]), epoch=0).moved == []
    assert rig.feed(make_output(state.req_id, 0, [97]), epoch=1).moved == [state]


def test_a_duplicate_changes_nothing_and_a_gap_sends_its_request_again() -> None:
    rig = make_rig()
    state, other = rig.open("a"), rig.open("b")
    rig.say(state, "ab")
    assert rig.feed(make_output(state.req_id, 1, [98])).moved == []
    result = rig.feed(make_output(state.req_id, 3, [99]), make_output(other.req_id, 0, [120]))
    (again,) = result.resyncs
    assert again.resumed == [ResumedBranch(0, [97, 98])]
    assert (again.req_id, again.num_attempts) == (state.req_id, 2)
    assert rig.feed(make_output(state.req_id, 4, [100])).resyncs == []  # on its way since before
    assert texts(other) == ["x"]
    rig.say(state, "cd")
    assert texts(state) == ["abcd"]


def test_a_request_whose_tokens_get_lost_again_and_again_fails_alone() -> None:
    rig = make_rig()
    state, other = rig.open("a"), rig.open("b")
    for number in range(3):
        assert len(rig.feed(make_output(state.req_id, number + 1, [99])).resyncs) == 1
        rig.say(state, "a")
    result = rig.feed(make_output(state.req_id, 5, [99]), make_output(other.req_id, 0, [120]))
    assert result.failed_req_ids == [state.req_id]
    assert isinstance(state.failure, EngineGenerateError)
    output = state.take()
    assert output is not None
    assert output.outputs[0].finish_reason == "error"
    assert "lost" in (output.error or "")
    assert texts(other) == ["x"]


def test_an_error_of_the_core_has_the_class_that_the_core_named() -> None:
    rig = make_rig()
    state = rig.open()
    rig.say(
        state,
        [],
        finish_reason=FinishReason.ERROR,
        error="too many",
        error_kind="EngineOverloadedError",
    )
    assert isinstance(state.failure, EngineOverloadedError)
    assert rig.outputs.num_open == 0


def test_a_name_in_use_is_refused_and_free_again_afterwards() -> None:
    rig = make_rig()
    state = rig.open("a")
    with pytest.raises(KeyError, match="in use"):
        rig.open("a")
    rig.say(state, "x", finish_reason=FinishReason.LENGTH)
    rig.open("a")


def test_late_outputs_of_an_aborted_request_do_not_reach_its_successor() -> None:
    rig = make_rig()
    first = rig.open("a")
    rig.outputs.abort(["a", "unknown"], 0.0)
    second = rig.open("a")
    rig.feed(make_output(first.req_id, 0, [97]))
    assert second.take() is None


def test_an_aborted_request_ends_with_the_text_it_had() -> None:
    rig = make_rig()
    state = rig.open(stop="xy")
    rig.say(state, "abx")
    rig.outputs.abort(["a"], 0.0)
    output = state.take()
    assert output is not None
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("abx", "abort")


def test_without_tokenizer_there_are_ids_and_no_text() -> None:
    rig = make_rig(tokenizer=False)
    state = rig.open(prompt=[1, 2])
    rig.say(state, [5, 6])
    output = state.take()
    assert output is not None
    assert (output.prompt, output.outputs[0].text) == (None, "")
    assert output.outputs[0].token_ids == [5, 6]


def test_times_and_cached_tokens_are_noted() -> None:
    rig = make_rig()
    state = rig.open()
    rig.say(state, "a", num_cached_tokens=2, first_scheduled_time_s=95.0)
    rig.say(state, "b", finish_reason=FinishReason.LENGTH)
    output = state.take()
    assert output is not None
    assert output.num_cached_tokens == 2
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_scheduled_time) == (90.0, 95.0)
    assert (metrics.time_in_queue, metrics.first_token_time) == (5.0, 101.0)
    assert (metrics.last_token_time, metrics.finished_time) == (102.0, 102.0)
    assert (metrics.num_generation_tokens, metrics.first_token_latency) == (2, 11.0)


def test_statistics_count_tokens_latencies_and_ends() -> None:
    rig = make_rig(log_stats=True)
    state = rig.open(prompt="abc")
    first = rig.say(state, "a", first_scheduled_time_s=95.0).iteration
    assert (first.num_prompt_tokens, first.num_generation_tokens) == (3, 1)
    assert (first.time_to_first_token_s, first.inter_token_latency_s) == ([11.0], [])
    later = rig.say(state, "bc", finish_reason=FinishReason.LENGTH).iteration
    assert (later.num_prompt_tokens, later.num_generation_tokens) == (0, 2)
    assert later.inter_token_latency_s == [0.5, 0.5]
    (finished,) = later.finished
    assert finished.finish_reason is FinishReason.LENGTH
    assert (finished.num_prompt_tokens, finished.num_generation_tokens) == (3, 3)
    assert (finished.queue_time_s, finished.prefill_time_s) == (5.0, 6.0)
    assert (finished.decode_time_s, finished.e2e_latency_s) == (1.0, 12.0)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_statistics_tell_how_a_request_ended(reason: FinishReason) -> None:
    rig = make_rig(log_stats=True)
    (finished,) = rig.say(rig.open(), "a", finish_reason=reason).iteration.finished
    assert finished.finish_reason is reason


def test_aborted_requests_are_in_the_next_statistics() -> None:
    rig = make_rig(log_stats=True)
    rig.open("a")
    rig.outputs.abort(["a"], 100.0)
    (finished,) = rig.feed().iteration.finished
    assert finished.finish_reason is FinishReason.ABORT


def test_a_row_of_logits_comes_with_the_tokens_before_it() -> None:
    rig = make_rig()
    admitted = rig.admit(prompt="abc", logits_processors=[lambda ids, logits: logits])
    state = rig.outputs.open(admitted, epoch=0)
    row = LogitsRow(state.req_id, 0, 5, TensorRef(0, "float32", [4]))
    output = make_output(state.req_id, 0, [120, 121])
    (work,) = rig.feed(output, logits_rows=[row]).row_work
    assert (work.prompt_ids, work.output_ids) == ([97, 98, 99], [120, 121])
    assert len(work.processors) == 1
    gap = LogitsRow(state.req_id, 0, 9, TensorRef(0, "float32", [4]))
    assert rig.feed(logits_rows=[gap]).failed_req_ids == [state.req_id]


def test_the_death_of_the_engine_ends_every_request_with_an_error_of_its_own() -> None:
    rig = make_rig()
    states = [rig.open("a"), rig.open("b")]
    assert rig.outputs.fail_all(DeviceDeadError("worker 0 is gone"), 0.0) == states
    assert {type(state.failure) for state in states} == {DeviceDeadError}
    assert states[0].failure is not states[1].failure
    assert {str(state.failure) for state in states} == {"worker 0 is gone"}
    assert rig.outputs.num_open == len(rig.outputs.journal) == 0


def test_a_resumed_request_goes_on_as_if_nothing_had_happened() -> None:
    rig = make_rig()
    broken, whole = rig.open("a", stop="###", seed=1), rig.open("b", stop="###", seed=1)
    pieces = ["a€"[:1].encode() + "€".encode()[:1], "€".encode()[1:] + b"##", b"b#", b"##"]
    for number, piece in enumerate(pieces):
        rig.feed(
            make_output(whole.req_id, len(whole.branches[0].record.token_ids), list(piece)),
        )
        epoch = 1 if number >= 2 else 0
        if number == 2:
            again = broken.entry.resume(1)
            assert again.resumed[0].token_ids == whole.branches[0].record.token_ids[:-2]
        rig.feed(
            make_output(broken.req_id, len(broken.branches[0].record.token_ids), list(piece)),
            epoch=epoch,
        )
    first, second = broken.take(), whole.take()
    assert first is not None
    assert second is not None
    assert first.outputs[0] == second.outputs[0]
    assert first.outputs[0].text == "a€##b"
