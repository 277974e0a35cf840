"""The fuzzers in their short form; `scripts/fuzz NAME --inputs 20000` runs them at full size."""

from tests.fuzz import (
    fuzz_config_json,
    fuzz_engine_args,
    fuzz_frames,
    fuzz_http,
    fuzz_safetensors,
    fuzz_sampling_params,
)
from tests.fuzz.servers import running_server


def test_random_sampling_params_are_sound_or_refused() -> None:
    counts = fuzz_sampling_params.fuzz(2000)

    assert counts["accepted"] > 100
    assert counts["refused"] > 100


def test_random_engine_arguments_are_sound_or_refused_at_once() -> None:
    counts = fuzz_engine_args.fuzz(400)

    assert counts["accepted"] > 5
    assert counts["refused"] > 100


def test_random_http_bodies_never_cause_a_server_error() -> None:
    with running_server() as url:
        statuses = fuzz_http.fuzz(url, 300)

    assert statuses["200"] > 10
    assert sum(statuses.values()) == 300


def test_hostile_frames_on_every_socket_disturb_no_stream() -> None:
    counts = fuzz_frames.fuzz(300)

    assert counts["sockets"] >= 2


def test_hostile_settings_files_are_a_model_or_a_configuration_error() -> None:
    counts = fuzz_config_json.fuzz(300)

    assert min(counts.values()) > 30


def test_spoiled_safetensors_files_are_weights_or_a_start_error() -> None:
    counts = fuzz_safetensors.fuzz(500)

    assert min(counts.values()) > 10
