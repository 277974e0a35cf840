"""The first steps of a worker, run before anybody waits: compile, allocate, prove that it works.

They take the ordinary way, with plans; their rows use only the null block, so the cache stays as
good as untouched.
"""

from executor.model_runner import ModelRunner
from ipc.messages import NewRow, RowParams, SchedulerOutput

_GREEDY = RowParams(seed=0, temperature=0.0)
_RANDOM = RowParams(seed=0, temperature=1.0, top_k=20, top_p=0.9)


def warm_up(
    runner: ModelRunner,
    *,
    num_tokens: int,
    max_model_len: int,
    max_num_seqs: int,
    block_size: int,
) -> None:
    """Run one step of ``num_tokens`` prompt tokens and one decode step, then free the rows.

    Args:
        num_tokens: spread over as many rows as it needs; capped by what rows can hold.
    """
    per_row = max(1, max_model_len - 1)
    num_tokens = min(num_tokens, per_row * max_num_seqs)
    lengths = [per_row] * (num_tokens // per_row)
    if num_tokens % per_row:
        lengths.append(num_tokens % per_row)
    rows = list(range(len(lengths)))
    new_rows = [
        NewRow(
            row=row,
            token_ids=[0] * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=[0] * -(-(length + 1) // block_size),
            params=_GREEDY if row % 2 else _RANDOM,
        )
        for row, length in zip(rows, lengths, strict=True)
    ]
    plans = [SchedulerOutput(step_id=0, rows=rows, num_new_tokens=lengths, new_rows=new_rows)]
    if max_model_len > 1:
        plans.append(SchedulerOutput(step_id=0, rows=rows, num_new_tokens=[]))
        plans.append(SchedulerOutput(step_id=0, rows=rows[-1:], num_new_tokens=[]))
    plans.append(SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], freed_rows=rows))
    for plan in plans:
        runner.execute(plan).resolve()
    runner.num_steps = 0
