"""Which failures of a step are a lack of memory."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run_script

from cxrdist.errors import RunFailedError
from cxrdist.train.memory import is_out_of_memory, memory_for
from cxrdist.train.step import Slice

TOO_MUCH = 1 << 60  # bytes


def fail(error: Exception) -> None:
    raise error


def step_of(num_images: int) -> Slice:
    """A slice of a rank beside another one."""
    images = torch.zeros(num_images, 1, 1, 1)
    sizes = (num_images, num_images)
    return Slice(images, images, images, None, slice(0, num_images), sizes, num_known=1, turn=0)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: bytearray(TOO_MUCH),
        lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        lambda: fail(RuntimeError("CUDA error: out of memory")),
        lambda: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`")),
        lambda: fail(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        lambda: fail(RuntimeError("std::bad_alloc")),
    ],
)
def test_a_failed_allocation_names_the_batch_and_the_mend(allocate: Callable[[], object]):
    """Of PyTorch, NumPy and Python for real; what a GPU's libraries say is taken from them.

    Twelve images, at most 8 at once, are two passes of 6.
    """
    expected = "step 3: out of memory with 6 images in a pass, of 24 .*max-images-per-rank 3"
    with pytest.raises(RunFailedError, match=expected), memory_for(step_of(12), 8, "step 3"):
        allocate()


@pytest.mark.parametrize(
    "other", [RuntimeError("mat1 and mat2 cannot be multiplied"), ValueError("out of memory")]
)
def test_another_fault_is_passed_on(other):
    """It is no mend to take fewer images then."""
    with pytest.raises(type(other)) as caught, memory_for(step_of(12), None, "step 3"):
        raise other
    assert caught.value is other


def hide(error: Exception) -> None:
    """Raise an error, and a second one on the way out, as a CUDA graph's recording does."""
    try:
        raise error
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error")


def test_a_lack_of_memory_is_seen_behind_other_errors():
    """Where what it interrupted has failed because of it."""
    cpu = torch.device("cpu")
    for first, expected in (("CUDA out of memory", True), ("an illegal memory access", False)):
        with pytest.raises(RuntimeError, match="previous error") as later:
            hide(RuntimeError(first))
        assert is_out_of_memory(later.value, cpu) is expected


PRIMITIVE = """
import resource, sys
sys.path[:0] = sys.argv[4:]
import torch
from test_memory import step_of
from cxrdist.errors import RunFailedError
from cxrdist.train.memory import is_out_of_memory, memory_for

used = int(open("/proc/self/status").read().split(sys.argv[1] + ":")[1].split()[0]) << 10
if sys.argv[2] != "none":
    kind = getattr(resource, sys.argv[2])
    resource.setrlimit(kind, (2 * used, resource.getrlimit(kind)[1]))  # as ulimit -S does
try:
    with memory_for(step_of(2), None, "step 3"):
        torch.empty(int(2 * used * float(sys.argv[3])) - used, dtype=torch.uint8)
        raise RuntimeError("could not create a primitive")
except RunFailedError:
    print("short of memory")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("used", "limit", "share", "found"),
    [
        ("VmData", "RLIMIT_DATA", 0.95, "short of memory"),
        ("VmSize", "RLIMIT_AS", 0.95, "short of memory"),
        ("VmData", "RLIMIT_DATA", 0.7, "could not create a primitive"),
        ("VmSize", "RLIMIT_AS", 0.7, "could not create a primitive"),
        ("VmData", "none", 0.95, "could not create a primitive"),
    ],
)
def test_a_primitive_that_is_not_created_needs_evidence(used, limit, share, found):
    """Other faults have the same words; what was allocated is free again when they come."""
    done = run_script(PRIMITIVE, used, limit, share, *Path(__file__).parents[:2])
    assert done.stdout.strip() == found, done.stderr
