"""What a worker process settles before torch is there."""

import pytest

from executor.__main__ import limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, {"GOMP_SPINCOUNT": "5000"}, id="nobody cared"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}, id="a count"),
        pytest.param({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}, id="a policy"),
    ],
)
def test_threads_spin_for_a_short_time_unless_the_user_decided(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    limit_spinning(given)
    assert given == expected
