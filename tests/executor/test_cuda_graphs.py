"""Recorded steps, with a recorder that runs them again instead of a GPU's. CPU only."""

import numpy as np
import pytest
import torch

from executor.cuda_graphs import DecodeGraph, GraphPlan, MixedGraph, graph_sizes
from executor.input_batch import build_input_batch, pack_rows
from executor.request_states import RequestStates
from executor.step_buffers import Staging, StagingPool, StepBuffers
from ipc.messages import ModelRunnerOutput, RowParams, SampleRow, SchedulerOutput
from ipc.tensors import FrameWriter, read
from kernels.prepare_inputs import prepare_inputs_reference, prepare_inputs_triton
from tests.executor.builders import (
    CPU,
    GREEDY,
    Rig,
    make_new_row,
    make_plan,
    make_states,
    run_steps,
)
from tests.executor.configs import VOCAB_SIZE
from tests.executor.fake_model import FakeModel, next_token

SIZES = graph_sizes(max_num_seqs=8, max_num_batched_tokens=100, max_seq_len=50, num_weights=10**10)
RANDOM = RowParams(seed=5, temperature=8.0, top_k=60, top_p=0.98)


def make_rig(**options: object) -> Rig:
    """A runner whose every size is recorded."""
    rig = Rig(graphs=SIZES, **options)  # type: ignore[arg-type]
    assert rig.runner.graphs is not None
    while rig.runner.graphs.record_next():
        pass
    return rig


def test_sizes_are_close_where_steps_are_short_and_reach_beyond_the_limits() -> None:
    sizes = graph_sizes(
        max_num_seqs=256, max_num_batched_tokens=8192, max_seq_len=10, num_weights=10**10
    )

    assert list(sizes.decode[:6]) == [1, 2, 4, 8, 16, 24]
    assert list(sizes.decode[-3:]) == [192, 224, 256]
    assert (sizes.max_requests, sizes.max_tokens) == (256, 512)
    for limit in (1, 3, 8, 9, 100, 511, 512, 5000):
        sizes = graph_sizes(
            max_num_seqs=limit, max_num_batched_tokens=limit, max_seq_len=10, num_weights=10**10
        )
        assert list(sizes.decode) == sorted(set(sizes.decode))
        assert list(sizes.mixed) == sorted(set(sizes.mixed))
        assert sizes.decode[-1] >= min(limit, 512)
        assert sizes.mixed[-1] >= min(limit, 512)
        assert len(sizes.decode) == 1 or sizes.decode[-2] < limit


@pytest.mark.parametrize(
    ("num_weights", "largest"),
    [
        pytest.param(6 * 10**8, 2048, id="small: all sizes"),
        pytest.param(3 * 10**9, 896, id="in between"),
        pytest.param(8 * 10**9, 512, id="large: the products take longer than their launches"),
    ],
)
def test_mixed_steps_are_recorded_up_to_more_tokens_for_small_models(
    num_weights: int, largest: int
) -> None:
    sizes = graph_sizes(
        max_num_seqs=8, max_num_batched_tokens=8192, max_seq_len=10, num_weights=num_weights
    )

    assert sizes.mixed[-1] == largest


def test_a_plan_counts_every_graph_and_their_temporaries() -> None:
    small = graph_sizes(
        max_num_seqs=1, max_num_batched_tokens=16, max_seq_len=10, num_weights=10**10
    )

    few, many = GraphPlan(small, 0), GraphPlan(SIZES, 1000)

    num_more = 2 * len(SIZES.decode) + len(SIZES.mixed) - 3
    assert many.num_bytes == few.num_bytes + num_more * 2 * 2**20 + 1000


def test_a_step_takes_the_smallest_size_that_holds_it() -> None:
    rig = make_rig()
    graphs, states = rig.runner.graphs, rig.states
    assert graphs is not None
    states.apply(make_plan([], new_rows=[make_new_row(row, [1] * 40) for row in range(8)]))
    states.num_computed_tokens[:6] = 39

    def choose(rows: list[int], num_new_tokens: list[int] | None = None) -> object:
        return graphs.choose(pack_rows(make_plan(rows, num_new_tokens), states))

    for rows, size in (([0], 1), ([0, 1, 2], 4), ([0, 1, 2, 3, 4], 8)):
        graph = choose(rows)
        assert isinstance(graph, DecodeGraph)
        assert graph.size == size
    for rows, counts, size in (
        ([0, 6], [1, 15], 16),
        ([0, 6], [1, 30], 32),
        ([6, 7], [40] * 2, 96),
    ):
        graph = choose(rows, counts)
        assert isinstance(graph, MixedGraph)
        assert graph.size == size
    assert isinstance(choose([6]), MixedGraph), "a token that is not the last one draws nothing"
    assert choose([6, 7, 0, 1], [40, 40, 20, 20]) is None, "more tokens than any size holds"
    states.num_tokens[0] = 51
    states.num_computed_tokens[0] = 50
    assert choose([0, 1]) is None, "a context beyond what is captured"


