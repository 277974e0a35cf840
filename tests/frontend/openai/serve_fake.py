"""A real server process on the scripted engine: ``python -m tests.frontend.openai.serve_fake``.

Arguments: the answer; after how many outputs streams hang, or "never", or "slow" for 50 ms an
output; then the server's flags.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

from frontend.console import report, set_up_logging
from frontend.openai.server import check_certificates, run
from frontend.openai.server_args import listen_options, make_parser, server_options
from frontend.outputs import RequestOutput
from ipc.errors import EngineError
from tests.frontend.openai.fake_engine import FakeEngine


class AbortableEngine(FakeEngine):
    """Ends its streams as the real engine does when they are aborted."""

    pace_s = 0.0

    async def generate(
        self, inputs: dict[str, Any], params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        last = None
        stream = super().generate(inputs, params, request_id, **options)
        while request_id not in self.aborted:
            try:
                last = await asyncio.wait_for(anext(stream), 0.05)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if last is not None and self.hang_after is not None:
                    stream = self._wait_for_abort()
                continue
            await asyncio.sleep(self.pace_s)
            yield last
        if last is not None:
            for sequence in last.outputs:
                sequence.text, sequence.token_ids = "", []
                sequence.finish_reason = "abort"
            yield last

    async def _wait_for_abort(self) -> AsyncGenerator[RequestOutput, None]:
        await asyncio.Event().wait()
        yield None  # type: ignore[misc]


def main() -> int:
    """Serve until a signal."""
    answer, hang_after, *flags = sys.argv[1:]
    args = make_parser("serve_fake").parse_args(flags)
    set_up_logging(args.uvicorn_log_level)
    hang = int(hang_after) if hang_after.isdigit() else None
    try:
        options, listen = server_options(args, {}), listen_options(args)
        check_certificates(listen)
        engine = AbortableEngine(answer=answer, hang_after=hang)
        engine.pace_s = 0.05 if hang_after == "slow" else 0.0
        code = run(lambda _: engine, options, listen)
    except EngineError as err:
        return report(err)
    assert engine.has_been_shut_down
    return code


if __name__ == "__main__":
    sys.exit(main())
