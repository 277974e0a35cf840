"""Time limits of callers, on this host and on another."""

import time

import pytest

from frontend.deadlines import check_timeout, for_other_host
from ipc.errors import RequestError
from ipc.messages import AddRequest
from ipc.sampling_params import SamplingParams


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e9, True, "5"])
def test_what_is_no_time_is_refused(seconds: object) -> None:
    with pytest.raises(RequestError, match="timeout"):
        check_timeout(seconds)  # type: ignore[arg-type]


def test_a_whole_number_of_seconds_is_a_time() -> None:
    assert check_timeout(5) == 5.0
    assert check_timeout(None) is None


def test_another_host_is_told_what_is_left() -> None:
    request = AddRequest("r", [1], SamplingParams(seed=1), 0.0)
    assert for_other_host(request) is request
    deadline_s = time.monotonic() + 10.0
    request = AddRequest("r", [1], SamplingParams(seed=1), 0.0, deadline_s=deadline_s)
    sent = for_other_host(request)
    assert sent.deadline_s is None
    assert sent.timeout_s is not None
    assert 9.0 < sent.timeout_s <= 10.0
