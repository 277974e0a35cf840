"""Who is suspected of having killed a core, and what follows from it."""

import os

import pytest

from engine_core.flight_record import Flight, FlightRecord, Verdicts
from engine_core.suspicion import REFUSED_S, Suspicions


def test_two_deaths_without_a_token_lead_to_a_trial_and_a_third_alone_to_a_verdict() -> None:
    suspicions = Suspicions()
    assert suspicions.note_death(Flight(["a", "poison"]), 0.0) == Verdicts()
    assert suspicions.note_death(Flight(["poison", "b"]), 1.0) == Verdicts(["poison"])

    verdicts = suspicions.note_death(Flight(["poison"], "poison", "digest"), 2.0)
    assert verdicts == Verdicts([], ["poison"], {"digest": 2.0 + REFUSED_S})


def test_a_request_that_brought_a_token_is_not_suspected_any_more() -> None:
    suspicions = Suspicions()
    suspicions.note_death(Flight(["a", "b"]), 0.0)
    suspicions.note_death(Flight(["b"]), 1.0)
    assert suspicions.note_death(Flight(["a"]), 2.0) == Verdicts()


def test_deaths_from_outside_suspect_nobody_and_forget_nothing() -> None:
    suspicions = Suspicions()
    suspicions.note_death(Flight(["a"]), 0.0)
    for _ in range(50):
        assert suspicions.note_other_death(1.0) == Verdicts()
    assert suspicions.note_death(Flight(["a"]), 2.0) == Verdicts(["a"])
    assert suspicions.note_other_death(3.0) == Verdicts(["a"])


def test_whoever_is_on_trial_is_innocent_of_a_death_after_its_token() -> None:
    suspicions = Suspicions()
    assert suspicions.note_death(Flight(["other"], "tried", "digest"), 0.0) == Verdicts()


def test_refusals_end() -> None:
    suspicions = Suspicions()
    suspicions.note_death(Flight(["a"], "a", "digest"), 0.0)
    assert suspicions.note_other_death(REFUSED_S - 1).refused == {"digest": REFUSED_S}
    assert suspicions.note_other_death(REFUSED_S) == Verdicts()


@pytest.fixture
def memory() -> int:
    return FlightRecord.make_memory()


def test_a_record_outlives_its_writer_and_brings_verdicts_back(memory: int) -> None:
    supervisors, cores = FlightRecord(memory), FlightRecord(memory)
    assert cores.read_verdicts() == Verdicts()
    cores.note(1, Flight(["a", "b"], "a", "digest"))
    cores.note(2, None)
    del cores
    assert supervisors.read() == Flight(["a", "b"], "a", "digest")
    supervisors.judge(Verdicts(["a"], ["b"], {"digest": 5.0}))
    assert FlightRecord(memory).read_verdicts() == Verdicts(["a"], ["b"], {"digest": 5.0})
    assert supervisors.read() == Flight()  # the next core has begun
    os.close(memory)


def test_more_suspects_than_fit_are_no_suspects(memory: int) -> None:
    record = FlightRecord(memory)
    record.note(1, Flight(["x" * 250 + str(i) for i in range(10_000)]))
    assert record.read() == Flight()
    os.close(memory)
