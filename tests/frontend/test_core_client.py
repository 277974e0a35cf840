"""The three clients on a scripted engine: same messages, typed calls, loud deaths, no leaks."""

import asyncio
import contextlib
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from frontend import core_link
from frontend.core_client import AsyncCoreClient, ProcessCoreClient
from frontend.inproc_client import InprocCoreClient
from frontend.launcher import Launch
from ipc.channel import RouterChannel
from ipc.curve import load_client_keys, load_server_keys, make_key_directory
from ipc.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineStartError,
    ProtocolError,
    RequestError,
)
from ipc.messages import AddRequest, EngineOutputs, SchedulerStats, frontend_to_core_decoder
from ipc.operations import CheckWorkers, GetStats, IsPaused, Sleep
from ipc.sampling_params import SamplingParams
from tests.engine_core.process_tree import (
    assert_gone,
    descendants,
    find_core,
    make_faulty_config,
    make_scripted_config,
    watched_runtime_directory,
)
from tests.engine_core.scripted_executor import scripted_token
from tests.engine_core.server_rig import running_server

LIMIT_S = 10.0
LOOPS = [
    pytest.param(asyncio.new_event_loop, id="asyncio"),
    pytest.param(uvloop.new_event_loop, id="uvloop"),
]
SyncClient = InprocCoreClient | ProcessCoreClient
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(autouse=True)
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with watched_runtime_directory(monkeypatch) as directory:
        yield directory


def make_request(req_id: str, num_tokens: int = 4, seed: int = 5) -> AddRequest:
    params = SamplingParams(max_tokens=num_tokens, seed=seed, ignore_eos=True)
    return AddRequest(req_id, [1, 2, 3], params, time.time())


def expected_tokens(num_tokens: int = 4, seed: int = 5) -> list[int]:
    return [scripted_token(seed, 3 + i) for i in range(num_tokens)]


class Streams:
    """Collects the tokens of requests from messages, whichever client they come from."""

    def __init__(self, *req_ids: str) -> None:
        self.tokens: dict[str, list[int]] = {req_id: [] for req_id in req_ids}
        self.unfinished = set(req_ids)
        self.errors: list[EngineDeadError] = []

    def take(self, message: Any, frames: Sequence[Any] = ()) -> None:
        """Take in a message."""
        assert isinstance(message, EngineOutputs)
        for output in message.outputs:
            assert output.first_index == len(self.tokens[output.req_id])
            self.tokens[output.req_id] += output.new_token_ids
            if output.finish_reason is not None:
                self.unfinished.remove(output.req_id)

    def read_all(self, client: SyncClient) -> dict[str, list[int]]:
        """Receive until every request has finished."""
        while self.unfinished:
            received = client.receive(LIMIT_S)
            assert received is not None
            self.take(*received)
        return self.tokens


@contextmanager
def making(kind: str) -> Iterator[SyncClient]:
    config = make_scripted_config()
    client: SyncClient
    client = InprocCoreClient(config) if kind == "inproc" else ProcessCoreClient(Launch(config))
    with contextlib.closing(client):
        yield client


def run(make_loop: MakeLoop, main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main)


async def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.005)


# ---------------------------------------------------------------- synchronous clients


@pytest.mark.parametrize("kind", ["inproc", "process"])
def test_synchronous_clients_deliver_the_same_tokens(kind: str) -> None:
    with making(kind) as client:
        assert client.welcome.model_digest == "scripted"
        assert client.welcome.limits.max_model_len == 2048
        client.send(make_request("a"))
        client.send(make_request("b", num_tokens=300, seed=6))

        tokens = Streams("a", "b").read_all(client)
        assert tokens == {"a": expected_tokens(), "b": expected_tokens(300, 6)}
        assert client.receive(0) is None


@pytest.mark.parametrize("kind", ["inproc", "process"])
def test_calls_return_what_the_operation_documents(kind: str) -> None:
    with making(kind) as client:
        client.send(make_request("a"))
        assert isinstance(client.call(GetStats()), SchedulerStats)
        (worker,) = client.call(CheckWorkers())
        assert worker.device == "scripted"
        assert client.call(IsPaused()) is False

        assert Streams("a").read_all(client) == {"a": expected_tokens()}


