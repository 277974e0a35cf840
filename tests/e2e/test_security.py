"""A whole server under attack, all of it under ``-O``: keys, sockets, pickles, logs, metrics."""

import contextlib
import json
import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frontend.tokenizer import load_tokenizer_directory
from tests.e2e.engines import TINY
from tests.e2e.secured_server import (
    KEYS,
    SecuredServer,
    canary_messages,
    secured_server,
    send_to_tcp_port,
    send_to_unix_socket,
)
from tests.frontend.openai.fake_engine import make_server
from tests.frontend.openai.test_caps import FIELDS, body_of
from tests.fuzz import fuzz_metrics
from tests.ipc.other_user import as_nobody, is_root, knock

OPEN = {"/health", "/health/live", "/health/ready", "/ping", "/metrics", "/version"}
METHODS = [b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"HEAD", b"TRACE", b"PROPFIND"]
SECRET_PROMPT = "zyxwvut the planted prompt zyxwvut"


@pytest.fixture(scope="module")
def server() -> Iterator[SecuredServer]:
    with secured_server() as running:
        yield running


def own_paths() -> set[str]:
    """Every path that the application routes, those outside its description included."""
    _, _, app = make_server(api_keys=("x",))
    unseen: list[Any] = list(app.routes)
    found = set()
    while unseen:
        route = unseen.pop()
        if hasattr(route, "path"):
            found.add(route.path.replace("{name:path}", "tiny"))
        else:
            unseen += route.original_router.routes
    assert {"/v1/completions", "/v1/models/tiny", "/metrics", "/docs"} <= found
    return found


def all_paths() -> list[str]:
    """Every path that the application routes, and some that others of its kind have."""
    theirs = {
        "/invocations", "/pause", "/resume", "/update_weights", "/update_weights_from_disk",
        "/start_profile", "/stop_profile", "/collective_rpc", "/reset_prefix_cache", "/sleep",
        "/wake_up", "/server_info", "/v1/load_lora_adapter", "/abort_request", "/flush_cache",
        "/get_server_info", "/generate", "/debug/vars", "/v1/files", "/pprof", "/redoc",
    }  # fmt: skip
    return sorted(own_paths() | theirs)


def disguises(path: str) -> Iterator[tuple[bytes, bytes]]:
    """A path in the ways that fool one parser and not another: target and further headers."""
    plain = path.encode()
    yield plain, b""
    yield plain + b"?x=/health", b""
    yield b"http://x/health@y" + plain, b""
    yield b"http://x" + plain + b"#/health", b""
    yield plain + b"/../health", b""
    yield b"/health/.." + plain, b""
    yield b"/health%2f.." + plain, b""
    yield b"/health;" + plain, b""
    yield b"/" + plain, b""
    yield b"/%2e%2e" + plain, b""
    for host in (b"x/?", b"x/health?", b"x#/health", b"[::1]/health", b"a@b/health/"):
        yield plain, b"Host: " + host + b"\r\n"
    yield plain, b"X-Forwarded-Prefix: /health\r\nX-Forwarded-Host: x/health?\r\n"
    yield plain, b"X-Original-URL: /health\r\nX-Rewrite-URL: /health\r\nX-Forwarded-Path: /ping\r\n"
    yield plain, b"X-HTTP-Method-Override: OPTIONS\r\nForwarded: for=127.0.0.1;host=health\r\n"
    yield plain, b"X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n"


def test_without_a_key_every_path_in_every_disguise_is_closed_but_the_open_ones(
    server: SecuredServer,
) -> None:
    opened = set()
    for path in all_paths():
        for target, head in disguises(path) if path not in OPEN else [(path.encode(), b"")]:
            status = server.status(target, head=head)
            if status == 200:
                opened.add((path, target))
            # 400: not even a request; 401: closed. Never 404 or 405, which would tell of routes.
            assert status in (200, 400, 401), (status, target, head)
    assert opened == {(path, path.encode()) for path in OPEN}


def test_without_a_key_every_method_is_closed(server: SecuredServer) -> None:
    for path in all_paths():
        for method in METHODS:
            if path in OPEN:
                continue
            assert server.status(path.encode(), method) in (400, 401), (method, path)


