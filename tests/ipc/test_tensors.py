"""Tensor frames: what is written is read back, and nothing that does not fit is believed."""

from array import array

import pytest

from ipc.errors import ProtocolError
from ipc.records import TensorRef
from ipc.tensors import FrameWriter, read


def test_arrays_are_read_back_bit_for_bit_in_any_order() -> None:
    writer = FrameWriter()
    floats = writer.add(array("f", [1.5, -2.0]), "float32", [2])
    ids = writer.add(array("q", [1, 2, 3, 4, 5, 6]), "int64", [2, 3])

    assert list(read(ids, writer.frames).cast("q")) == [1, 2, 3, 4, 5, 6]
    assert list(read(floats, writer.frames).cast("f")) == [1.5, -2.0]


def test_frames_reference_the_memory_they_were_made_of() -> None:
    writer = FrameWriter()
    numbers = array("i", [1, 2])
    ref = writer.add(numbers, "int32", [2])
    numbers[0] = 7

    assert list(read(ref, writer.frames).cast("i")) == [7, 2]


def test_an_array_without_elements_is_no_special_case() -> None:
    writer = FrameWriter()
    ref = writer.add(array("f"), "float32", [0, 5])

    assert read(ref, writer.frames).nbytes == 0


@pytest.mark.parametrize(
    "ref",
    [
        pytest.param(TensorRef(1, "float32", [2]), id="frame missing"),
        pytest.param(TensorRef(-1, "float32", [2]), id="frame negative"),
        pytest.param(TensorRef(0, "float32", [3]), id="shape larger than frame"),
        pytest.param(TensorRef(0, "float32", [1]), id="shape smaller than frame"),
        pytest.param(TensorRef(0, "float32", [-2, -1]), id="negative extents"),
        pytest.param(TensorRef(0, "float32", [2**62, 2**62]), id="astronomic"),
        pytest.param(TensorRef(0, "object", [1]), id="type unknown"),
        pytest.param(TensorRef(0, "complex128", [1]), id="type not on the list"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(ref: TensorRef) -> None:
    with pytest.raises(ProtocolError):
        read(ref, [b"12345678"])


def test_a_writer_refuses_a_shape_that_is_not_the_buffers() -> None:
    with pytest.raises(ProtocolError, match="needs 12 bytes, its frame has 8"):
        FrameWriter().add(array("f", [1.0, 2.0]), "float32", [3])
