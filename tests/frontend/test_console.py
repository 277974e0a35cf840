"""How commands end when they cannot do what they should."""

import pytest

from frontend.console import report
from ipc.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    ExitCode,
    ProtocolError,
    UnsupportedError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ConfigError("x"), ExitCode.CONFIG, id="configuration"),
        pytest.param(UnsupportedError("x"), ExitCode.CONFIG, id="a feature this version lacks"),
        pytest.param(EngineStartError("x"), ExitCode.START_FAILED, id="start"),
        pytest.param(ProtocolError("x"), ExitCode.START_FAILED, id="another protocol"),
        pytest.param(EngineDeadError("x"), ExitCode.WORKER_DIED, id="worker died"),
        pytest.param(EngineDeadError("x", ExitCode.CORE_DIED), ExitCode.CORE_DIED, id="core died"),
    ],
)
def test_exit_codes_tell_failures_apart(error: EngineError, code: ExitCode) -> None:
    assert report(error) == code


def test_an_error_is_one_line_however_many_it_has(caplog: pytest.LogCaptureFixture) -> None:
    report(EngineStartError("worker 0 failed:\n  no memory"))
    assert caplog.messages == ["worker 0 failed: no memory"]
