"""Whether the server answers, whether it takes requests, and how far the engine has come."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ipc.errors import EngineDeadError, EngineError, EngineRestartingError
from ipc.messages import SchedulerStats

_ANSWER_S = 1.0  # the core answers between two turns of its loop


@dataclass(slots=True)
class ProgressNotes:
    """What the engine said last, and since when its step counter has not moved with work to do."""

    stats: SchedulerStats | None = None
    moved_s: float = 0.0

    def note(self, stats: SchedulerStats, now_s: float) -> None:
        """Take in what the engine says now."""
        before = self.stats
        had_work = before is not None and before.num_running + before.num_waiting > 0
        has_work = stats.num_running + stats.num_waiting > 0
        is_still = before is not None and before.num_steps == stats.num_steps
        if not (had_work and has_work and is_still):
            self.moved_s = now_s
        self.stats = stats


async def live() -> Response:
    """200: this process answers."""
    return Response()


async def ready(state: Any) -> Response:
    """200 when requests are taken; 503 with the phase while they are not."""
    phase = await _find_phase(state)
    return JSONResponse({"phase": phase}, 200 if phase == "serving" else 503)


async def progress(state: Any, notes: ProgressNotes) -> Response:
    """Steps, phase, and seconds without a step while there is work; an unheard engine is silent."""
    phase = await _find_phase(state)
    is_answering = False
    try:
        stats = await asyncio.wait_for(state.engine.get_stats(), _ANSWER_S)
        notes.note(stats, time.monotonic())
        is_answering = True
    except (EngineError, TimeoutError):
        pass
    known = notes.stats or SchedulerStats()
    has_work = known.num_running + known.num_waiting > 0
    return JSONResponse(
        {
            "phase": phase,
            "answering": is_answering,
            "steps": known.num_steps,
            "running": known.num_running,
            "waiting": known.num_waiting,
            "seconds_since_step": round(time.monotonic() - notes.moved_s, 3) if has_work else 0.0,
        }
    )


async def _find_phase(state: Any) -> str:
    if state.is_draining:
        return "draining"
    try:
        await state.engine.check_health()
        is_asleep = await asyncio.wait_for(state.engine.is_sleeping(), _ANSWER_S)
    except EngineRestartingError:
        return "restarting"
    except EngineDeadError:
        return "dead"
    except (EngineError, TimeoutError):
        return "silent"
    return "sleeping" if is_asleep else "serving"


def notes_of(request: Request) -> ProgressNotes:
    """The application's notes."""
    notes: ProgressNotes | None = getattr(request.app.state, "progress_notes", None)
    if notes is None:
        notes = request.app.state.progress_notes = ProgressNotes()
    return notes
