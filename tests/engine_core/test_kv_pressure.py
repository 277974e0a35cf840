"""Several times more work than the KV cache holds: everybody finishes, nobody is pushed around."""

import random

import pytest

from ipc.messages import FinishReason
from tests.engine_core.builders import Rig, make_request

MAX_PREEMPTIONS = 8
MAX_BARREN_STEPS = 20  # without a new token, while prompts are computed


def press(rig: Rig, num_requests: int, *, num_tenants: int, seed: int) -> None:
    """Keep three times the cache's worth of requests open until all have been served."""
    random_source = random.Random(seed)
    capacity = rig.gpu_pool.num_usable * rig.setup.block_size
    num_added = num_barren = worst = generated = 0
    demand: dict[str, int] = {}
    while rig.core.has_unfinished or num_added < num_requests:
        while num_added < num_requests and sum(demand.values()) < 3 * capacity:
            prompt, output = random_source.randint(1, 70), random_source.randint(1, 50)
            request = make_request(
                f"r{num_added}",
                prompt,
                seed=num_added,
                max_tokens=output,
                n=random_source.choice([1, 1, 1, 2]),
                tenant=random_source.randint(1, num_tenants) if num_tenants else 0,
                priority=random_source.randint(0, 3),
            )
            demand[request.req_id] = (prompt + output) * request.params.n
            rig.add(request)
            num_added += 1
        rig.step()
        worst = max([worst, *(r.num_preemptions for r in rig.scheduler.lifecycle.waiting)])
        for req_id in [name for name in demand if rig.branch(name).finish_reason is not None]:
            del demand[req_id]
        before, generated = generated, rig.core.stats().generation_tokens
        num_barren = 0 if generated > before else num_barren + 1
        assert num_barren <= MAX_BARREN_STEPS, "nobody gets anywhere"
    rig.deliver(rig.core.drain_outputs())
    assert worst <= MAX_PREEMPTIONS
    assert all(b.finish_reason is FinishReason.LENGTH for b in rig.client.branches.values())
    rig.check_idle()


SETUPS = {
    "first come": {"num_blocks": 40},
    "tenants": {"num_blocks": 40, "num_tenants": 3},
    "tight": {"num_blocks": 18, "num_tenants": 2},
    "by priority": {"num_blocks": 40, "policy": "priority"},
    "swapping": {"num_blocks": 40, "num_cpu_blocks": 60, "preemption_mode": "swap"},
}


def make_rig(setup: dict[str, object]) -> tuple[Rig, int]:
    options: dict[str, object] = dict(setup)
    num_tenants = options.pop("num_tenants", 0)
    assert isinstance(num_tenants, int)
    num_blocks = options.pop("num_blocks")
    return Rig(num_gpu_blocks=num_blocks, max_num_seqs=32, **options), num_tenants


@pytest.mark.parametrize("name", list(SETUPS))
def test_everybody_finishes_with_few_preemptions(name: str) -> None:
    rig, num_tenants = make_rig(SETUPS[name])
    press(rig, 120, num_tenants=num_tenants, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETUPS))
def test_two_thousand_requests_finish_with_few_preemptions(name: str) -> None:
    rig, num_tenants = make_rig(SETUPS[name])
    press(rig, 2000, num_tenants=num_tenants, seed=2)
