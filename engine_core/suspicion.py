"""Which request kills cores. Pure bookkeeping of the supervisor: keys and digests, no content.

A request is suspected once for each death from inside that happened while it ran and had brought
no token since it was sent to that core. Suspected twice, it goes on trial: it runs alone until it
has brought a token. A core that dies then was killed by it: it fails, and so does for a while
whatever has the same content. Deaths from outside suspect nobody.
"""

from engine_core.flight_record import Flight, Verdicts

TRIAL_AT = 2  # suspicions
REFUSED_S = 600.0


class Suspicions:
    """Owns the counts of suspicions and the contents that are refused."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._guilty: dict[str, float] = {}  # key -> until; as it may be sent once more
        self._refused: dict[str, float] = {}  # fingerprint -> until

    def note_death(self, flight: Flight, now_s: float) -> Verdicts:
        """Draw the conclusions of a death from inside; what the next core must know."""
        if flight.alone is not None and flight.alone in flight.suspects:
            self._guilty[flight.alone] = now_s + REFUSED_S
            self._refused[flight.fingerprint] = now_s + REFUSED_S
            self._counts.clear()  # it is found: the others were with it by chance
        elif flight.suspects:
            counts = self._counts
            self._counts = {key: counts.get(key, 0) + 1 for key in flight.suspects}
        return self._verdicts(now_s)

    def note_other_death(self, now_s: float) -> Verdicts:
        """A core ended that no request is suspected of."""
        return self._verdicts(now_s)

    def _verdicts(self, now_s: float) -> Verdicts:
        self._guilty = {key: until for key, until in self._guilty.items() if until > now_s}
        self._refused = {mark: until for mark, until in self._refused.items() if until > now_s}
        on_trial = [key for key, count in self._counts.items() if count >= TRIAL_AT]
        return Verdicts(on_trial, list(self._guilty), dict(self._refused))
