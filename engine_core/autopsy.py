"""The supervisor's look at a dead core: what its flight record says, and whom it accuses."""

import logging

from engine_core.flight_record import Flight, FlightRecord
from engine_core.suspicion import Suspicions

logger = logging.getLogger(__name__)


class Autopsy:
    """Owns the shared memory that every core of an engine writes its flight record to."""

    def __init__(self) -> None:
        self.descriptor = FlightRecord.make_memory()
        self._record = FlightRecord(self.descriptor)
        self._suspicions = Suspicions()

    def examine(self, now_s: float, *, is_outside: bool) -> None:
        """Draw the conclusions of a core's death, and leave them for the next core."""
        flight: Flight = self._record.read()
        self._record.forget()
        if is_outside:
            self._record.judge(self._suspicions.note_other_death(now_s))
            return
        verdicts = self._suspicions.note_death(flight, now_s)
        self._record.judge(verdicts)
        if flight.suspects:
            logger.warning(
                "%d requests had brought no token when the core died; %d go on trial next, "
                "%d fail because they killed it alone",
                len(flight.suspects),
                len(verdicts.on_trial),
                len(verdicts.guilty),
            )
