"""Streams whose readers were lost: their requests run on, for a while."""

import asyncio

from frontend.async_session import OutputStream
from ipc.messages import Linger


class Lingerers:
    """Owns the streams of this server whose readers were lost, by name."""

    def __init__(self) -> None:
        self._streams: dict[str, tuple[OutputStream, asyncio.TimerHandle]] = {}

    def keep(self, linger: Linger, stream: OutputStream) -> None:
        """Let a stream's request run on until its reader comes back or its time is over."""
        self.drop(linger.stream_id)
        timer = asyncio.get_running_loop().call_later(linger.seconds, self.drop, linger.stream_id)
        self._streams[linger.stream_id] = (stream, timer)

    def drop(self, stream_id: str) -> None:
        """Close a stream; unknown names are no error."""
        stream, timer = self._streams.pop(stream_id, (None, None))
        if stream is not None and timer is not None:
            timer.cancel()
            stream.close()
