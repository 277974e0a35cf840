"""The server's command line: what each flag becomes, and what is refused before any start."""

from pathlib import Path
from typing import Any

import pytest

from frontend.model_files import bundled_model, choose_model
from frontend.openai.server_args import (
    listen_options,
    make_parser,
    server_options,
)
from ipc.errors import ConfigError


def parse(*words: str) -> Any:
    return make_parser("heliograph serve").parse_args(words)


def test_defaults_are_those_of_the_contract() -> None:
    args = parse("m")
    listen, options = listen_options(args), server_options(args, {})
    assert (listen.host, listen.port, listen.uvicorn_log_level) == (None, 8000, "info")
    assert listen.cors.allowed_origins == listen.cors.allowed_methods == ("*",)
    assert listen.cors.allowed_headers == ("*",)
    assert not listen.cors.allow_credentials
    assert (listen.ssl_cert_reqs, listen.middleware) == (0, ())
    assert listen.shutdown_timeout == 30.0
    assert (options.response_role, options.chat_template) == ("assistant", None)
    assert (options.api_keys, options.root_path) == ((), "")
    assert (args.disable_log_requests, args.max_log_len, args.engine_use_ray) == (
        False,
        None,
        False,
    )


def test_flags_reach_their_options(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    args = parse(
        "--host", "::1", "--port", "0", "--allow-credentials", "--allowed-origins", '["http://a"]',
        "--allowed-methods", '["GET"]', "--allowed-headers", '["X"]', "--api-key", "one",
        "--api-key", "two", "--chat-template", str(template), "--response-role", "bot",
        "--root-path", "/llm/", "--strict-fields", "--shutdown-timeout", "2.5",
        "--middleware", "starlette.middleware.gzip.GZipMiddleware", "--max-log-len", "10",
        "--api-key-weights", "1", "2.5", "3", "--max-request-timeout", "60",
        "--max-connections", "99",
    )  # fmt: skip
    listen, options = listen_options(args), server_options(args, {"VLLM_API_KEY": "three"})
    assert (listen.host, listen.port, listen.shutdown_timeout) == ("::1", 0, 2.5)
    assert listen.cors.allow_credentials
    assert listen.cors.allowed_origins == ("http://a",)
    assert listen.cors.allowed_methods == ("GET",)
    assert listen.cors.allowed_headers == ("X",)
    assert [own.path for own in listen.middleware] == ["starlette.middleware.gzip.GZipMiddleware"]
    assert options.api_keys == ("one", "two", "three")
    assert options.api_key_weights == (1.0, 2.5, 3.0)
    assert (options.max_request_timeout, listen.max_connections) == (60.0, 99)
    assert "two" not in repr(options)
    assert (options.chat_template, options.response_role) == ("{{ messages }}", "bot")
    assert (options.root_path, options.strict_fields) == ("/llm", True)
    assert args.max_log_len == 10


@pytest.mark.parametrize(
    ("words", "name"),
    [
        pytest.param(["--port", "65536"], "--port", id="port"),
        pytest.param(["--lora-modules", "a=b"], "--lora-modules", id="adapters"),
        pytest.param(["--chat-template", "chat.jinja"], "--chat-template", id="template typo"),
        pytest.param(["--middleware", "os.getcwd"], "--middleware", id="middleware"),
        pytest.param(["--root-path", "llm"], "--root-path", id="root path"),
        pytest.param(["--api-server-count", "0"], "--api-server-count", id="no API process"),
        pytest.param(["--max-connections", "0"], "--max-connections", id="no connection"),
        pytest.param(["--max-request-timeout", "0"], "--max-request-timeout", id="no time"),
        pytest.param(["--api-key-weights", "1"], "--api-key-weights", id="weight without a key"),
        pytest.param(
            ["--api-key", "k", "--api-key-weights", "0"], "--api-key-weights", id="no weight"
        ),
        pytest.param(
            ["--api-key", "k", "--api-key-weights", "nan"], "--api-key-weights", id="NaN weight"
        ),
        pytest.param(
            ["--api-server-count", "2", "--uds", "/tmp/s"], "--uds", id="API processes on a path"
        ),
    ],
)
def test_what_cannot_work_is_refused_by_the_flags_name(words: list[str], name: str) -> None:
    args = parse(*words)
    with pytest.raises(ConfigError, match=name):
        (server_options(args, {}), listen_options(args))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--uvicorn-log-level", "loud"], id="log level"),
        pytest.param(["--ssl-cert-reqs", "3"], id="certificate policy"),
        pytest.param(["--allowed-origins", "*"], id="origins that are no JSON"),
        pytest.param(["--allowed-origins", "[1]"], id="origins that are no strings"),
        pytest.param(["--shutdown-timeout", "-1"], id="negative timeout"),
        pytest.param(["--shutdown-timeout", "nan"], id="timeout that is no number"),
        pytest.param(["--generation-config", "x"], id="generation config"),
        pytest.param(["--no-such-flag"], id="unknown flag"),
    ],
)
def test_values_outside_a_flags_form_end_with_exit_code_two(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_the_model_is_the_flag_or_the_positional_or_the_bundled_one() -> None:
    for words, model in (
        (["m"], "m"),
        (["--model", "m"], "m"),
        (["m", "--model", "m"], "m"),
        ([], str(bundled_model())),
    ):
        args = parse(*words)
        choose_model(args)
        assert args.model == model
    with pytest.raises(ConfigError, match="differ"):
        choose_model(parse("m", "--model", "n"))


def test_keys_come_from_files_too_which_process_listings_do_not_show(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n  second  \n")
    path.chmod(0o600)
    args = parse("--api-key-file", str(path), "--api-key", "third")
    assert server_options(args, {}).api_keys == ("third", "first", "second")
    assert not caplog.records
    path.chmod(0o644)
    server_options(args, {})
    assert "others can read it" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, "cannot be read", id="no such file"),
        pytest.param("# nothing\n\n", "holds no key", id="only comments"),
        pytest.param(b"\xff\xfe", "cannot be read", id="no text"),
    ],
)
def test_a_file_without_keys_is_refused_lest_a_server_stands_open(
    content: str | bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"--api-key-file .*{words}"):
        server_options(parse("--api-key-file", str(path)), {})
