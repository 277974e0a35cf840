"""torch's profiler for one rank: started and stopped by control operations."""

import os
import time
from pathlib import Path

import torch

from ipc.errors import RequestError


class RankProfiler:
    """Owns at most one running profile. Used by the thread that runs the steps."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._profile: torch.profiler.profile | None = None
        self._path = Path()

    def start(self, directory: str) -> None:
        """Start recording; the trace will be a new file in ``directory``.

        Raises:
            RequestError: a profile is running, or the directory cannot be made.
        """
        if self._profile is not None:
            raise RequestError("a profile is running already; stop it first")
        folder = Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise RequestError(f"cannot write traces to {directory}: {err}") from err
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self._path = folder / f"rank{self._rank}-{os.getpid()}-{stamp}.trace.json"
        self._profile = torch.profiler.profile()
        self._profile.start()

    def stop(self) -> str:
        """Stop recording, write a Chrome trace and return its file name.

        Raises:
            RequestError: no profile is running.
        """
        if self._profile is None:
            raise RequestError("no profile is running")
        profile, self._profile = self._profile, None
        profile.stop()
        profile.export_chrome_trace(str(self._path))
        return str(self._path)
