"""Which errors are a lack of memory."""

import pytest
import torch

from cxrdist.train.memory import is_out_of_memory

CPU = torch.device("cpu")


def hide(error: Exception) -> None:
    """Raise an error, and a second one on the way out, as a CUDA graph's recording does."""
    try:
        raise error
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_a_lack_of_memory_is_seen_behind_other_errors(error):
    """As it is, and where what it interrupted has failed because of it."""
    assert is_out_of_memory(error, CPU)
    with pytest.raises(RuntimeError, match="previous error") as later:
        hide(error)
    assert is_out_of_memory(later.value, CPU)


def test_other_errors_are_no_lack_of_memory():
    """An error of the device or of the program."""
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"), CPU)
    assert not is_out_of_memory(RuntimeError("could not create a primitive"), CPU)  # no limit here
    assert not is_out_of_memory(ValueError("out of memory, says a file's name"), CPU)
