"""Another user of the machine: kept out by the directory, by the socket's mode, and by its uid.

Where the tests do not run as root they cannot become another user; there the modes are all.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipc.channel import RouterChannel
from ipc.messages import frontend_to_core_decoder
from tests.ipc.other_user import as_nobody, is_root, knock


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that everybody may enter, as /tmp is."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def router() -> Iterator[RouterChannel[Any]]:
    channel: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    yield channel
    channel.close()


def test_the_owner_is_let_in(router: RouterChannel[Any], open_directory: Path) -> None:
    router.bind(f"ipc://{open_directory}/core")
    assert knock(f"{open_directory}/core") == "welcome"


def test_another_user_cannot_enter_the_private_directory(
    router: RouterChannel[Any], open_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_directory))
    path = router.bind().removeprefix("ipc://")
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    os.chmod(path, 0o777)  # the directory alone must do
    if is_root():
        assert as_nobody(lambda: knock(path)) == "PermissionError"
        assert as_nobody(lambda: str(os.listdir(Path(path).parent))).startswith("PermissionError")


def test_another_user_cannot_connect_to_a_socket_where_all_may_enter(
    router: RouterChannel[Any], open_directory: Path
) -> None:
    router.bind(f"ipc://{open_directory}/core")
    path = open_directory / "core"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if is_root():
        assert as_nobody(lambda: knock(str(path))) == "PermissionError"


def test_another_user_is_cut_off_where_even_the_modes_were_loosened(
    router: RouterChannel[Any], open_directory: Path
) -> None:
    router.bind(f"ipc://{open_directory}/core")
    path = open_directory / "core"
    path.chmod(0o777)
    assert knock(str(path)) == "welcome"
    if is_root():
        said = as_nobody(lambda: knock(str(path)))
        assert said.startswith(("cut off after 0 bytes", "ConnectionResetError", "BrokenPipe"))
