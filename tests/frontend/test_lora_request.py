"""LoRARequest: the number is the identity, the path has two spellings."""

from typing import Any

import pytest

from frontend.lora_request import LoRARequest
from ipc.messages import LoRASpec


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(LoRARequest("x", 1, "/x"), id="by position"),
        pytest.param(LoRARequest("x", 1, lora_local_path="/x"), id="older spelling"),
        pytest.param(LoRARequest("x", 1, lora_path="/x"), id="newer spelling"),
    ],
)
def test_both_spellings_of_the_path_read_back(request_: LoRARequest) -> None:
    assert request_.lora_path == request_.lora_local_path == request_.path == "/x"
    assert request_.to_spec() == LoRASpec("x", 1, "/x")


def test_the_number_is_the_identity() -> None:
    assert LoRARequest("x", 1, "/x") == LoRARequest("y", 1, "/y")
    assert hash(LoRARequest("x", 1, "/x")) == hash(LoRARequest("y", 1, "/y"))
    assert LoRARequest("x", 1, "/x") != LoRARequest("x", 2, "/x")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"lora_int_id": 0}, id="number below one"),
        pytest.param({"lora_int_id": "1"}, id="number as text"),
        pytest.param({"lora_name": ""}, id="no name"),
        pytest.param({"lora_local_path": ""}, id="no path"),
        pytest.param({"lora_path": "/y"}, id="two paths"),
    ],
)
def test_what_names_no_adapter_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lora_"):
        LoRARequest(**({"lora_name": "x", "lora_int_id": 1, "lora_local_path": "/x"} | fields))