def test_nothing_for_debugging_is_there_even_with_a_key(server: SecuredServer) -> None:
    for path in set(all_paths()) - own_paths():
        for method in ("GET", "POST"):
            assert server.ask(method, path, {})[0] == 404, path


@pytest.mark.parametrize(
    ("key", "status"),
    [
        pytest.param(KEYS[0], 200, id="of the file"),
        pytest.param(KEYS[1], 200, id="of the environment"),
        pytest.param(KEYS[0].upper(), 401, id="case changed"),
        pytest.param(KEYS[0][:-1], 401, id="cut"),
        pytest.param(KEYS[0] + "x", 401, id="longer"),
        pytest.param("", 401, id="empty"),
    ],
)
def test_only_whole_keys_open(server: SecuredServer, key: str, status: int) -> None:
    assert server.ask("GET", "/v1/models", key=key)[0] == status


def test_no_child_shows_a_key_in_its_command_line_or_environment(server: SecuredServer) -> None:
    front, *children = server.tree
    assert len(children) >= 3  # supervisor, core, worker
    assert not any(key in part for part in front.cmdline() for key in KEYS)
    for child in children:
        shown = f"{child.cmdline()} {child.environ()}"
        assert not any(key in shown for key in KEYS), child


def test_only_the_http_port_is_tcp_and_local_sockets_are_their_owners(
    server: SecuredServer,
) -> None:
    assert server.listening_tcp() == {("127.0.0.1", server.port)}
    paths = server.listening_unix()
    assert len(paths) >= 2  # core for frontends, core for workers
    for name in paths:
        path = Path(name)
        assert path.stat().st_uid == os.getuid()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert knock(name) == "welcome"
        if is_root():
            assert as_nobody(lambda name=name: knock(name)) == "PermissionError"  # type: ignore[misc]


