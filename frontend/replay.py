"""The command ``heliograph replay``: the engine core's own tool, in a process of its own."""

import subprocess
from collections.abc import Sequence

from ipc.processes import child_environment, python_command


def main(argv: Sequence[str]) -> int:
    """Replay a recording; the exit code."""
    command = python_command("engine_core.replay", *argv)
    return subprocess.run(command, env=child_environment()).returncode
