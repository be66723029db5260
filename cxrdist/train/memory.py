"""Memory: a step that does not fit says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from cxrdist.errors import RunFailedError
from cxrdist.train.step import Slice

# Of the allocators of CPU and GPU, of cuBLAS and cuDNN, and of `memory_for`.
OUT_OF_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that memory ran out, or was raised because of one that does.

    Recording a CUDA graph hides the first error behind one about the recording.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def memory_for(part: Slice, max_images: int | None, where: str) -> Iterator[None]:
    """Say what to do when a step does not fit into memory.

    Raises:
        RunFailedError: it did not.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        images = min(len(part.images), max_images or len(part.images))
        mend = f"try --max-images-per-rank {images // 2}" if images > 1 else "take a larger machine"
        raise RunFailedError(
            f"{where}: out of memory with {images} images in a pass, of {sum(part.sizes)} in the "
            f"step over all ranks; {mend}; the results are the same but for BatchNorm"
        ) from error