@pytest.mark.parametrize("kind", ["inproc", "process"])
def test_a_closed_client_refuses_everything(kind: str) -> None:
    with making(kind) as client:
        client.close()
        for use in (
            lambda: client.send(make_request("a")),
            lambda: client.receive(0),
            lambda: client.call(GetStats()),
        ):
            with pytest.raises(EngineDeadError, match="the engine was closed"):
                use()
        client.close()  # harmless


@pytest.mark.parametrize("kind", ["inproc", "process"])
def test_clients_cannot_be_pickled(kind: str) -> None:
    with making(kind) as client, pytest.raises(RuntimeError, match="cannot be pickled"):
        pickle.dumps(client)


def test_a_failed_step_ends_the_engine_in_this_process() -> None:
    with contextlib.closing(InprocCoreClient(make_faulty_config("CrashingStepExecutor"))) as client:
        client.send(make_request("a"))
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="RuntimeError: step exploded"):
                client.receive(None)


@pytest.mark.parametrize(
    ("name", "cause", "exit_code"),
    [
        ("CrashingStepExecutor", "the engine core failed: RuntimeError: step exploded", 4),
        ("DeadWorkerExecutor", "worker 0 was killed by SIGKILL", 5),
    ],
)
def test_a_failed_step_is_told_with_its_cause(name: str, cause: str, exit_code: int) -> None:
    launch = Launch(make_faulty_config(name, enable_recovery=False))
    with contextlib.closing(ProcessCoreClient(launch)) as client:
        client.send(make_request("a"))
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=cause):
                client.receive(LIMIT_S)
        assert launch._process.wait(LIMIT_S) == exit_code


def test_a_killed_core_wakes_who_waits_for_it() -> None:
    launch = Launch(make_scripted_config(enable_recovery=False))
    with contextlib.closing(ProcessCoreClient(launch)) as client:
        core = find_core(launch.pid)
        killed_at: list[float] = []

        def kill() -> None:
            killed_at.append(time.monotonic())
            core.kill()

        timer = threading.Timer(0.2, kill)
        timer.start()
        with pytest.raises(EngineDeadError, match="the engine core was killed by SIGKILL"):
            client.receive(None)
        assert time.monotonic() - killed_at[0] < 1.0
        timer.join()


def test_a_killed_core_loses_no_message_that_it_had_sent() -> None:
    launch = Launch(make_scripted_config(enable_recovery=False))
    with contextlib.closing(ProcessCoreClient(launch)) as client:
        client.send(make_request("a"))
        while client.call(GetStats()).generation_tokens < 4:
            pass
        find_core(launch.pid).kill()
        launch._process.wait(LIMIT_S)

        assert Streams("a").read_all(client) == {"a": expected_tokens()}
        with pytest.raises(EngineDeadError):
            client.receive(LIMIT_S)


def test_deleting_a_client_ends_its_engine() -> None:
    client = ProcessCoreClient(Launch(make_scripted_config()))
    launch = client._engine.launch
    assert launch is not None
    processes = descendants(launch.pid)
    del client, launch
    gc.collect()

    assert_gone(processes)


# ---------------------------------------------------------------- attaching


def test_two_frontends_attach_and_leave_without_disturbing_each_other() -> None:
    launch = Launch(make_scripted_config())
    with contextlib.closing(ProcessCoreClient(launch)) as owner:
        assert launch.address is not None
        guest = ProcessCoreClient(launch.address)
        guest.send(make_request("a"))
        owner.send(make_request("a", seed=9))
        assert Streams("a").read_all(guest) == {"a": expected_tokens()}
        guest.close()

        assert Streams("a").read_all(owner) == {"a": expected_tokens(seed=9)}


def test_an_address_where_nobody_listens_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"no engine answered at ipc:///.*nobody"):
        ProcessCoreClient(f"ipc://{tmp_path}/nobody", timeout_s=0.1)


def test_a_refused_frontend_learns_both_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_link, "schema_hash", lambda: "other")
    with running_server() as rig, pytest.raises(ProtocolError, match="schema other there"):
        ProcessCoreClient(rig.address)


def test_an_attached_frontend_learns_that_the_core_was_killed() -> None:
    launch = Launch(make_scripted_config(enable_recovery=False))
    with contextlib.closing(ProcessCoreClient(launch)):
        assert launch.address is not None
        with contextlib.closing(ProcessCoreClient(launch.address)) as guest:
            find_core(launch.pid).kill()
            with pytest.raises(EngineDeadError, match="ended"):
                guest.receive(LIMIT_S)


