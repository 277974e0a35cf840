"""Whole steps with a model that can be computed by hand. CPU only."""

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from executor.cuda_graphs import GraphSizes, graph_sizes
from executor.model_runner import PendingStep
from ipc.messages import NewRow, RowParams, SampleRow, SchedulerOutput
from ipc.tensors import FrameWriter, read
from tests.executor.builders import GREEDY, Rig, make_new_row, make_plan
from tests.executor.configs import VOCAB_SIZE
from tests.executor.fake_model import FakeModel, next_token

PROCESSED = RowParams(seed=0, temperature=0.0, has_logits_processors=True)


def test_a_prompt_in_one_step_and_its_decode_steps() -> None:
    rig = Rig()
    tokens = [3, 1, 4, 1, 5]

    for _ in range(6):
        expected = next_token(tokens)
        plan = make_plan([0]) if len(tokens) > 5 else None
        output = rig.prefill(tokens) if plan is None else rig.step(plan)
        assert output.sampled_token_ids == [expected]
        tokens.append(expected)

    assert rig.states.tokens.tensor[0, : len(tokens)].tolist() == tokens


def test_a_chunked_prompt_samples_only_at_its_end() -> None:
    rig = Rig()
    tokens = list(range(1, 20))

    first = rig.step(make_plan([0], [8], new_rows=[make_new_row(0, tokens)]))
    second = rig.step(make_plan([0], [10]))
    last = rig.step(make_plan([0], [1]))

    assert first.sampled_token_ids == second.sampled_token_ids == []
    assert last.sampled_token_ids == [next_token(tokens)]


def test_an_empty_plan_is_answered() -> None:
    output = Rig().step(SchedulerOutput(step_id=9, rows=[], num_new_tokens=[]))

    assert (output.step_id, output.sampled_token_ids) == (9, [])


def test_a_step_may_be_launched_before_the_former_one_is_read() -> None:
    rig = Rig()
    tokens = [5, 6]
    rows = [make_new_row(0, tokens)]

    pending = [rig.runner.execute(make_plan([0], [2], new_rows=rows))]
    pending += [rig.runner.execute(make_plan([0])) for _ in range(4)]

    for step in pending:
        expected = next_token(tokens)
        assert step.resolve()[0].sampled_token_ids == [expected]
        tokens.append(expected)


def test_a_row_with_nan_is_named_and_its_mates_are_not() -> None:
    rig = Rig(FakeModel(nan_token=9))

    output = rig.prefill([1, 2], [3, 9], [4, 5])

    assert output.nan_rows == [1]
    assert output.sampled_token_ids[0] == next_token([1, 2])
    assert output.sampled_token_ids[2] == next_token([4, 5])


def test_blocks_of_a_row_with_nan_are_clean_for_the_next_owner() -> None:
    rig = Rig(FakeModel(nan_token=9))
    rig.prefill([3, 9])
    block = int(rig.states.blocks.tensor[0, 0])
    rig.kv_cache.layers[0].key[block, 1] = torch.nan
    rig.kv_cache.layers[1].value[block, 0] = torch.inf

    rig.step(make_plan([], freed_rows=[0]))

    for layer in rig.kv_cache.layers:
        assert layer.key[block].isfinite().all()
        assert layer.value[block].isfinite().all()
    assert rig.kv_cache.layers[0].key[block, 0, 0, 0] == 3, "finite values stay"


def test_rows_with_processors_leave_as_raw_logits_and_are_sampled_when_they_return() -> None:
    rig = Rig()
    new_rows = [
        make_new_row(0, [1, 2], params=PROCESSED),
        make_new_row(1, [3, 4]),
        make_new_row(2, [5, 6, 7], params=PROCESSED),
    ]

    output, frames = rig.runner.execute(
        make_plan([0, 1, 2], [2, 2, 3], new_rows=new_rows)
    ).resolve()

    assert output.sampled_token_ids == [next_token([3, 4])]
    assert [row for row, _ in output.logits_rows] == [0, 2]
    logits = [np.frombuffer(read(ref, frames), np.float32) for _, ref in output.logits_rows]
    assert [int(row.argmax()) for row in logits] == [next_token([1, 2]), next_token([5, 6, 7])]

    writer = FrameWriter()
    changed = logits[1].copy()
    changed[77] = 1000.0
    refs = [writer.add(row.tobytes(), "float32", [VOCAB_SIZE]) for row in (logits[0], changed)]
    sample_rows = [SampleRow(0, refs[0]), SampleRow(2, refs[1])]
    returned = rig.step(make_plan([1], sample_rows=sample_rows), writer.frames)

    in_between = next_token([3, 4, next_token([3, 4])])
    assert returned.sampled_token_ids == [in_between, next_token([1, 2]), 77]
    after = rig.step(make_plan([0, 2]))
    assert [row for row, _ in after.logits_rows] == [0, 2]
    assert rig.states.tokens.tensor[2, :4].tolist() == [5, 6, 7, 77]


