"""What a session does when its engine comes back with another core: everything open goes on.

Compares the new core with the one that was lost, and makes the messages that continue every open
request. Knows no sockets; it is told the time.
"""

import logging
import time

from frontend.output_processor import OutputProcessor
from frontend.request_state import RequestState
from ipc.errors import EngineGenerateError
from ipc.messages import AddRequest, Welcome

logger = logging.getLogger(__name__)


class Recovery:
    """Owns what is known of the present core, and when it came."""

    def __init__(self, welcome: Welcome, outputs: OutputProcessor) -> None:
        self._welcome = welcome
        self._outputs = outputs
        self._back_since_s: float | None = None  # until the first outputs of a new core

    def resume(self, welcome: Welcome) -> tuple[list[AddRequest], list[RequestState]]:
        """Move everything open to another core.

        Returns:
            What to send, oldest first; and the requests that failed, because they cannot go on
            with another model than they began with.
        """
        before, self._welcome = self._welcome, welcome
        if (difference := find_difference(before, welcome)) is not None:
            logger.error("open requests fail: %s", difference)
            error = EngineGenerateError(difference)
            return [], self._outputs.fail_all(error, time.time())
        messages = self._outputs.journal.resume_all(welcome.epoch)
        self._back_since_s = time.monotonic()
        logger.warning("engine core %d continues %d open requests", welcome.epoch, len(messages))
        return messages, []

    def note_outputs(self) -> None:
        """Outputs have come; the first ones of a new core are worth a line."""
        if self._back_since_s is not None:
            waited_s, self._back_since_s = time.monotonic() - self._back_since_s, None
            logger.warning("the first tokens came %.2f s after the engine", waited_s)


def find_difference(before: Welcome, now: Welcome) -> str | None:
    """Why requests that began on one core cannot go on, with both values; None when they can.

    Limits may differ, as memory does: the core itself refuses what it cannot hold any more.
    """
    if before.model_digest != now.model_digest:
        return (
            f"the engine restarted with model {now.model_digest}, and the request began with "
            f"model {before.model_digest}"
        )
    if before.limits.vocab_size != now.limits.vocab_size:
        return (
            f"the engine restarted with a vocabulary of {now.limits.vocab_size}, and the request "
            f"began with one of {before.limits.vocab_size}"
        )
    return None
