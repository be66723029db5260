"""A step that does not fit into memory: recognise it, and say what to do."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cxrdist.errors import RunFailedError
from cxrdist.train.step import Slice

# What libraries say of an allocation that failed: PyTorch, the C++ library, cuBLAS and cuDNN.
_SURE = ("out of memory", "allocate memory", "not enough memory", "std::bad_alloc", "ALLOC_FAILED")
# What they also say of other faults: oneDNN, and handles of cuBLAS and cuDNN.
_UNSURE = ("could not create a primitive", "could not execute a primitive", "NOT_INITIALIZED")
_FULL = 0.9  # of a limit: the rest is less than the allocation that failed, or fragmented


@contextmanager
def memory_for(part: Slice, max_images: int | None, where: str) -> Iterator[None]:
    """Say what to do when a step does not fit into memory.

    Raises:
        RunFailedError: it did not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error, part.images.device):
            raise
        images = min(len(part.images), max_images or len(part.images))
        mend = f"try --max-images-per-rank {images // 2}" if images > 1 else "take a larger machine"
        raise RunFailedError(
            f"{where}: out of memory with {images} images in a pass, of {part.step_size} in the "
            f"step over all ranks; {mend}; the results are the same but for BatchNorm"
        ) from error


def _is_shortage(error: Exception, device: torch.device) -> bool:
    """Whether memory was short; words that may mean something else need evidence."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    if any(words in text for words in _SURE):
        return True
    return any(words in text for words in _UNSURE) and (_host_was_full() or _gpu_is_full(device))


def _host_was_full() -> bool:
    """Whether this process has come near a limit of its memory; without a limit none has failed.

    The kernel keeps the peak of the address space only. What was freed since, while the error
    was passed up, counts as data of the peak.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return False
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    peak, size, data = (int(lines[k].split()[0]) << 10 for k in ("VmPeak", "VmSize", "VmData"))
    used = {resource.RLIMIT_AS: peak, resource.RLIMIT_DATA: data + peak - size}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return any(
        limit != resource.RLIM_INFINITY and used[kind] > _FULL * limit
        for kind, limit in limits.items()
    )


def _gpu_is_full(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    return free < (1 - _FULL) * total
