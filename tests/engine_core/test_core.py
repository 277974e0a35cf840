"""The core over a simulated executor: what clients get, whatever the schedule."""

from tests.engine_core.builders import Rig, make_request


def test_outputs_are_those_of_solo_runs() -> None:
    rig = Rig()
    for i in range(6):
        rig.add(make_request(f"r{i}", 5 + 9 * i, seed=i, max_tokens=12))
    rig.run()
    for req_id in rig.requests:
        rig.check_solo(req_id)
