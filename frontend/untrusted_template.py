"""Rendering a chat template that a request brought: in a process that can be killed.

A sandbox cannot bound what a template costs: nested loops, doubled strings. So a hostile template
runs alone, under limits of the operating system, and whoever waits for it waits two seconds.

The process is this module: ``python -m frontend.untrusted_template``; JSON on stdin and stdout.
"""

import asyncio
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from frontend.chat_template import MAX_OUTPUT_CHARS, render
from ipc.errors import EngineError, RequestError
from ipc.processes import child_environment, python_command

RENDER_TIMEOUT_S = 2.0
MAX_TEMPLATE_CHARS = 64 << 10
_ENVIRONMENT = ("PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONOPTIMIZE", "LANG", "TZ")
MEMORY_BYTES = 64 << 20  # beyond what the process holds when it begins


async def render_untrusted(
    template: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> str:
    """``chat_template.render`` in a process of its own.

    Raises:
        RequestError: the template fails, or needs too much time, memory or text.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise RequestError(
            f"chat_template is above {MAX_TEMPLATE_CHARS} characters", param="chat_template"
        )
    work = msgspec.json.encode({"template": template, "messages": messages, "options": options})
    answer = await _ask_process(work)
    if "text" in answer:
        return answer["text"]
    raise RequestError(answer["error"], param="chat_template")


async def _ask_process(work: bytes) -> dict[str, str]:
    inherited = child_environment()
    process = await asyncio.create_subprocess_exec(
        *python_command("frontend.untrusted_template"),
        # What a template might get hold of should be worth nothing: no secrets, no settings.
        env={name: inherited[name] for name in _ENVIRONMENT if name in inherited},
        cwd="/",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        # Twice the limit: the process needs time to start, and ends itself by its CPU limit.
        async with asyncio.timeout(2 * RENDER_TIMEOUT_S):
            output, _ = await process.communicate(work)
        return msgspec.json.decode(output, type=dict[str, str])
    except (TimeoutError, msgspec.DecodeError):
        return {"error": "chat_template: the template needs too much time or memory"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()  # its end, and its pipes': at once


def main() -> None:
    """Render what stdin asks for."""
    work = msgspec.json.decode(sys.stdin.buffer.read())
    _limit_this_process()
    try:
        text = render(work["template"], work["messages"], **work["options"])
        answer = {"text": text[: MAX_OUTPUT_CHARS + 1]}
    except EngineError as err:
        answer = {"error": str(err)[:1000]}
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def _limit_this_process() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = int(RENDER_TIMEOUT_S)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


if __name__ == "__main__":
    main()
