"""What the server process says and how it ends when it cannot serve."""

import pytest

from frontend.__main__ import main, report
from ipc.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineStartError,
    ExitCode,
    ProtocolError,
    UnsupportedError,
)

FLAGS = """
--host --port --uvicorn-log-level --allow-credentials --allowed-origins --allowed-methods
--allowed-headers --api-key --lora-modules --chat-template --response-role --ssl-keyfile
--ssl-certfile --ssl-ca-certs --ssl-cert-reqs --root-path --middleware --engine-use-ray
--disable-log-requests --max-log-len --attach --served-model-name
"""


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


def test_help_names_every_flag_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS.split():
        assert flag in text, flag
