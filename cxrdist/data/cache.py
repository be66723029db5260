"""The decoded cache: all samples as one memory-mapped uint8 array on local disk."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.index import Index
from cxrdist.data.shards import local_copy, read_shard, verify_shard
from cxrdist.distributed import gather, local_ranks, together
from cxrdist.terminal import progress

Images = NDArray[np.uint8]


def open_cache(index: Index, directory: Path | None, accelerator: Accelerator) -> Images:
    """Map all images of the shards, decoding them first where no run on this node has done so.

    The shards are compared with their index every time, and each decoded sample with its hash.

    Args:
        index: the shards.
        directory: on local disk; ``~/.cache/cxrdist`` if None.
        accelerator: its ranks share the work of their node.

    Returns:
        uint8 [samples, size, size], read-only, in the order of the index.

    Raises:
        CxrdistError: a shard or a sample is not what the index says.
    """
    path = (directory or default_cache()) / f"{index.sha256[:32]}.npy"
    partial = path.with_suffix(".partial")
    part, num_parts = local_ranks(accelerator)
    show = accelerator.is_main_process
    together(accelerator, lambda: _verify(index, part, num_parts))
    ours = _is_ours(path.parent, accelerator)
    with _held(path.with_suffix(".lock"), hold=ours and part == 0):
        accelerator.wait_for_everyone()
        # What is missing may differ between nodes; each rank comes to each gathering all the same.
        missing = together(
            accelerator, lambda: ours and _reserve(index, path, partial, create=part == 0)
        )
        together(
            accelerator,
            lambda: _fill(index, partial, part, num_parts, show) if missing else None,
        )
        if missing and part == 0:
            os.replace(partial, path)
        accelerator.wait_for_everyone()
    return map_images(path)


def map_images(path: Path) -> Images:
    """Map an array file read-only; as a plain array, whose rows numpy gathers a quarter faster."""
    return np.asarray(np.load(path, mmap_mode="r"))


def default_cache() -> Path:
    """~/.cache/cxrdist, or where XDG_CACHE_HOME points."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cxrdist"


def _is_ours(directory: Path, accelerator: Accelerator) -> bool:
    """Whether this node fills the directory: of nodes that share one, such as a home, one does.

    The others neither write there nor look before it is full: they would wait for each other's
    lock, and a network file system remembers for a while that a file was not there.
    """
    part, _ = local_ranks(accelerator)
    mark = directory / f".{gather(accelerator, [secrets.token_hex(8)])[0]}.node"

    def create() -> bool:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            mark.touch(exist_ok=False)  # of several nodes one succeeds, on NFS as well
        except FileExistsError:
            return False
        return True

    created = together(accelerator, lambda: part == 0 and create())
    if created:
        mark.unlink()
    return gather(accelerator, [created])[accelerator.process_index - part]


@contextmanager
def _held(lock: Path, *, hold: bool) -> Iterator[None]:
    """Let one run of a node decode at a time; the system frees the lock of a killed one."""
    if not hold:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _verify(index: Index, part: int, num_parts: int) -> None:
    """Compare this rank's shards with the index; remote ones when they are fetched."""
    for shard in index.shards[part::num_parts]:
        path = index.directory / shard.name
        if isinstance(path, Path):
            verify_shard(path, shard, path)


def _reserve(index: Index, path: Path, partial: Path, *, create: bool) -> bool:
    """Whether images must be decoded; if so, the first rank of the node reserves the space."""
    if path.is_file():
        return False
    if create:
        shape = (len(index.samples), index.image_size_px, index.image_size_px)
        np.lib.format.open_memmap(partial, "w+", np.uint8, shape).flush()
        with open(partial, "r+b") as file:
            # A full disk is an error here, not a bus error in the middle of the decoding.
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    return True


def _fill(index: Index, partial: Path, part: int, num_parts: int, show: bool) -> None:
    rows = np.lib.format.open_memmap(partial, "r+")
    starts = np.cumsum([0, *(shard.samples for shard in index.shards)])
    mine = range(part, len(index.shards), num_parts)
    total = sum(index.shards[i].samples for i in mine)
    with progress(total, "decoding", "images", show=show) as bar:
        for i in mine:
            shard, start = index.shards[i], int(starts[i])
            expected = index.samples[start : start + shard.samples]
            path = index.directory / shard.name
            with local_copy(path) as here:
                if here is not path:
                    verify_shard(here, shard, path)
                for offset, (pixels, _) in enumerate(read_shard(here, expected, path)):
                    rows[start + offset] = pixels
                    bar.update()
    rows.flush()


def read_rows(images: Images, numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Bring some images to the device.

    Args:
        images: uint8 [samples, size, size], as `open_cache` gives.
        numbers: int64 [B], sample numbers.
        device: where they are needed; a copy to a GPU does not wait.

    Returns:
        uint8 [B, 1, size, size].
    """
    rows = torch.from_numpy(images[numbers]).unsqueeze(1)
    if device.type == "cuda":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows
