"""Logits processors run in the caller's process; what they raise is their request's error."""

import subprocess
import sys
from array import array
from typing import Any

import pytest

from frontend.logits_processors import RowWork, resolve_processors, run_processors
from ipc.errors import RequestError
from ipc.messages import LogitsRow
from ipc.records import TensorRef
from ipc.tensors import read


def ban_first(output_ids: list[int], logits: Any) -> Any:
    logits[0] = float("-inf")
    return logits


def make_work(processors: list[Any], values: list[float]) -> RowWork:
    row = LogitsRow("r", 1, 7, TensorRef(0, "float32", [len(values)]))
    frames = [memoryview(array("f", values).tobytes())]
    return RowWork(row, frames, resolve_processors(processors), [1, 2], [3])


def run(processors: list[Any], values: list[float]) -> list[float] | str | None:
    """The logits that come back, or the error."""
    answer, frames = run_processors(make_work(processors, values))
    assert (answer.req_id, answer.index, answer.position) == ("r", 1, 7)
    if answer.logits is None:
        return answer.error
    return list(memoryview(read(answer.logits, frames)).cast("f"))


def test_processors_run_in_order() -> None:
    def double(output_ids: list[int], logits: Any) -> Any:
        return logits * 2

    assert run([ban_first, double], [1.0, 2.0, 3.0]) == [float("-inf"), 4.0, 6.0]


def test_a_processor_of_three_arguments_sees_the_prompt() -> None:
    seen = []

    def note(prompt_ids: list[int], output_ids: list[int], logits: Any) -> Any:
        seen.append((prompt_ids, output_ids))
        return logits

    run([note], [1.0])
    assert seen == [([1, 2], [3])]


def test_a_processor_may_spoil_its_ids_without_harm() -> None:
    def spoil(output_ids: list[int], logits: Any) -> Any:
        output_ids.clear()
        return logits

    work = make_work([spoil], [1.0])
    run_processors(work)
    assert work.output_ids == [3]


def test_an_import_path_names_a_processor() -> None:
    assert run([f"{__name__}:ban_first"], [1.0, 2.0]) == [float("-inf"), 2.0]


def test_results_of_other_types_are_brought_to_float32() -> None:
    def to_double(output_ids: list[int], logits: Any) -> Any:
        return logits.double()[[1, 0]]

    assert run([to_double], [1.0, 2.0]) == [2.0, 1.0]


def test_an_exception_is_the_requests_error() -> None:
    def fail(output_ids: list[int], logits: Any) -> Any:
        raise KeyError("boom")

    assert run([fail], [1.0]) == "KeyError: 'boom'"


@pytest.mark.parametrize(
    "result",
    [pytest.param(None, id="nothing"), pytest.param("half", id="another shape")],
)
def test_a_result_that_is_no_row_is_an_error(result: Any) -> None:
    def shrink(output_ids: list[int], logits: Any) -> Any:
        return logits[:1] if result == "half" else None

    error = run([shrink], [1.0, 2.0])
    assert isinstance(error, str)
    assert "must return a tensor of shape (2,)" in error


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(7, id="a number"),
        pytest.param("no.such.module:f", id="a module that is not there"),
        pytest.param("math", id="a path without attribute"),
        pytest.param(f"{__name__}:missing", id="an attribute that is not there"),
        pytest.param(lambda: None, id="no arguments"),
        pytest.param(lambda a, b, c, d: d, id="four arguments"),
    ],
)
def test_what_is_no_processor_is_refused(given: Any) -> None:
    with pytest.raises(RequestError) as caught:
        resolve_processors([given])
    assert caught.value.param == "logits_processors"


def test_torch_is_not_imported_before_the_first_row() -> None:
    code = "import sys, frontend.logits_processors as l; l.resolve_processors([lambda a, b: b])"
    check = f"{code}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
