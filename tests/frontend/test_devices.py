"""The choice of a device, without a GPU and without torch."""

from importlib.metadata import PackageNotFoundError

import pytest

from frontend import devices
from frontend.devices import choose_device, find_why_no_cuda
from ipc.errors import ConfigError


@pytest.mark.parametrize(
    ("wanted", "reason", "expected"),
    [
        ("auto", None, "cuda"),
        ("auto", "no GPU", "cpu"),
        ("cuda", None, "cuda"),
        ("cpu", None, "cpu"),
        ("cpu", "no GPU", "cpu"),
    ],
)
def test_auto_takes_a_gpu_where_there_is_one(
    wanted: str, reason: str | None, expected: str
) -> None:
    assert choose_device(wanted, lambda: reason) == expected


@pytest.mark.parametrize("wanted", ["cuda", "neuron", "tpu", ""])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="--device"):
        choose_device(wanted, lambda: "this machine shows no NVIDIA GPU")


@pytest.mark.parametrize("value", ["", "-1", " "])
def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert find_why_no_cuda() == "CUDA_VISIBLE_DEVICES hides every GPU"


@pytest.mark.parametrize(
    ("torch_version", "expected"),
    [("2.13.0+cpu", "for CPUs only"), ("2.11.0", None), ("2.11.0+cu128", None)],
)
def test_a_torch_for_cpus_cannot_use_a_gpu(
    monkeypatch: pytest.MonkeyPatch, torch_version: str, expected: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(devices, "version", lambda name: torch_version)
    reason = find_why_no_cuda()
    assert reason is None if expected is None else expected in str(reason)


def test_a_driver_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    monkeypatch.setattr(devices.ctypes, "CDLL", fail)
    assert "libcuda.so.1" in str(find_why_no_cuda())


def test_no_torch_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.Path, "glob", lambda self, pattern: iter(["/dev/nvidia0"]))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())
    monkeypatch.setattr(devices, "version", absent)
    assert find_why_no_cuda() == "torch is not installed"