def test_sizes_are_recorded_when_needed_and_those_of_prompts_when_needed_again() -> None:
    rig = Rig(graphs=SIZES)
    graphs = rig.runner.graphs
    assert graphs is not None
    graphs.rehearse()
    graphs.record_first()
    num_sizes = 2 * len(SIZES.decode) + len(SIZES.mixed)
    assert (rig.recorder.num_rehearsed, rig.recorder.num_recorded) == (num_sizes, 5)

    rig.prefill([1, 2])
    assert rig.recorder.num_recorded == 5, "a prompt's size is left for later"
    rig.step(make_plan([], freed_rows=[0]))
    rig.prefill([1, 2])
    assert rig.recorder.num_recorded == 6, "unless it comes again"
    while graphs.record_next():
        pass
    assert (rig.recorder.num_rehearsed, rig.recorder.num_recorded) == (num_sizes, num_sizes)

    again = Rig(graphs=SIZES)
    again.prefill([1, 2], [3, 4], [5])
    assert again.recorder.num_recorded == 1, "the draws"
    again.step(make_plan([0, 1, 2]))
    again.step(make_plan([0, 1, 2]))
    assert again.recorder.num_recorded == 2


def test_a_size_is_rehearsed_when_it_is_recorded_unless_all_were_before() -> None:
    rig = Rig(graphs=SIZES)
    assert rig.runner.graphs is not None

    rig.runner.graphs.record_first()

    assert (rig.recorder.num_rehearsed, rig.recorder.num_recorded) == (6, 5)
    assert rig.prefill([1, 2]).sampled_token_ids == [next_token([1, 2])]


def test_rehearsals_leave_nothing_behind() -> None:
    rig = Rig(graphs=SIZES)
    graphs = rig.runner.graphs
    assert graphs is not None

    graphs.rehearse()

    assert not rig.states.num_tokens.any()
    assert not rig.states.tokens.tensor[: rig.states.padding_row].any()
    for layer in rig.kv_cache.layers:
        assert not layer.key[1:].any()
        assert not layer.value[1:].any()


