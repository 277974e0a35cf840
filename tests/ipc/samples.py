"""One sample of every message, with every field set to a value of its own."""

from typing import Any

from ipc import messages as m
from ipc.operations import (
    CheckWorkers,
    GetStats,
    IsPaused,
    IsSleeping,
    PauseGeneration,
    ReclaimRequest,
    ResetPrefixCache,
    ResumeGeneration,
    Sleep,
    StartProfile,
    StopProfile,
    WakeUp,
)
from ipc.records import Message, TensorRef
from ipc.sampling_params import SamplingParams


def make_limits() -> m.Limits:
    return m.Limits(1, 2, 3, 4, 5, 6, 7, 8)


def make_token_logprobs() -> m.TokenLogprobs:
    return m.TokenLogprobs([1, 2], [-0.5, -1.0], 3)


def make_row_params() -> m.RowParams:
    return m.RowParams(
        1, 0.5, 0.25, 2, 0.125, 1.5, -1.5, 1.25, 3, [4], 5, 6, [(7, 0.5)], [8], [[9]], True
    )


def make_engine_output() -> m.EngineOutput:
    logprobs = [make_token_logprobs()]
    reason = m.FinishReason.STOP
    return m.EngineOutput("r", 1, 2, [3], reason, 4, logprobs, logprobs, 5, 6.0, "e", "k")


def make_scheduler_output() -> m.SchedulerOutput:
    new_row = m.NewRow(1, [2], 3, 4, [5], make_row_params(), 6)
    sample_row = m.SampleRow(1, TensorRef(0, "float32", [2]))
    return m.SchedulerOutput(
        1, [2], [3], [new_row], [(4, [5])], [6], [(7, 8)], [(9, 10)], [(11, 12)], [sample_row],
        [(13, 14)],
    )  # fmt: skip


def make_operations() -> list[Message]:
    return [
        ResetPrefixCache(),
        GetStats(),
        Sleep(2),
        WakeUp(),
        IsSleeping(),
        StartProfile("d"),
        StopProfile(),
        PauseGeneration("keep"),
        ResumeGeneration(),
        IsPaused(),
        CheckWorkers(),
        ReclaimRequest("s", [1, 2]),
    ]


def make_messages() -> dict[str, list[Message]]:
    """Every message of every wire, by the name of its union."""
    tensor = TensorRef(0, "float32", [2, 3])
    params = SamplingParams(n=2, temperature=0.5, seed=7, stop=["x"], stop_token_ids=[9])
    lora = m.LoRASpec("l", 1, "p", 2)
    resumed = m.ResumedBranch(1, [2], True)
    result = m.CallResult(1, b"\xc3", "e", "k")
    return {
        "FrontendToCore": [
            m.Hello(1, "h", "n", 2),
            m.AddRequest(
                "r", [1, 2], params, 3.5, [4], 5, lora, "s", [[6]], True, [resumed],
                3, m.Linger("t", 7.5, b"p"),
            ),
            m.AbortRequests(["r"]),
            m.AbortBranches([("r", 1)]),
            m.ProcessedLogits("r", 1, 2, tensor, "e"),
            m.Ack(3),
            m.Heartbeat(1.5),
            m.Goodbye(),
            *[m.Call(5, operation) for operation in make_operations()],
        ],
        "CoreToFrontend": [
            m.Welcome(1, "h", 2, "d", make_limits(), b"c", 3, 4),
            m.Refused("why"),
            m.EngineOutputs(
                1, 2, [make_engine_output()], [m.LogitsRow("r", 1, 2, tensor)],
                m.SchedulerStats(*range(1, 18)),
            ),
            result,
            m.Heartbeat(1.5),
            m.EngineFailed(1, "why", 4, 9),
        ],
        "CoreToWorker": [
            make_scheduler_output(),
            m.GrammarMask(1, [2], tensor),
            m.Call(5, Sleep(2)),
            m.Shutdown(),
        ],
        "WorkerToCore": [
            m.LoadProgress(1, "p", 2, 3, 4.5),
            m.WorkerReady(1, 2, "d", 3, 4, 5, 6, 7, {"p": 0.5}, 8, "h"),
            m.ModelRunnerOutput(
                1, [2], [m.RowLogprobs(3, make_token_logprobs(), [make_token_logprobs()])], [4],
                [(5, tensor)], 0.5,
            ),
            result,
            m.WorkerError(1, "s", "r", "t"),
        ],
    }  # fmt: skip


def decoders() -> dict[str, Any]:
    """The decoder of each union."""
    return {
        "FrontendToCore": m.frontend_to_core_decoder,
        "CoreToFrontend": m.core_to_frontend_decoder,
        "CoreToWorker": m.core_to_worker_decoder,
        "WorkerToCore": m.worker_to_core_decoder,
    }
