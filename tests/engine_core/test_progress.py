"""The page that says how far a core has come, read while it is written."""

import os
import subprocess
import sys

from engine_core.progress import Phase, ProgressPage, make_page_file

WRITE_FOR_EVER = """
import sys
from engine_core.progress import Phase, ProgressPage
page = ProgressPage(int(sys.argv[1]))
page.write(Phase.STEPPING, 1, True)
print("ready", flush=True)
while True:
    page.write(Phase.STEPPING, 1, True)
"""


def test_what_is_read_while_it_is_written_is_never_half_written() -> None:
    # A page that is cleared before each write shows a last beat at the machine's boot: a hang.
    file = make_page_file()
    command = [sys.executable, "-c", WRITE_FOR_EVER, str(file)]
    page = ProgressPage(file)
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[file]) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            beats = [page.read() for _ in range(300_000)]
        finally:
            writer.kill()
    page.close()
    os.close(file)
    first = beats[0]
    assert first.beat_s > 0.0
    for beat in beats:
        assert beat.phase is Phase.STEPPING
        assert 0.0 <= beat.beat_s - first.beat_s < 60.0
