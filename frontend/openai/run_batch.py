"""``heliograph run-batch``: a JSONL file of requests in, a JSONL file of answers out.

Requests run through the same application as over HTTP, in this process and without a socket; the
engine batches them. Answers are written as they finish, so a killed run keeps what it has.
"""

import argparse
import asyncio
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
from prometheus_client import CollectorRegistry

from frontend.__main__ import make_engine
from frontend.console import set_up_logging
from frontend.model_files import choose_model
from frontend.openai.api_server import build_app
from frontend.openai.server_args import make_parser, server_options
from frontend.openai.state import make_state
from ipc.errors import ConfigError

PATHS = ("/v1/completions", "/v1/chat/completions")
RETRY_S = 1.0  # after the engine had no room for a request


class BatchLine(msgspec.Struct, kw_only=True):
    """One line of the input."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_decode = msgspec.json.Decoder(BatchLine).decode
_encode = msgspec.json.Encoder().encode


def main(argv: Sequence[str]) -> int:
    """Answer every line; the exit code."""
    parser = make_parser("heliograph run-batch")
    parser.add_argument("-i", "--input-file", type=Path, required=True, help="JSONL of requests")
    parser.add_argument("-o", "--output-file", type=Path, required=True, help="JSONL of answers")
    args = parser.parse_args(argv)
    set_up_logging(args.uvicorn_log_level)
    choose_model(args)
    lines = list(read_lines(args.input_file))
    try:
        with args.output_file.open("wb") as out:
            num_failed = asyncio.run(_run(args, lines, out))
    except OSError as err:
        raise ConfigError(f"--output-file {args.output_file}: {err.strerror}") from err
    sys.stderr.write(f"{len(lines)} requests, {num_failed} failed\n")
    return 0


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The requests of a file; empty lines are skipped.

    Raises:
        ConfigError: the file cannot be read, or a line is no request; it names the line.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"--input-file {path}: {err.strerror}") from err
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as err:
            raise ConfigError(f"--input-file {path}, line {number}: {err}") from err
        if request.method != "POST" or request.url not in PATHS:
            raise ConfigError(
                f"--input-file {path}, line {number}: POST to {' or '.join(PATHS)}, "
                f"got {request.method} {request.url}"
            )
        yield request


async def _run(args: argparse.Namespace, lines: list[BatchLine], out: IO[bytes]) -> int:
    metrics = CollectorRegistry()
    engine = make_engine(args, metrics)
    try:
        await engine.wait_until_ready()
        state = make_state(engine, server_options(args, {}), metrics, created=0)
        # Enough to keep every batch full; the rest of the file waits here.
        return await answer_all(build_app(state), lines, out, 2 * state.max_prompts_at_once)
    finally:
        engine.shutdown()


async def answer_all(app: Any, lines: list[BatchLine], out: IO[bytes], at_once: int) -> int:
    """Write one answer per line; returns how many of them are errors."""
    slots = asyncio.Semaphore(at_once)
    num_failed = 0

    async def answer_one(line: BatchLine) -> None:
        nonlocal num_failed
        async with slots:
            while (answer := await ask(app, line.url, bytes(line.body)))[0] == 429:
                await asyncio.sleep(RETRY_S)  # nobody waits for a batch: it has the time
        status, body = answer
        num_failed += status != 200
        out.write(_encode(_answer(line, status, body)) + b"\n")
        out.flush()

    async with asyncio.TaskGroup() as tasks:
        for line in lines:
            tasks.create_task(answer_one(line))
    return num_failed


async def ask(app: Any, path: str, body: bytes) -> tuple[int, bytes]:
    """One POST to an ASGI application; the status and the body of its answer."""
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # this client never leaves
        raise AssertionError("unreachable")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(_scope(path), receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def _answer(line: BatchLine, status: int, body: bytes) -> dict[str, Any]:
    is_json = not body.startswith(b"data: ")
    shown = msgspec.Raw(body) if is_json else body.decode()
    response = {"status_code": status, "request_id": secrets.token_hex(16), "body": shown}
    return {
        "id": f"batch-{secrets.token_hex(16)}",
        "custom_id": line.custom_id,
        "response": response if status == 200 else None,
        "error": None if status == 200 else shown,
    }


def _scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": ("batch", 0),
        "state": {},
    }
