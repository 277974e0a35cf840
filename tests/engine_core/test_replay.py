"""A recorded core runs again exactly; a difference is found; any file is safe to open."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from engine_core.flight_recorder import RecordedCore
from engine_core.recording import Begin, RecordingFile, read_recording, save_recording
from engine_core.replay import DivergenceError, replay
from engine_core.scheduler import Scheduler
from ipc.errors import ConfigError
from tests.engine_core.builders import CLIENT, Setup
from tests.engine_core.test_mixed_requests import SETUPS, Mix

LARGE = 64 * 2**20


def record_mix(setup: Setup, directory: Path, seed: int = 3, limit_bytes: int = LARGE) -> Path:
    """The recording of a random load, saved."""
    mix = Mix(setup, seed)
    executor = setup.executor()
    file = RecordingFile(directory / "live", limit_bytes)
    core = RecordedCore(setup.config(), executor, executor.ready, file=file)
    mix.core = mix.rig.core = core
    mix.rig.executor = executor
    mix.run()
    core.remove_client(CLIENT)
    file.close()
    save_recording(directory / "live", directory / "saved")
    return directory / "saved"


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No headroom, so that small pools preempt."""
    monkeypatch.setitem(Scheduler.__init__.__kwdefaults__, "growth_tokens", 0)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    "name", ["swap, small pool", "priorities, small pool", "sliding window, swap, three in flight"]
)
def test_a_load_with_aborts_and_preemptions_runs_again_exactly(name: str, tmp_path: Path) -> None:
    entries = read_recording(record_mix(SETUPS[name], tmp_path))
    counts = replay(entries)
    assert counts.events == len(entries) - 1
    assert counts.steps > 50
    assert counts.preemptions > 0


def test_another_process_replays_it_too(tmp_path: Path) -> None:
    path = record_mix(SETUPS["defaults, blocks of 16"], tmp_path)
    command = [sys.executable, "-m", "engine_core.replay", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("equal\n")


def test_a_full_recording_replays_up_to_where_it_ends(tmp_path: Path) -> None:
    setup = SETUPS["one step in flight"]
    path = record_mix(setup, tmp_path, limit_bytes=20_000)
    entries = read_recording(path)
    assert path.stat().st_size <= 20_000
    assert replay(entries).events == len(entries) - 1 > 10


def test_a_changed_scheduler_is_found_at_its_first_different_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = read_recording(record_mix(SETUPS["one step in flight"], tmp_path))
    schedule = Scheduler.schedule

    def faulty(self: Scheduler, now_s: float):  # type: ignore[no-untyped-def]
        planned = schedule(self, now_s)
        if planned is not None and planned[0].step_id == 30:
            planned[0].rows.reverse()
            planned[0].rows.append(0)
        return planned

    monkeypatch.setattr(Scheduler, "schedule", faulty)
    with pytest.raises(DivergenceError, match=r"after 30 steps\nstep 30\n  rows\n    recorded"):
        replay(entries)


def test_a_mutated_file_gives_a_clean_error_or_a_difference(tmp_path: Path) -> None:
    data = record_mix(SETUPS["one step in flight"], tmp_path, limit_bytes=6_000).read_bytes()
    rng, target = random.Random(5), tmp_path / "mutated"
    num_refused = 0
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        target.write_bytes(mutated)
        try:
            replay(read_recording(target))
        except (ConfigError, DivergenceError):
            num_refused += 1
    assert num_refused > 150


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", b"\x90", b"\x91" * 10_000, b"hello"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="recording"):
            read_recording(path)
        with pytest.raises(ConfigError, match="recording"):
            save_recording(path, tmp_path / "saved")


def test_a_recording_begins_with_what_makes_a_core(tmp_path: Path) -> None:
    entries = read_recording(record_mix(SETUPS["one step in flight"], tmp_path))
    assert isinstance(entries[0], Begin)
    assert len(entries[0].hash_key) == 32
