"""Out of memory: recognise a step that does not fit, and tell the user what to do."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cxrdist.errors import RunFailedError
from cxrdist.train.step import Slice, num_passes

# Messages of a failed allocation by PyTorch, the C++ library, cuBLAS and cuDNN.
_SURE = ("out of memory", "allocate memory", "not enough memory", "std::bad_alloc", "ALLOC_FAILED")
# Messages that may also mean other faults, by oneDNN, cuBLAS and cuDNN.
_UNSURE = ("could not create a primitive", "could not execute a primitive", "NOT_INITIALIZED")
_FULL = 0.9  # of a limit: the rest is less than the allocation that failed, or fragmented


@contextmanager
def memory_for(batch: Slice, max_images: int | None, where: str) -> Iterator[None]:
    """Raise RunFailedError with what to do if a step does not fit into memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error, batch.images.device):
            raise
        images = -(-len(batch.images) // num_passes(batch.sizes, max_images))
        mend = f"try --max-images-per-rank {images // 2}" if images > 1 else "take a larger machine"
        raise RunFailedError(
            f"{where}: out of memory with {images} images in a pass, of {sum(batch.sizes)} in the "
            f"step over all ranks; {mend}; the results are the same but for BatchNorm"
        ) from error


def is_out_of_memory(error: BaseException | None, device: torch.device) -> bool:
    """Return whether an error says that memory ran out, or was raised because of one that does.

    Recording a CUDA graph hides the first error behind one about the recording. Words that may
    also mean something else need evidence.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in text for words in _SURE):
            return True
        unsure = isinstance(error, RuntimeError) and any(words in text for words in _UNSURE)
        if unsure and (_host_was_full() or _gpu_is_full(device)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _host_was_full() -> bool:
    """Return whether this process came near a limit of its memory; False if there is none.

    The kernel keeps a peak of the address space, but none of the data. So what was freed while the
    error was passed up is counted as data.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return False
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    # The kernel counts in kB.
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