def test_pickles_sent_to_every_endpoint_are_opened_by_none(
    server: SecuredServer, tmp_path: Path
) -> None:
    mark = tmp_path / "canary-ran"
    messages = canary_messages(mark)
    for path in server.listening_unix():
        send_to_unix_socket(path, messages)
    send_to_tcp_port(server.port, messages)
    answered, body = server.ask("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 4})
    assert answered == 200, body  # after all that was sent: the core and the worker still answer
    assert not mark.exists()


def test_peers_that_connect_and_never_speak_hold_nobody_up(server: SecuredServer) -> None:
    with contextlib.ExitStack() as silent:
        for path in server.listening_unix():
            for _ in range(100):
                peer = silent.enter_context(socket.socket(socket.AF_UNIX))
                peer.connect(path)
        for _ in range(100):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
        body = {"prompt": "Hi", "max_tokens": 32, "ignore_eos": True}
        status, answer = server.ask("POST", "/v1/completions", body)
        assert status == 200
        assert json.loads(answer)["usage"]["completion_tokens"] == 32


def test_methods_paths_and_names_of_strangers_leave_the_metrics_as_they_are(
    server: SecuredServer,
) -> None:
    assert fuzz_metrics.fuzz_server(server.port, KEYS[0], 400)["series"] > 10


def test_keys_prompts_and_forged_lines_are_not_in_the_log(server: SecuredServer) -> None:
    forged = "\nERROR 00:00:00 forged: \x1b[31m"
    server.ask("POST", "/v1/completions", {"prompt": SECRET_PROMPT, "max_tokens": 2})
    server.ask(
        "POST", "/v1/completions", {"prompt": SECRET_PROMPT, "n": "bad"}, key="bad" + KEYS[0]
    )
    server.ask(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": SECRET_PROMPT}]}
    )
    for field in ("model", "user", "request_id", "cache_salt", "role"):
        server.ask("POST", "/v1/completions", {"prompt": SECRET_PROMPT, field: forged})
    server.status(b"/v1/%0aERROR%200:0%20forged:%1b[31m", head=b"X-Forwarded-For: \x9b31m\xe2\r\n")
    server.status(b"/health?\x9b=\xff\xfe%0a%1b")
    log = server.log
    assert "prompt tokens" in log  # requests are logged by default
    assert not any(key in log for key in KEYS)
    assert SECRET_PROMPT not in log
    assert "Traceback" not in log
    assert not [line for line in log.splitlines() if line.startswith("ERROR 00:00:00 forged")]
    assert not any(c < " " or "\x7f" <= c <= "\x9f" for c in log if c not in "\n\t")


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        pytest.param(
            b"GET /health?" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", {431}, id="query"
        ),
        pytest.param(
            b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n", {431}, id="headers"
        ),
        pytest.param(
            b"GET /health HTTP/1.1\r\nA: " + b"b" * 65_536 + b"\r\n\r\n", {431}, id="header"
        ),
        pytest.param(
            b"GET /health?\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", {200, 400}, id="no ASCII"
        ),
        pytest.param(b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", {400, 401}, id="path, no ASCII"),
        pytest.param(b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n", {400, 401}, id="no UTF-8"),
        pytest.param(b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n", {400}, id="no method"),
        pytest.param(b"GET /health HTTP/9.9\r\n\r\n", {0, 200, 400, 505}, id="no version"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01" + bytes(600), {0, 400}, id="TLS to plain"),
        pytest.param(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            {400, 401},
            id="two lengths",
        ),
        pytest.param(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"ffffffffffffffffff\r\n",
            {400, 401},
            id="a chunk beyond 64 bits",
        ),
    ],
)
def test_no_head_whatever_makes_an_error_of_ours(
    server: SecuredServer, request_bytes: bytes, statuses: set[int]
) -> None:
    answer = server.raw(request_bytes)
    status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0
    assert status in statuses | ({0} if 431 in statuses else set()), answer[:200]
    assert server.ask("GET", "/health", key=None)[0] == 200


def test_bombs_and_crumbs_are_refused_or_eaten_in_time(server: SecuredServer) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer " + KEYS[0].encode() + b"\r\n"
    )
    for coding in (b"gzip", b"deflate", b"br", b"gzip, identity"):
        bomb = head + b"Content-Encoding: " + coding + b"\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"
        assert server.raw(bomb).startswith(b"HTTP/1.1 415")
    crumbs = b"1\r\n \r\n" * 200_000 + b"2\r\n{}\r\n0\r\n\r\n"
    answer = server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + crumbs, 60)
    assert answer.startswith(b"HTTP/1.1 400")  # a body without a prompt: all of it was read


def test_errors_tell_nothing_of_this_machine(server: SecuredServer) -> None:
    templates = [
        "{{ x.y.z }}", "{{ lipsum() }}", "{{ cycler.__init__ }}", "{{ range }}{{ 1 / 0 }}",
        "{{ raise_exception(range | string) }}", "{{ raise_exception(raise_exception | string) }}",
    ]  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", chat | {"chat_template": template}) for template in templates
    ]
    bodies += [("/v1/completions", b"\xff"), ("/v1/completions", {"prompt": [10**9]})]
    bodies += [("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [10**8]})]
    for path, body in bodies:
        status, answer = server.ask("POST", path, body)
        text = answer.decode()
        assert status in (200, 400), text
        if status == 400:
            assert not any(leak in text for leak in ("0x", "/work", "/usr", ".py", "Traceback")), (
                text
            )


def test_other_chats_go_on_while_templates_render_for_ever(server: SecuredServer) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    refused: list[int] = []

    def attack() -> None:
        body = chat | {"chat_template": endless}
        refused.append(server.ask("POST", "/v1/chat/completions", body, key=KEYS[1])[0])

    attackers = [threading.Thread(target=attack) for _ in range(4)]
    for each in attackers:
        each.start()
    num_served = 0
    while any(each.is_alive() for each in attackers):
        assert server.ask("POST", "/v1/chat/completions", chat)[0] == 200
        num_served += 1
    for each in attackers:
        each.join()
    assert num_served >= 2
    assert set(refused) == {400}


def test_prefixes_of_one_key_serve_no_other(server: SecuredServer) -> None:
    def num_cached(prompt: list[int], key: str) -> int:
        body = {"prompt": prompt, "max_tokens": 1}
        _, answer = server.ask("POST", "/v1/completions", body, key=key)
        return int(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])

    rng = random.Random(1)
    for _ in range(5):
        prompt = [rng.randrange(100, 8000) for _ in range(96)]
        assert num_cached(prompt, KEYS[0]) == 0
        assert num_cached(prompt, KEYS[1]) == 0  # the other's prompt tells nothing
        assert num_cached(prompt, KEYS[0]) >= 80
        assert num_cached(prompt, KEYS[1]) >= 80


def test_a_stream_is_its_text_decoded_at_once_however_prompts_end(server: SecuredServer) -> None:
    tokenizer = load_tokenizer_directory(TINY)
    texts = ["🙂🙃 你好", "naïve café", "日本語", "\u200d👩‍👩‍👧", "é"]
    rng = random.Random(2)
    for number in range(12):
        ids = tokenizer.encode(rng.choice(texts), add_special_tokens=False)
        prompt = ids[: rng.randrange(1, len(ids) + 1)]  # often in the middle of a character
        if number % 4 == 0:
            prompt = [rng.randrange(3, 259) for _ in range(5)]  # bytes that are no text
        # Bytes above ASCII only, so that characters are begun and broken off all the time.
        allowed = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
        body = {
            "prompt": prompt, "max_tokens": 12, "stream": True, "return_token_ids": True,
            "ignore_eos": True, "temperature": 1.5, "seed": number, "allowed_token_ids": allowed,
            "skip_special_tokens": False,
        }  # fmt: skip
        status, answer = server.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        chunks = [json.loads(line[6:]) for line in answer.split(b"\n\n") if line[6:7] == b"{"]
        choices = [chunk["choices"][0] for chunk in chunks]
        token_ids = [i for choice in choices for i in choice["token_ids"]]
        assert len(token_ids) == 12
        whole = tokenizer.decode(prompt + token_ids, skip_special_tokens=False)
        alone = tokenizer.decode(token_ids, skip_special_tokens=False)
        text = "".join(choice["text"] for choice in choices)
        assert text == alone or tokenizer.decode(prompt, skip_special_tokens=False) + text == whole


# More than the bundled model's context holds; frontend tests have them.
TOO_LONG_FOR_THE_MODEL = {"messages", "max_tokens"}


@pytest.mark.parametrize(("path", "field", "rest", "at_cap", "above", "cap"), FIELDS)
def test_a_field_at_its_cap_is_served_by_the_core_too(
    server: SecuredServer,
    path: str,
    field: str,
    rest: dict[str, Any],
    at_cap: Any,
    above: Any,
    cap: str,
) -> None:
    if field not in TOO_LONG_FOR_THE_MODEL:
        status, answer = server.ask("POST", path, body_of(path, field, rest, at_cap))
        assert status == 200, answer[:500]
    status, answer = server.ask("POST", path, body_of(path, field, rest, above))
    assert status == 400
    error = json.loads(answer)["error"]
    assert error["param"].split("[")[0] == field
    assert cap in error["message"]


def test_log_probabilities_of_the_longest_prompt_are_given_and_no_more(
    server: SecuredServer,
) -> None:
    _, answer = server.ask("POST", "/tokenize", {"prompt": "Hi"})
    longest = json.loads(answer)["max_model_len"] - 1
    for num_tokens, expected in ((longest, 200), (longest + 1, 400)):
        prompt = [100 + i % 1000 for i in range(num_tokens)]
        body = {"prompt": prompt, "prompt_logprobs": 20, "max_tokens": 1}
        status, answer = server.ask("POST", "/v1/completions", body)
        assert status == expected, answer[:500]


def test_special_tokens_typed_as_text_are_text_for_everybody_else(server: SecuredServer) -> None:
    named = load_tokenizer_directory(TINY).special_tokens_map.values()
    for text in (
        *map(str, named),
        "<image>",
        "<|image_pad|>" * 50,
        "<|endoftext|>" * 3,
        "\x00",
        "\u202e",
    ):
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
        assert server.ask("POST", "/v1/chat/completions", chat)[0] == 200, text
        body = {"prompt": text + "x" + text, "max_tokens": 2}
        assert server.ask("POST", "/v1/completions", body)[0] == 200, text
