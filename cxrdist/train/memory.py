"""Memory: a step that does not fit says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cxrdist.errors import RunFailedError
from cxrdist.train.step import Slice


@contextmanager
def memory_for(part: Slice, max_images: int | None, where: str) -> Iterator[None]:
    """Say what to do when a step does not fit into memory.

    Raises:
        RunFailedError: it did not.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        images = min(len(part.images), max_images or len(part.images))
        mend = f"try --max-images-per-rank {images // 2}" if images > 1 else "take a larger machine"
        raise RunFailedError(
            f"{where}: out of memory with {images} images in a pass, of {sum(part.sizes)} in the "
            f"step over all ranks; {mend}; the results are the same but for BatchNorm"
        ) from error
