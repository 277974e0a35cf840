"""A whole server with API keys, as an operator would start it, and what an attacker does to it."""

import contextlib
import http.client
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

from tests.e2e.engines import ROOT, TINY
from tests.fuzz.servers import free_port, wait_until_ready

KEYS = ("planted-key-of-the-file", "planted-key-of-the-environment")


@dataclass
class SecuredServer:
    """The server's process, where it listens, and what it has written so far."""

    process: "subprocess.Popen[bytes]"
    port: int
    log_path: Path

    @property
    def log(self) -> str:
        """Every log line so far, of all its processes."""
        return self.log_path.read_text()

    @property
    def tree(self) -> list[psutil.Process]:
        """The server's process and all below it."""
        front = psutil.Process(self.process.pid)
        return [front, *front.children(recursive=True)]

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = KEYS[0], **headers: str
    ) -> tuple[int, bytes]:
        """Status and body of one request by a client of the usual kind."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            sent = {"Content-Type": "application/json"} | headers
            if key is not None:
                sent["Authorization"] = f"Bearer {key}"
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return response.status, response.read()

    def raw(self, data: bytes, limit_s: float = 20.0) -> bytes:
        """What comes back for bytes, until the server closes or the answer's head is whole."""
        with socket.create_connection(("127.0.0.1", self.port), limit_s) as client:
            received = b""
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
                while b"\r\n\r\n" not in received and (piece := client.recv(65536)):
                    received += piece
        return received

    def status(self, target: bytes, method: bytes = b"GET", head: bytes = b"") -> int:
        """The status of a request line of any bytes; 0 when the server just closes."""
        if b"host:" not in head.lower():
            head = b"Host: x\r\n" + head
        request = method + b" " + target + b" HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n"
        answer = self.raw(request)
        return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0

    def listening_tcp(self) -> set[tuple[str, int]]:
        """Addresses that any process of the tree listens on."""
        found = set()
        for process in self.tree:
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((connection.laddr.ip, connection.laddr.port))
        return found

    def listening_unix(self) -> set[str]:
        """Paths of unix sockets that any process of the tree listens on."""
        inodes = set()
        for process in self.tree:
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(link)
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
        rows = [line.split(maxsplit=7) for line in lines]
        listening = [row for row in rows if row[3] == "00010000" and row[6] in inodes]
        return {row[7] if len(row) > 7 else "(without a name)" for row in listening}


@contextlib.contextmanager
def secured_server(*flags: str) -> Iterator[SecuredServer]:
    """A server on the tiny model under ``-O``: two keys, log lines as they are by default."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name) / "keys"
        keys.write_text(f"# one per line\n{KEYS[0]}\n")
        keys.chmod(0o600)
        log_path = Path(name) / "log"
        command = [
            sys.executable, "-m", "frontend", "--model", str(TINY), "--dtype", "float32",
            "--host", "127.0.0.1", "--port", str(port), "--worker-threads", "1",
            "--served-model-name", "tiny", "--max-logprobs", "20", "--api-key-file", str(keys),
            "--trust-request-chat-template", *flags,
        ]  # fmt: skip
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1", "PYTHONOPTIMIZE": "1", "VLLM_API_KEY": KEYS[1],
        }  # fmt: skip
        with (
            log_path.open("wb") as log,
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log) as process,
        ):
            try:
                wait_until_ready(f"http://127.0.0.1:{port}/health", process)
                yield SecuredServer(process, port, log_path)
                assert process.poll() is None, log_path.read_text()
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise


class Canary:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def canary_messages(mark: Path) -> list[bytes]:
    """Pickles in the wrappings in which other systems would open them."""
    messages = []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(Canary(mark), protocol=protocol)
        messages += [data, msgspec.msgpack.encode(data), msgspec.msgpack.encode(["Hello", data])]
    last = messages[-3]
    messages += [msgspec.msgpack.encode(msgspec.msgpack.Ext(code, last)) for code in range(128)]
    messages += [
        msgspec.msgpack.encode(["Hello", 1, msgspec.msgpack.Ext(code, last), "x", 1])
        for code in range(128)
    ]
    return messages


def send_to_unix_socket(path: str, messages: list[bytes]) -> None:
    """Send messages as a ZeroMQ peer, one frame and two, and as bytes without any protocol."""
    for kind in (zmq.DEALER, zmq.REQ, zmq.SUB):
        with zmq.Context() as context, context.socket(kind) as peer:
            peer.linger = 2000
            peer.sndtimeo = 2000
            peer.connect(f"ipc://{path}")
            if kind == zmq.SUB:
                peer.setsockopt(zmq.SUBSCRIBE, messages[0])
            elif kind == zmq.REQ:
                peer.send(messages[0])
            else:
                for message in messages:
                    peer.send(message)
                    peer.send_multipart([messages[-1], message])
    for message in messages[:10]:
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.connect(path)
            client.sendall(message)


def send_to_tcp_port(port: int, messages: list[bytes]) -> None:
    """Send messages as bytes, and as the bodies of requests of several types."""
    for message in messages[:20]:
        for head in (
            b"",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n"
            b"Content-Type: %b\r\nContent-Length: %d\r\n\r\n",
        ):
            for kind in (b"application/octet-stream", b"application/json", b"application/msgpack"):
                filled = head and head % (KEYS[0].encode(), kind, len(message))
                with (
                    contextlib.suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), 5) as client,
                ):
                    client.sendall(filled + message)
                    client.shutdown(socket.SHUT_WR)
                    client.recv(1000)


def wait_a_little(is_so: Any, limit_s: float = 20.0) -> bool:
    """Whether something becomes so within a generous time."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        if is_so():
            return True
        time.sleep(0.05)
    return False