def test_a_core_that_cannot_be_watched_is_dead_when_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_link, "SILENCE_LIMIT_S", 0.3)
    monkeypatch.setattr(core_link, "PING_EVERY_S", 0.05)
    monkeypatch.setattr("frontend.core_client._TICK_S", 0.05)
    with running_server(address="tcp://127.0.0.1:0") as rig:
        client = ProcessCoreClient(rig.address)
        assert client.receive(0.6) is None  # pings are answered
        client.call(GetStats())
    with pytest.raises(EngineDeadError):  # "was stopped", or silent
        client.receive(LIMIT_S)
    client.close()

    deaf: RouterChannel[Any] = RouterChannel(frontend_to_core_decoder)
    with running_server(channel=deaf, address="tcp://127.0.0.1:0") as rig:
        client = ProcessCoreClient(rig.address)
        monkeypatch.setattr(deaf, "receive", lambda: None)
        with pytest.raises(EngineDeadError, match=r"is silent for 0\.\d s"):
            client.receive(LIMIT_S)
        client.close()


def test_keys_open_a_tcp_address_and_their_absence_does_not(tmp_path: Path) -> None:
    make_key_directory(tmp_path / "keys")
    channel: RouterChannel[Any] = RouterChannel(
        frontend_to_core_decoder, curve_keys=load_server_keys(tmp_path / "keys")
    )
    with running_server(channel=channel, address="tcp://127.0.0.1:0") as rig:
        with contextlib.closing(
            ProcessCoreClient(rig.address, load_client_keys(tmp_path / "keys"))
        ) as client:
            assert client.welcome.model_digest == "digest"
        with pytest.raises(EngineStartError, match="does it know our key"):
            ProcessCoreClient(rig.address, timeout_s=0.3)


def test_messages_that_the_core_does_not_take_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_link, "MAX_UNSENT", 100)
    launch = Launch(make_scripted_config())
    with contextlib.closing(ProcessCoreClient(launch)) as client:
        core = find_core(launch.pid)
        core.suspend()

        def flood() -> None:
            for number in range(100_000):
                client.send(make_request(str(number)))

        with pytest.raises(EngineOverloadedError, match="has not taken 100 messages"):
            flood()
        core.resume()


def test_errors_of_calls_keep_their_class() -> None:
    with (
        running_server() as rig,
        contextlib.closing(ProcessCoreClient(rig.address)) as client,
        pytest.raises(RequestError, match="this core cannot sleep"),
    ):
        client.call(Sleep())


# ---------------------------------------------------------------- in an event loop


@pytest.mark.parametrize("make_loop", LOOPS)
def test_an_asynchronous_client_delivers_tokens_and_answers(make_loop: MakeLoop) -> None:
    async def main() -> None:
        client = await AsyncCoreClient.launch(make_scripted_config())
        streams = Streams("a", "b")
        client.start(streams.take, streams.errors.append)
        client.send(make_request("a"))
        client.send(make_request("b", num_tokens=500, seed=6))
        stats, workers = await asyncio.gather(client.call(GetStats()), client.call(CheckWorkers()))
        assert isinstance(stats, SchedulerStats)
        assert workers[0].device == "scripted"
        await wait_for(lambda: not streams.unfinished)

        assert streams.tokens == {"a": expected_tokens(), "b": expected_tokens(500, 6)}
        assert client.welcome.limits.max_num_seqs == 256
        await client.aclose()
        assert streams.errors == []

    run(make_loop, main())


def test_a_launch_made_before_the_loop_is_taken_over_by_it() -> None:
    client = AsyncCoreClient(Launch(make_scripted_config()))

    async def main() -> None:
        await client.connect()
        streams = Streams("a")
        client.start(streams.take, streams.errors.append)
        client.send(make_request("a"))
        await wait_for(lambda: not streams.unfinished)
        await client.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("make_loop", LOOPS)
