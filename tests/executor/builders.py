"""Small pieces of the runtime with defaults, for tests."""

from collections.abc import Callable

import numpy as np
import torch

from executor.cuda_graphs import GraphSizes, Recording
from executor.kv_cache import KVCache
from executor.model_runner import ModelRunner, PendingStep
from executor.request_states import RequestStates
from ipc.messages import ModelRunnerOutput, NewRow, RowParams, SchedulerOutput
from ipc.tensors import Frames
from tests.executor.configs import VOCAB_SIZE
from tests.executor.fake_model import FakeModel

CPU = torch.device("cpu")
GREEDY = RowParams(seed=0, temperature=0.0)


def make_states(
    *,
    max_num_seqs: int = 8,
    max_model_len: int = 64,
    block_size: int = 8,
    vocab_size: int = VOCAB_SIZE,
) -> RequestStates:
    return RequestStates(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=block_size,
        vocab_size=vocab_size,
        device=CPU,
    )


def make_new_row(
    row: int,
    token_ids: list[int],
    *,
    num_prompt_tokens: int | None = None,
    num_computed_tokens: int = 0,
    block_ids: list[int] | None = None,
    params: RowParams = GREEDY,
    num_prompt_logprobs_sent: int = 0,
) -> NewRow:
    """A row whose blocks, unless given, are eight of its own from 1 + 8 * row on."""
    return NewRow(
        row=row,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        num_computed_tokens=num_computed_tokens,
        block_ids=list(range(1 + 8 * row, 9 + 8 * row)) if block_ids is None else block_ids,
        params=params,
        num_prompt_logprobs_sent=num_prompt_logprobs_sent,
    )


def make_plan(
    rows: list[int], num_new_tokens: list[int] | None = None, **fields: object
) -> SchedulerOutput:
    return SchedulerOutput(step_id=0, rows=rows, num_new_tokens=num_new_tokens or [], **fields)  # type: ignore[arg-type]


class PlainRecorder:
    """Stands in for CUDA graphs: a replay runs the function again.

    As with graphs, whatever runs may overwrite what another recording left.
    """

    def __init__(self) -> None:
        self.num_rehearsed = 0
        self.num_recorded = 0
        self._outs: list[torch.Tensor] = []

    def rehearse(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.num_rehearsed += 1
        self._overwrite()
        return run()

    def record(self, run: Callable[[], torch.Tensor]) -> Recording:
        self.num_recorded += 1
        out = torch.empty(0)
        self._outs.append(out)

        def replay() -> None:
            self._overwrite()
            result = run()
            out.resize_(result.shape).copy_(result)

        return Recording(out, replay)

    def _overwrite(self) -> None:
        for out in self._outs:
            out.fill_(torch.nan)


class Rig:
    """A runner with the fake model, its rows and its cache; with ``graphs`` it replays steps."""

    def __init__(
        self,
        model: FakeModel | None = None,
        *,
        num_blocks: int = 128,
        num_swap_blocks: int = 64,
        graphs: GraphSizes | None = None,
        **states: int,
    ) -> None:
        self.model = model or FakeModel()
        self.states = make_states(vocab_size=self.model.vocab_size, **states)
        self.kv_cache = KVCache(
            self.model.kv_cache_specs(),
            num_blocks=num_blocks,
            num_swap_blocks=num_swap_blocks,
            block_size=self.states.block_size,
            dtype=torch.float32,
            device=CPU,
        )
        self.runner = ModelRunner(self.model, self.kv_cache, self.states)
        self.recorder = PlainRecorder()
        if graphs is not None:
            self.runner.use_graphs(self.recorder, graphs)

    def step(self, plan: SchedulerOutput, frames: Frames = ()) -> ModelRunnerOutput:
        """Run one step to its end."""
        return self.runner.execute(plan, frames).resolve()[0]

    def prefill(self, *prompts: list[int], params: RowParams = GREEDY) -> ModelRunnerOutput:
        """Enter prompts as rows 0, 1, ... and compute them whole."""
        new_rows = [make_new_row(i, prompt, params=params) for i, prompt in enumerate(prompts)]
        lengths = [len(prompt) for prompt in prompts]
        return self.step(make_plan(list(range(len(prompts))), lengths, new_rows=new_rows))


def run_steps(
    execute: Callable[[SchedulerOutput], PendingStep],
    params: list[RowParams],
    steps_in_flight: int,
    num_decodes: int = 4,
) -> list[object]:
    """A prompt each, decode steps, a late row with its prompt among them, more decode steps.

    Returns what each step answered.
    """
    rows = list(range(len(params)))
    new_rows = [make_new_row(row, [3 + row] * (4 + row % 7), params=params[row]) for row in rows]
    late = len(rows)
    plans = [make_plan(rows, [len(new.token_ids) for new in new_rows], new_rows=new_rows)]
    plans += [make_plan(rows)] * num_decodes
    new_rows = [make_new_row(late, [9] * 12)]
    plans.append(make_plan([*rows, late], [1] * late + [9], new_rows=new_rows))
    plans.append(make_plan([*rows, late], [1] * late + [3]))
    plans += [make_plan([late, *rows])] * num_decodes
    plans.append(make_plan([], freed_rows=[*rows, late]))
    pending: list[PendingStep] = []
    answers = []
    for plan in plans:
        pending.append(execute(plan))
        if len(pending) == steps_in_flight:
            answers.append(pending.pop(0).resolve()[0])
    answers += [step.resolve()[0] for step in pending]
    return [(answer.sampled_token_ids, answer.nan_rows, answer.logprobs) for answer in answers]


def peaked(*token_ids: int, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Logits whose likeliest token is the given one, one row each; all rows differ."""
    logits = torch.from_numpy(
        np.random.default_rng(0).normal(size=(len(token_ids), vocab_size)).astype(np.float32)
    )
    for row, token_id in enumerate(token_ids):
        logits[row, token_id] = 10.0
    return logits
