"""Places in the queue, tenant by tenant."""

from engine_core.fair_share import FairShare


def place(
    share: FairShare, tenant: int, weight: float = 1.0, tokens: int = 100, **other: int
) -> int:
    options = {"max_output_tokens": 0, "newest_place": 0} | other
    return share.place(tenant, weight, num_prompt_tokens=tokens, **options)


def test_without_tenants_everybody_has_the_same_place() -> None:
    share = FairShare()
    assert {place(share, 0) for _ in range(5)} == {0}


def test_a_newcomer_goes_before_what_another_tenant_has_queued() -> None:
    share = FairShare()
    queued = [place(share, 1) for _ in range(100)]
    assert queued == sorted(set(queued))
    assert place(share, 2) <= queued[1]


def test_turns_are_dealt_by_weight() -> None:
    share = FairShare()
    order = sorted(
        [(place(share, 1, 3.0), 1) for _ in range(60)]
        + [(place(share, 2, 1.0), 2) for _ in range(60)]
    )
    first = [tenant for _, tenant in order[:40]]
    assert 28 <= first.count(1) <= 32


def test_long_prompts_use_a_share_up_sooner() -> None:
    share = FairShare()
    order = sorted(
        [(place(share, 1, tokens=1000), 1) for _ in range(20)]
        + [(place(share, 2, tokens=100), 2) for _ in range(100)]
    )
    assert 4 <= [tenant for _, tenant in order[:55]].count(1) <= 6


def test_a_tenant_that_was_idle_is_not_paid_for_it() -> None:
    share = FairShare()
    first = place(share, 1)
    assert place(share, 2, newest_place=first + 10**6) == first + 10**6


def test_requests_without_a_tenant_take_part_once_there_are_tenants() -> None:
    share = FairShare()
    queued = [place(share, 1) for _ in range(3)]
    nobody = [place(share, 0) for _ in range(3)]
    assert nobody == queued


def test_outputs_cost_what_they_have_been_lately() -> None:
    share = FairShare()
    for _ in range(500):
        share.note_output(900)
    gap = -place(share, 1, max_output_tokens=4096) + place(share, 1)
    assert 950_000 < gap <= 1_000_000
    assert place(share, 1, max_output_tokens=5) + 105_000 == place(share, 1)