def test_death_reaches_an_event_loop_at_once_and_once(make_loop: MakeLoop) -> None:
    async def main() -> None:
        launch = Launch(make_scripted_config(enable_recovery=False))
        client = await AsyncCoreClient.attach(launch)
        errors: list[EngineDeadError] = []
        client.start(lambda *_: None, errors.append)
        find_core(launch.pid).suspend()
        waiting = asyncio.create_task(client.call(GetStats()))
        await asyncio.sleep(0)
        killed_at = time.monotonic()
        find_core(launch.pid).kill()
        with pytest.raises(EngineDeadError, match="the engine core was killed by SIGKILL"):
            await waiting
        assert time.monotonic() - killed_at < 1.0

        assert [str(error) for error in errors] == ["the engine core was killed by SIGKILL"]
        with pytest.raises(EngineDeadError):
            client.send(make_request("a"))
        with pytest.raises(EngineDeadError):
            await client.call(GetStats())
        await client.aclose()
        assert len(errors) == 1

    run(make_loop, main())


def test_a_start_that_fails_in_an_event_loop_names_the_cause() -> None:
    async def main() -> None:
        with pytest.raises(EngineStartError, match="rank 0, loading weights"):
            await AsyncCoreClient.launch(make_faulty_config("StartErrorExecutor"))

    asyncio.run(main())


def test_a_cancelled_start_leaves_nothing() -> None:
    async def main() -> None:
        before = set(psutil.Process().children(recursive=True))
        starting = asyncio.create_task(AsyncCoreClient.launch(make_scripted_config()))
        await wait_for(lambda: set(psutil.Process().children(recursive=True)) - before)
        started = set(psutil.Process().children(recursive=True)) - before
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        assert_gone(list(started))

    asyncio.run(main())


def test_several_engines_live_in_one_loop() -> None:
    async def main() -> None:
        config = make_scripted_config()
        clients = await asyncio.gather(*(AsyncCoreClient.launch(config) for _ in range(3)))
        streams = [Streams("a") for _ in clients]
        for seed, (client, stream) in enumerate(zip(clients, streams, strict=True)):
            client.start(stream.take, stream.errors.append)
            client.send(make_request("a", seed=seed))
        await wait_for(lambda: not any(stream.unfinished for stream in streams))
        tokens = [stream.tokens["a"] for stream in streams]
        assert tokens == [expected_tokens(seed=seed) for seed in range(3)]
        await asyncio.gather(*(client.aclose() for client in clients))

    asyncio.run(main())


def test_a_cancelled_call_harms_no_other() -> None:
    async def main() -> None:
        client = await AsyncCoreClient.launch(make_scripted_config())
        client.start(lambda *_: None, lambda _: None)
        cancelled = asyncio.create_task(client.call(GetStats()))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert await client.call(IsPaused()) is False
        assert len(client._calls) == 0
        await client.aclose()

    asyncio.run(main())


def test_no_answer_and_refusal_are_told_in_an_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(address: str) -> None:
        with pytest.raises(EngineStartError, match="no engine answered"):
            await AsyncCoreClient.attach(f"ipc://{tmp_path}/nobody", timeout_s=0.1)
        monkeypatch.setattr(core_link, "schema_hash", lambda: "other")
        with pytest.raises(ProtocolError, match="schema other there"):
            await AsyncCoreClient.attach(address)

    with running_server() as rig:
        asyncio.run(main(rig.address))


def test_a_collected_client_ends_its_engine_while_the_loop_runs() -> None:
    async def main() -> None:
        client = await AsyncCoreClient.launch(make_scripted_config())
        client.start(lambda *_: None, lambda _: None)
        launch = client._engine.launch
        assert launch is not None
        processes = descendants(launch.pid)
        del client, launch
        await asyncio.sleep(0)
        gc.collect()
        assert_gone(processes)

    asyncio.run(main())


def test_an_asynchronous_client_cannot_be_pickled_and_leaves_signals_alone() -> None:
    async def main() -> None:
        former = {number: signal.getsignal(number) for number in signal.valid_signals()}
        num_threads = threading.active_count()
        client = await AsyncCoreClient.launch(make_scripted_config())
        assert threading.active_count() == num_threads
        assert {n: signal.getsignal(n) for n in signal.valid_signals()} == former
        with pytest.raises(RuntimeError, match="cannot be pickled"):
            pickle.dumps(client)
        await client.aclose()

    asyncio.run(main())


def test_no_descriptor_is_left_open() -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        await (await AsyncCoreClient.launch(make_scripted_config())).aclose()

    ProcessCoreClient(Launch(make_scripted_config())).close()
    before = count()
    ProcessCoreClient(Launch(make_scripted_config())).close()
    asyncio.run(main())
    with pytest.raises(EngineError):
        ProcessCoreClient(Launch(make_faulty_config("StartErrorExecutor")))

    assert count() == before
