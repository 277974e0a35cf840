"""What the server process says and how it ends when it cannot serve."""

import pytest

from frontend.__main__ import main

FLAGS = """
--host --port --uvicorn-log-level --allow-credentials --allowed-origins --allowed-methods
--allowed-headers --api-key --lora-modules --chat-template --response-role --ssl-keyfile
--ssl-certfile --ssl-ca-certs --ssl-cert-reqs --root-path --middleware --engine-use-ray
--disable-log-requests --max-log-len --attach --served-model-name --api-server-count
"""


def test_help_names_every_flag_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS.split():
        assert flag in text, flag
