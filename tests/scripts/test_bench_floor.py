"""The least times, against arithmetic done by hand for the 8B shape."""

import pytest
from bench_floor import Cost, Floor, Machine
from bench_model import find_model
from bench_workload import FULL

MACHINE = Machine(bytes_per_s=4.26e12, flop_per_s=689e12)


def make_floor() -> Floor:
    return Floor(Cost.of(find_model("llama-8b").path), MACHINE)


def test_an_8b_model_reads_15_gb_a_step_and_128_kib_a_token() -> None:
    cost = Cost.of(find_model("llama-8b").path)
    assert 2 * (cost.body + cost.head) == 15_009_316_864
    assert cost.kv_bytes == 131_072


@pytest.mark.parametrize(
    ("batch", "step_ms"),
    [(1, 3.53), (32, 3.78), (256, 7.59)],
    ids=["weights", "weights and keys", "products and keys"],
)
def test_a_decode_step_takes_its_bytes_or_its_products(batch: int, step_ms: float) -> None:
    figures = make_floor().decode(batch, 128, 256)
    assert figures["step_ms_mean"] == pytest.approx(step_ms, rel=2e-3)
    assert figures["steady_tok_s"] == pytest.approx(1e3 * batch / step_ms, rel=2e-3)


def test_a_prompt_takes_its_products_attention_included() -> None:
    body_flop, attention_flop = 2 * 6_979_321_856 * 8192, 8192**2 / 2 * 4 * 4096 * 32
    expected_ms = 1e3 * (body_flop + attention_flop) / 689e12
    assert make_floor().prefill(1, 8192)["ttft_ms"] == pytest.approx(expected_ms, rel=1e-3)


def test_a_single_token_takes_one_reading_of_the_weights() -> None:
    expected_s = 100 * 15.009e9 / 4.26e12
    assert make_floor().offline([3], [100])["seconds"] == pytest.approx(expected_s, rel=1e-3)


def test_every_offline_measurement_of_the_suite_has_a_floor() -> None:
    floors = make_floor().all(FULL)
    assert floors.keys() >= {"decode.b1", "prefill.32768", "offline.sharegpt", "prefix.warm"}
    chat = floors["offline.sharegpt"]
    assert chat["tok_s"] * chat["seconds"] == pytest.approx(201_317)
