"""The attacks by the clock in their short form."""

import pytest

from tests.attacks import timing
from tests.e2e.secured_server import KEYS, secured_server


def test_the_time_of_a_refusal_tells_nothing_about_a_key() -> None:
    # One in five runs of good luck is enough: a real difference shows in each of them.
    assert min(abs(timing.key_timing(20_000, seed)) for seed in range(5)) < 4.5


def test_the_same_measure_sees_a_comparison_character_by_character() -> None:
    assert all(abs(timing.naive_key_timing(20_000, seed)) > 4.5 for seed in range(2))


@pytest.mark.slow
def test_the_time_of_an_answer_tells_what_the_own_key_asked_and_not_what_others_did() -> None:
    with secured_server("--disable-log-requests") as server:
        within = timing.prefix_timing(server, 6, KEYS[0])
        across = timing.prefix_timing(server, 8, KEYS[1], seed=1)
    assert within > 0.8  # the measure sees a cached prefix
    assert 0.01 < across < 0.99  # few samples: the command has the limit of 0.55
