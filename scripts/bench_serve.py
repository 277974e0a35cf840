"""Online measurements: our server under Poisson arrivals, driven by a client process.

Server, core and worker are weighed from outside while the client measures.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import bench_client
from bench_client import Load
from bench_processes import Usage, usage_by_role, used_between

Result = dict[str, Any]
HOST = "127.0.0.1"
STOP_S = 60.0


class Server:
    """Owns a server process and what it starts, from entering to leaving the ``with`` block.

    What it writes is shown only when it fails.
    """

    def __init__(self, flags: list[str], port: int) -> None:
        self.port = port
        self.model = ""  # the name that it serves; set once it is ready
        self.ready_s = 0.0  # from the process's start
        self.first_answer_s = 0.0
        command = [sys.executable, "-m", "frontend", "--port", str(port), "--host", HOST, *flags]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            command, start_new_session=True, stdout=self._log, stderr=subprocess.STDOUT
        )

    def __enter__(self) -> Self:
        """Wait until it answers, and have it answer one prompt."""
        try:
            self.model = asyncio.run(self._wait_until_ready())
            self.ready_s = round(time.perf_counter() - self._started, 2)
            asyncio.run(self._answer_one())
            self.first_answer_s = round(time.perf_counter() - self._started, 2)
        except BaseException:
            self._stop()
            self._show_log()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it, and wait for its end."""
        self._stop()
        if error is not None:
            self._show_log()
        self._log.close()

    def usage(self) -> dict[str, Usage]:
        """What its processes have used so far."""
        return usage_by_role(self._process.pid, "api")

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _show_log(self) -> None:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        print("\n".join(line[:500] for line in lines[-40:]), file=sys.stderr)

    async def _wait_until_ready(self) -> str:
        while self._process.poll() is None:
            try:
                answer = await self._exchange("GET /v1/models", b"")
            except OSError:
                await asyncio.sleep(0.02)
            else:
                return str(answer["data"][0]["id"])
        code = self._process.returncode
        raise RuntimeError(f"the server ended with exit code {code} before it was ready")

    async def _answer_one(self) -> None:
        body = {"model": self.model, "prompt": [1000] * 16, "max_tokens": 4, "ignore_eos": True}
        answer = await self._exchange("POST /v1/completions", json.dumps(body).encode())
        assert answer["choices"][0]["text"], "the server made no text"

    async def _exchange(self, request: str, body: bytes) -> Any:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        head = (
            f"{request} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        status, _, rest = answer.partition(b"\r\n")
        if b" 200 " not in status:
            raise RuntimeError(f"the server answered {status!r}: {rest[-500:]!r}")
        return json.loads(answer.split(b"\r\n\r\n", 1)[1])


def measure_serving(server: Server, load: Load) -> Result:
    """Run one load through a client process; what it felt and what the server's processes used."""
    command = [sys.executable, str(Path(bench_client.__file__))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(bench_client.encode_load(load))
        client.stdin.flush()
        if client.stdout.readline() != "ready\n":
            raise RuntimeError(f"the client ended with exit code {client.wait()}")
        before = server.usage()
        client.stdin.write("go\n")
        client.stdin.flush()
        answer = client.stdout.readline()
        used = used_between(before, server.usage())
    result: Result = json.loads(answer)
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests failed: {result['first_error']}")
    return result | _weigh(used, result)


def _weigh(used: dict[str, Usage], result: Result) -> Result:
    seconds = result["seconds"]
    weights: Result = {
        f"{role}_cores": round(usage.cpu_s / seconds, 3)
        for role, usage in used.items()
        if role in ("api", "core", "worker")
    }
    weights["api_us_per_token"] = round(1e6 * used["api"].cpu_s / result["output_tokens"], 2)
    weights["core_worker_cores"] = round(
        sum(used[role].cpu_s for role in ("core", "worker") if role in used) / seconds, 3
    )
    weights["api_rss_mib"] = round(used["api"].rss_bytes / 2**20)
    return weights