@pytest.mark.parametrize("run", [prepare_inputs_reference, prepare_inputs_triton])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_fixed_buffers_hold_what_an_eager_step_would_get(run, num_rows: int) -> None:
    states = make_states()
    lengths = [5, 64, 8, 1, 33, 16, 17, 40][:num_rows]
    new_rows = [
        make_new_row(row, [50 + row] * length, num_computed_tokens=length - 1, params=RANDOM)
        for row, length in enumerate(lengths)
    ]
    states.apply(make_plan([], new_rows=new_rows))
    states.sampling.flush()
    packed = pack_rows(make_plan(list(range(num_rows))), states)
    batch = build_input_batch(packed, states)
    buffers, staging = make_buffers(states)
    views = buffers.decode_views(8)

    buffers.fill_decode(8, packed, staging.up_array)
    views.staged.copy_(staging.up[: views.staged.shape[0]])
    tables = states.tokens.tensor, states.blocks.tensor
    run(views.requests, *tables, views.inputs, 8, states.sampling.tables, views.draws)

    assert views.inputs.token_ids[:num_rows].equal(batch.token_ids)
    assert views.inputs.positions[:num_rows].equal(batch.positions)
    assert views.inputs.slot_mapping[:num_rows].equal(batch.meta.slot_mapping)
    assert not views.inputs.slot_mapping[num_rows:].any(), "padding writes to the null block"
    assert views.requests.seq_lens.tolist() == [*lengths, *[1] * (8 - num_rows)]
    assert views.requests.query_start_loc.tolist() == list(range(9))
    for b, length in enumerate(lengths):
        used = -(-length // 8)
        assert views.inputs.block_table[b, :used].equal(batch.meta.block_table[b, :used])
    params = states.sampling.gather(torch.arange(num_rows))
    assert views.draws.temperature[:num_rows].equal(params.temperature)
    assert views.draws.top_k[:num_rows].equal(params.top_k)
    assert views.draws.seeds[:num_rows].equal(params.seeds)
    assert views.draws.positions[:num_rows].tolist() == lengths
    assert not views.draws.temperature[num_rows:].any(), "padding is greedy"


@pytest.mark.parametrize("run", [prepare_inputs_reference, prepare_inputs_triton])
def test_fixed_buffers_of_a_mixed_step_hold_what_an_eager_step_would_get(run) -> None:
    states = make_states()
    new_rows = [make_new_row(row, [50 + row] * 30, num_computed_tokens=row) for row in range(5)]
    states.apply(make_plan([], new_rows=new_rows))
    packed = pack_rows(make_plan([4, 0, 2], [1, 30, 7]), states)
    batch = build_input_batch(packed, states)
    buffers, staging = make_buffers(states)
    staging.up_array[:] = -1
    views = buffers.mixed_views(8, 64)

    buffers.fill_mixed(8, packed, staging.up_array)
    views.staged.copy_(staging.up[: views.staged.shape[0]])
    tables = states.tokens.tensor, states.blocks.tensor
    run(views.requests, *tables, views.inputs, 8, None, None)

    assert views.inputs.token_ids.tolist() == [*batch.token_ids.tolist(), *[0] * 26]
    assert views.inputs.positions.tolist() == [*batch.positions.tolist(), *[0] * 26]
    assert views.inputs.slot_mapping.tolist() == [*batch.meta.slot_mapping.tolist(), *[0] * 26]
    assert views.requests.rows.tolist() == [4, 0, 2, *[states.padding_row] * 5]
    assert views.requests.seq_lens.tolist() == [5, 30, 9, 0, 0, 0, 0, 0]
    assert views.requests.query_start_loc.tolist() == [0, 1, 31, 38, 38, 38, 38, 38, 38]


def make_buffers(states: RequestStates) -> tuple[StepBuffers, Staging]:
    buffers = StepBuffers(states, max_requests=8, max_tokens=64, max_seq_len=64)
    return buffers, StagingPool(8, CPU).take()


def test_a_staging_is_used_again_only_after_its_step_was_answered() -> None:
    pool = StagingPool(2, CPU)
    first, second = pool.take(), pool.take()
    assert first is not second

    pool.give_back(first)

    assert pool.take() is first
    assert pool.take() is not second


MIXTURES = [
    pytest.param([GREEDY] * 3, id="greedy"),
    pytest.param([RANDOM, GREEDY, RowParams(seed=9, temperature=5.0)], id="random"),
    pytest.param(
        [
            GREEDY,
            RowParams(seed=1, temperature=0.0, repetition_penalty=2.0, num_logprobs=2),
            RANDOM,
            RowParams(seed=3, temperature=6.0, logit_bias=[(7, 4.0)], num_logprobs=0),
            RowParams(seed=4, temperature=0.0, min_tokens=3, stop_token_ids=[5, 6]),
        ],
        id="edits and log-probabilities",
    ),
]


@pytest.mark.parametrize("params", MIXTURES)
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_recorded_steps_answer_as_eager_ones(params: list[RowParams], steps_in_flight: int) -> None:
    rigs = Rig(), make_rig()

    eager, recorded = (run_steps(rig.runner.execute, params, steps_in_flight) for rig in rigs)

    assert recorded == eager
    tables = [rig.states.tokens.tensor[: len(params)] for rig in rigs]
    assert tables[0].equal(tables[1])


def test_the_largest_size_may_be_beyond_the_engines_limits() -> None:
    sizes = graph_sizes(
        max_num_seqs=5, max_num_batched_tokens=20, max_seq_len=50, num_weights=10**10
    )
    params = [GREEDY, RANDOM, GREEDY, RANDOM]

    eager, recorded = (
        run_steps(Rig(graphs=graphs, max_num_seqs=5).runner.execute, params, 2)
        for graphs in (None, sizes)
    )

    assert recorded == eager


def test_rows_with_processors_leave_a_recorded_step_too() -> None:
    processed = RowParams(seed=0, temperature=0.0, has_logits_processors=True)
    rig = make_rig()
    params = [processed, GREEDY, processed, GREEDY]
    new_rows = [make_new_row(row, [row, 2], params=params[row]) for row in range(4)]
    states = rig.states
    states.apply(make_plan([], new_rows=new_rows))
    rig.step(make_plan([0, 1, 2, 3], [1, 1, 1, 1]))

    output, frames = rig.runner.execute(make_plan([0, 1, 2, 3])).resolve()

    assert output.sampled_token_ids == [next_token([1, 2]), next_token([3, 2])]
    assert [row for row, _ in output.logits_rows] == [0, 2]
    logits = [np.frombuffer(read(ref, frames), np.float32) for _, ref in output.logits_rows]
    assert [int(row.argmax()) for row in logits] == [next_token([0, 2]), next_token([2, 2])]
    assert states.num_tokens[:4].tolist() == [2, 3, 2, 3]
    only_processed = return_logits(rig, logits[0], row=0)
    assert only_processed.sampled_token_ids == [next_token([0, 2])]
    again = rig.step(make_plan([0]))
    assert again.sampled_token_ids == []
    assert [row for row, _ in again.logits_rows] == [0]


def return_logits(rig: Rig, logits: np.ndarray, row: int) -> ModelRunnerOutput:
    writer = FrameWriter()
    ref = writer.add(logits.tobytes(), "float32", [VOCAB_SIZE])
    plan = SchedulerOutput(step_id=0, rows=[], num_new_tokens=[], sample_rows=[SampleRow(row, ref)])
    return rig.step(plan, writer.frames)


def test_a_row_with_nan_is_named_by_a_recorded_step() -> None:
    rig = make_rig(model=FakeModel(nan_token=next_token([4, 5])))

    rig.prefill([1, 2], [4, 5], [6, 7])
    output = rig.step(make_plan([0, 1, 2]))

    assert output.nan_rows == [1]


def test_closed_graphs_leave_the_runner_to_run_eagerly() -> None:
    rig = make_rig()
    rig.prefill([1, 2])

    rig.runner.close()

    assert rig.runner.graphs is None
    assert rig.step(make_plan([0])).sampled_token_ids == [next_token([1, 2, next_token([1, 2])])]