def test_the_rest_of_the_order_still_applies_to_returned_logits() -> None:
    params = RowParams(
        seed=0, temperature=0.0, has_logits_processors=True, num_logprobs=1, logit_bias=[(77, -100)]
    )
    rig = Rig()
    output, frames = rig.runner.execute(
        make_plan([0], [2], new_rows=[make_new_row(0, [1, 2], params=params)])
    ).resolve()
    raw = torch.from_numpy(np.frombuffer(read(output.logits_rows[0][1], frames), np.float32).copy())
    writer = FrameWriter()
    changed = raw.clone()
    changed[77], changed[55] = 50.0, 40.0
    ref = writer.add(changed.numpy(), "float32", [VOCAB_SIZE])

    answer = rig.step(make_plan([], sample_rows=[SampleRow(0, ref)]), writer.frames)

    assert answer.sampled_token_ids == [55]
    chosen = answer.logprobs[0].chosen
    assert chosen is not None
    logprobs = raw.log_softmax(0)  # of what the model said, not of what the processors made of it
    assert chosen.logprobs[0] == pytest.approx(float(logprobs[55]), abs=1e-5)
    assert chosen.token_ids == [55, next_token([1, 2])]


def test_nan_in_logits_for_processors_is_named_instead_of_sent() -> None:
    rig = Rig(FakeModel(nan_token=9))

    output = rig.prefill([3, 9], params=PROCESSED)

    assert output.nan_rows == [0]
    assert output.logits_rows == []


def test_logprobs_come_for_the_rows_that_ask() -> None:
    rig = Rig()
    params = [GREEDY, RowParams(seed=0, temperature=0.0, num_logprobs=2), GREEDY]
    new_rows = [make_new_row(i, [i + 1, 2], params=p) for i, p in enumerate(params)]

    output = rig.step(make_plan([0, 1, 2], [2, 2, 2], new_rows=new_rows))

    assert [part.row for part in output.logprobs] == [1]
    chosen = output.logprobs[0].chosen
    assert chosen is not None
    best = next_token([2, 2])
    assert chosen.token_ids[:2] == [best, best]
    assert abs(chosen.token_ids[2] - best) == 1
    assert chosen.rank == 1
    assert chosen.logprobs[0] == chosen.logprobs[1] > chosen.logprobs[2]


