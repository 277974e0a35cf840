"""Request logging: a line without content at INFO, the prompt at DEBUG, cut."""

import logging

import pytest

from frontend.request_log import log_request
from tests.frontend.builders import make_rig


def test_no_prompt_is_in_the_log_at_the_default_level(caplog: pytest.LogCaptureFixture) -> None:
    state = make_rig().open("name", prompt="secret", stop="private")
    with caplog.at_level(logging.INFO):
        log_request(state, None)
    assert "request name: 6 prompt tokens" in caplog.text
    assert "secret" not in caplog.text
    assert "private" not in caplog.text


@pytest.mark.parametrize(
    ("max_log_len", "text", "ids"),
    [
        pytest.param(None, "'secret'", "[115, 101, 99, 114, 101, 116]", id="whole"),
        pytest.param(2, "'se'", "[115, 101],", id="cut"),
        pytest.param(0, "''", "[],", id="nothing"),
    ],
)
def test_text_and_ids_are_cut_to_the_same_length(
    max_log_len: int | None, text: str, ids: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_rig().open(prompt="secret")
    with caplog.at_level(logging.DEBUG):
        log_request(state, max_log_len)
    assert f"prompt {text}, prompt ids {ids}" in caplog.text


def test_a_prompt_of_ids_alone_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    state = make_rig().open(prompt=[1, 2])
    with caplog.at_level(logging.DEBUG):
        log_request(state, 1)
    assert "prompt None, prompt ids [1]" in caplog.text
