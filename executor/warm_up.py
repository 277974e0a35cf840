"""The first steps of a worker, run before anybody waits: compile, allocate, prove that it works.

They take the ordinary way, with plans; their rows use only the null block, so the cache stays as
good as untouched. On a GPU they go through every kind of eager step, since whatever Triton has not
compiled by then it would compile while somebody waits.
"""

from collections.abc import Callable, Iterator
from typing import Any

from triton import knobs

from executor.model_runner import ModelRunner
from ipc.messages import NewRow, RowParams, SchedulerOutput

_GREEDY = RowParams(seed=0, temperature=0.0)
_RANDOM = RowParams(seed=0, temperature=1.0, top_k=20, top_p=0.9)
# Every kind of sampling.
_WISHES = [
    _GREEDY,
    _RANDOM,
    RowParams(seed=0, temperature=1.0),
    RowParams(seed=0, temperature=1.0, min_p=0.1),
    RowParams(seed=0, temperature=0.0, repetition_penalty=1.1),
    RowParams(seed=0, temperature=0.0, logit_bias=[(0, 1.0)], bad_words_token_ids=[[0, 1]]),
    RowParams(seed=0, temperature=0.0, allowed_token_ids=[0, 1]),
    RowParams(seed=0, temperature=0.0, num_logprobs=2),
]

_LONG_PROMPT = 4400  # tokens: half of it is enough for any way of attending to long prompts


def warm_up(
    runner: ModelRunner,
    *,
    num_tokens: int,
    max_model_len: int,
    max_num_seqs: int,
    block_size: int,
    is_thorough: bool,
) -> None:
    """Run one step of ``num_tokens`` prompt tokens and one decode step, then free the rows.

    Args:
        num_tokens: spread over as many rows as it needs; capped by what rows can hold.
        is_thorough: go through the other kinds of steps as well.
    """
    per_row = max(1, max_model_len - 2)  # two decode steps follow
    num_tokens = min(num_tokens, per_row * max_num_seqs)
    lengths = [per_row] * (num_tokens // per_row)
    if num_tokens % per_row:
        lengths.append(num_tokens % per_row)
    params = [_GREEDY if row % 2 else _RANDOM for row in range(len(lengths))]
    plans = list(_prompts(lengths, params, block_size, max_model_len))
    if is_thorough:
        plans += _continued(min(per_row, 2 * num_tokens, _LONG_PROMPT), block_size)
    for plan in plans:
        runner.execute(plan).resolve()
    if is_thorough:
        for wishes in _WISHES:
            for num_rows in {1, max_num_seqs}:
                _draw(runner, wishes, num_rows, block_size)
    runner.num_steps = 0


def watch_compilations(tell: Callable[[str], None]) -> None:
    """From now on have ``tell`` called with the name of each kernel that Triton compiles.

    One that is found in its disk cache does not count.
    """
    former = knobs.compilation.listener

    def listener(**compiled: Any) -> None:
        if not compiled["cache_hit"]:
            tell(compiled["src"].name)
        if former is not None:
            former(**compiled)

    knobs.compilation.listener = listener


def _prompts(
    lengths: list[int], params: list[RowParams], block_size: int, max_model_len: int
) -> Iterator[SchedulerOutput]:
    """Prompts in one step, a token for each row, a token for one row, and the rows' end."""
    rows = list(range(len(lengths)))
    new_rows = [
        _row(row, length, 0, block_size, wishes)
        for row, length, wishes in zip(rows, lengths, params, strict=True)
    ]
    yield SchedulerOutput(step_id=0, rows=rows, num_new_tokens=lengths, new_rows=new_rows)
    if max_model_len > 2:
        yield SchedulerOutput(step_id=0, rows=rows, num_new_tokens=[])
        yield SchedulerOutput(step_id=0, rows=rows[-1:], num_new_tokens=[])
    yield SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], freed_rows=rows)


def _continued(length: int, block_size: int) -> Iterator[SchedulerOutput]:
    """The second half of a prompt, behind a first half that was computed before."""
    new_row = _row(0, length, length // 2, block_size, _GREEDY)
    num_new_tokens = [length - length // 2]
    yield SchedulerOutput(step_id=0, rows=[0], num_new_tokens=num_new_tokens, new_rows=[new_row])
    yield SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], freed_rows=[0])


def _draw(runner: ModelRunner, wishes: RowParams, num_rows: int, block_size: int) -> None:
    """Sampling alone, of one kind."""
    rows = list(range(num_rows))
    new_rows = [_row(row, 1, 0, block_size, wishes) for row in rows]
    for plan in (
        SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], new_rows=new_rows),
        SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], freed_rows=rows),
    ):
        runner.execute(plan).resolve()
        if plan.new_rows:
            runner.draw_blank(rows)


def _row(row: int, length: int, num_computed: int, block_size: int, params: RowParams) -> NewRow:
    return NewRow(
        row=row,
        token_ids=[0] * length,
        num_prompt_tokens=length,
        num_computed_tokens=num_computed,
        block_ids=[0] * -(-(length + 3) // block_size),
        params=params,
    )