@dataclass
class Simulated:
    """A request as a naive core would keep it."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)


class Simulation:
    """A core that plans at random, and knows every token in advance."""

    BLOCK_SIZE = 8
    MAX_LEN = 60

    def __init__(self, seed: int, graphs: GraphSizes | None) -> None:
        self.rng = random.Random(seed)
        self.rig = Rig(
            num_blocks=100,
            num_swap_blocks=60,
            graphs=graphs,
            max_num_seqs=8,
            max_model_len=self.MAX_LEN,
        )
        self.rows: dict[int, Simulated] = {}
        self.waiting: list[Simulated] = []
        self.swapped: list[tuple[Simulated, list[int]]] = []
        self.references: Counter[int] = Counter()
        self.free_swap = list(range(60))
        self.pending: list[tuple[PendingStep, list[int]]] = []
        self.num_done = Counter[str]()

    def take_blocks(self, count: int) -> list[int]:
        free = [block for block in range(1, 100) if not self.references[block]]
        self.rng.shuffle(free)
        taken = free[:count]
        assert len(taken) == count, "the pool is large enough for eight rows"
        self.references.update(taken)
        return taken

    def release(self, block_ids: list[int]) -> None:
        self.references.subtract(block_ids)

    def free_rows(self) -> list[int]:
        return [row for row in range(8) if row not in self.rows]

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.BLOCK_SIZE)

    def leave(self, plan: dict[str, list]) -> None:
        """One row ends, is preempted, or is swapped out."""
        if not self.rows or self.rng.random() > 0.3:
            return
        row = self.rng.choice(sorted(self.rows))
        request = self.rows.pop(row)
        plan["freed_rows"].append(row)
        kind = self.rng.choice(["finish", "recompute", "swap"])
        self.num_done[kind] += 1
        if kind == "recompute":
            self.waiting.append(Simulated(request.token_ids, request.num_prompt_tokens))
        elif kind == "swap":
            pool_ids = [self.free_swap.pop() for _ in request.block_ids]
            plan["swap_out"] += zip(request.block_ids, pool_ids, strict=True)
            self.swapped.append((request, pool_ids))
        self.release(request.block_ids)
        request.block_ids = []

    def enter(self, plan: dict[str, list]) -> None:
        """One row comes: new, recomputed, swapped in, or forked."""
        free = self.free_rows()
        if not free or self.rng.random() > 0.5:
            return
        row = self.rng.choice(free)
        if self.swapped and self.rng.random() < 0.5:
            request, pool_ids = self.swapped.pop()
            request.block_ids = self.take_blocks(len(pool_ids))
            plan["swap_in"] += zip(pool_ids, request.block_ids, strict=True)
            self.free_swap += pool_ids
        elif self.rows and self.rng.random() < 0.3:
            request = self.fork(self.rng.choice(sorted(self.rows)), plan)
        elif self.waiting:
            request = self.waiting.pop()
        else:
            length = self.rng.randint(1, 30)
            request = Simulated([self.rng.randrange(VOCAB_SIZE) for _ in range(length)], length)
        wanted = self.blocks_for(len(request.token_ids))
        request.block_ids = request.block_ids + self.take_blocks(wanted - len(request.block_ids))
        self.rows[row] = request
        plan["new_rows"].append(
            NewRow(
                row=row,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed,
                block_ids=list(request.block_ids),
                params=GREEDY,
            )
        )

    def fork(self, parent_row: int, plan: dict[str, list]) -> Simulated:
        """A branch that shares its parent's full blocks and copies the last, partial one."""
        self.num_done["fork"] += 1
        parent = self.rows[parent_row]
        num_shared, rest = divmod(parent.num_computed, self.BLOCK_SIZE)
        shared = parent.block_ids[:num_shared]
        self.references.update(shared)
        copies = []
        if rest:
            copies = self.take_blocks(1)
            plan["block_copies"].append((parent.block_ids[num_shared], copies[0]))
        return Simulated(
            list(parent.token_ids), parent.num_prompt_tokens, parent.num_computed, shared + copies
        )

    def schedule(self, plan: dict[str, list]) -> list[int]:
        """Pay some of what some rows owe; returns the ids that must be sampled."""
        expected = []
        rows = [row for row in self.rows if self.rng.random() < 0.8]
        self.rng.shuffle(rows)
        is_decode = all(len(r.token_ids) - r.num_computed == 1 for r in map(self.rows.get, rows))
        for row in rows:
            request = self.rows[row]
            owed = len(request.token_ids) - request.num_computed
            if len(request.token_ids) >= self.MAX_LEN:
                is_decode = False
                continue
            count = self.rng.choice([owed, self.rng.randint(1, owed)])
            missing = self.blocks_for(request.num_computed + count) - len(request.block_ids)
            if missing > 0:
                block_ids = self.take_blocks(missing)
                request.block_ids += block_ids
                plan["new_block_ids"].append((row, block_ids))
            plan["rows"].append(row)
            plan["num_new_tokens"].append(count)
            request.num_computed += count
            if count == owed:
                expected.append(next_token(request.token_ids))
                request.token_ids.append(expected[-1])
        if is_decode:
            self.num_done["decode"] += 1
            plan["num_new_tokens"] = []
        return expected

    def step(self, step_id: int) -> None:
        names = ["freed_rows", "swap_out", "swap_in", "block_copies", "new_rows", "new_block_ids"]
        plan: dict[str, list] = {name: [] for name in [*names, "rows", "num_new_tokens"]}
        self.leave(plan)
        self.enter(plan)
        expected = self.schedule(plan)
        step = self.rig.runner.execute(SchedulerOutput(step_id=step_id, **plan))
        self.pending.append((step, expected))
        while len(self.pending) > self.rng.choice([0, 1]):
            oldest, wanted = self.pending.pop(0)
            assert oldest.resolve()[0].sampled_token_ids == wanted

    def check(self) -> None:
        """Rows on the device and their mirrors equal the naive ones."""
        states = self.rig.states
        for row, request in self.rows.items():
            length = len(request.token_ids)
            assert int(states.num_tokens[row]) == length
            assert int(states.num_computed_tokens[row]) == request.num_computed
            assert states.tokens.tensor[row, :length].tolist() == request.token_ids
            assert states.block_ids(row) == request.block_ids
            beyond = states.blocks.tensor[row, len(request.block_ids) :]
            assert not beyond.any(), "entries past the row's blocks are the null block"


GRAPHS = graph_sizes(max_num_seqs=8, max_num_batched_tokens=64, max_seq_len=50, num_weights=10**10)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "graphs", [pytest.param(None, id="eager"), pytest.param(GRAPHS, id="recorded")]
)
def test_five_hundred_random_steps_equal_a_naive_recomputation(
    seed: int, graphs: GraphSizes | None
) -> None:
    simulation = Simulation(seed, graphs)

    for step_id in range(500):
        simulation.step(step_id)
        simulation.check()
        if simulation.rig.runner.graphs is not None and step_id % 10 == 0:
            simulation.rig.runner.graphs.record_next()

    assert min(simulation.num_done[kind] for kind in ("finish", "recompute", "swap", "fork")) > 20
    assert simulation.num_done["decode"] > 20
