"""What the health paths say in each state of the server and its engine."""

from typing import Any

import pytest

from frontend.openai.health import ProgressNotes
from ipc.errors import EngineDeadError, EngineRestartingError
from ipc.messages import SchedulerStats
from tests.frontend.openai.fake_engine import FakeEngine, ask, make_server


class StatedEngine(FakeEngine):
    """An engine in the state that the test wants."""

    trouble: Exception | None = None
    is_asleep = False
    stats = SchedulerStats(num_steps=5, num_running=2, num_waiting=1)

    async def check_health(self) -> None:
        """As told."""
        if self.trouble is not None:
            raise self.trouble

    async def is_sleeping(self) -> bool:
        """As told."""
        return self.is_asleep

    async def get_stats(self) -> SchedulerStats:
        """As told."""
        if self.trouble is not None:
            raise self.trouble
        return self.stats


@pytest.mark.parametrize(
    ("fields", "is_draining", "phase"),
    [
        ({}, False, "serving"),
        ({}, True, "draining"),
        ({"is_asleep": True}, False, "sleeping"),
        ({"trouble": EngineRestartingError("wait")}, False, "restarting"),
        ({"trouble": EngineDeadError("gone")}, False, "dead"),
    ],
)
def test_readiness_and_progress_name_the_phase_while_the_process_lives(
    fields: dict[str, Any], is_draining: bool, phase: str
) -> None:
    engine = StatedEngine()
    for name, value in fields.items():
        setattr(engine, name, value)
    _, state, app = make_server(engine)
    state.is_draining = is_draining
    assert ask(app, "GET", "/health/live").status_code == 200
    ready = ask(app, "GET", "/health/ready")
    assert ready.status_code == (200 if phase == "serving" else 503)
    assert ready.json() == {"phase": phase}
    told = ask(app, "GET", "/health/progress").json()
    assert told["phase"] == phase
    assert told["answering"] == (engine.trouble is None)
    if engine.trouble is None:
        assert (told["steps"], told["running"], told["waiting"]) == (5, 2, 1)


def test_seconds_without_a_step_count_only_while_there_is_work() -> None:
    notes = ProgressNotes()
    busy, idle = SchedulerStats(num_steps=5, num_running=1), SchedulerStats(num_steps=5)
    expected = [(busy, 1.0, 1.0), (busy, 2.0, 1.0), (idle, 3.0, 3.0), (busy, 4.0, 4.0)]
    for stats, now_s, moved_s in [*expected, (busy, 9.0, 4.0)]:
        notes.note(stats, now_s)
        assert notes.moved_s == moved_s
    notes.note(SchedulerStats(num_steps=6, num_running=1), 10.0)
    assert notes.moved_s == 10.0
