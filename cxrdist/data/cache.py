"""The decoded cache: all samples as one memory-mapped uint8 array on local disk.

The masks are in a second file, which is written when they are first needed.
"""

import hashlib
import io
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.index import Index, PackedShard
from cxrdist.data.shards import open_shard, read_shard
from cxrdist.distributed import entering, gather, local_ranks, together
from cxrdist.errors import CxrdistError
from cxrdist.files import open_regular, room_for, waiting_lock
from cxrdist.terminal import progress

Images = NDArray[np.uint8]
Masks = NDArray[np.uint8]
MISSING = "is missing"
OTHER_PLACE = "choose a directory with room on a local disk with --cache"
MARK = re.compile(r"\.[0-9a-f]{16}\.node")
OLD_MARK = 24 * 60 * 60  # seconds; no run waits that long for its nodes
NUM_THREADS = 8  # per rank; all of them read from memory or one disk


@dataclass(frozen=True)
class Layer:
    """Description of a cache file: one uint8 array with a row per sample."""

    noun: str
    """What the rows are, for messages."""
    suffix: str
    """End of the file's name."""
    index: Index
    row_shape: tuple[int, ...]
    sha256: Sequence[str]
    """Expected `digest` of each row, by sample number."""
    digest: Callable[[NDArray[np.uint8]], str]
    decode: Callable[[PackedShard], Iterator[NDArray[np.uint8]]]
    """Yields the rows of a shard."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return len(self.index.samples), *self.row_shape

    def header(self) -> bytes:
        """Return the expected header of the array file.

        An existing file's header is compared with it, so that no untrusted header is parsed.
        """
        header = io.BytesIO()
        description = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(header, description)
        return header.getvalue()

    def num_bytes(self) -> int:
        """Return the size of the array file."""
        return len(self.header()) + math.prod(self.shape)


def _images_of(index: Index) -> Layer:
    return Layer(
        noun="images",
        suffix=".npy",
        index=index,
        row_shape=(index.image_size_px, index.image_size_px),
        sha256=[sample.sha256 for sample in index.samples],
        digest=lambda row: hashlib.sha256(row.data).hexdigest(),
        decode=lambda shard: (pixels for pixels, _ in read_shard(shard)),
    )


def _masks_of(index: Index) -> Layer:
    """Describe the cache of masks: one bit per pixel, zeros for a sample without a mask.

    A mask takes an eighth of its image's disk and memory, and 10 us to unpack.
    """
    num_pixels = index.image_size_px**2
    empty = np.zeros(-(-num_pixels // 8), np.uint8)

    def digest(row: NDArray[np.uint8]) -> str:
        # The hash covers the pixels only; a set padding bit after the last one is a fault too.
        mask = np.unpackbits(row) * np.uint8(255)
        whole = not mask[num_pixels:].any()
        return hashlib.sha256(mask[:num_pixels].data).hexdigest() if whole else ""

    def decode(shard: PackedShard) -> Iterator[NDArray[np.uint8]]:
        with open_shard(shard) as opened:
            for number in range(len(shard.samples)):
                mask = opened.read_mask(number)
                yield empty if mask is None else np.packbits(mask > 0)

    without = digest(empty)
    return Layer(
        noun="masks",
        suffix=".masks.npy",
        index=index,
        row_shape=empty.shape,
        sha256=[sample.mask_sha256 or without for sample in index.samples],
        digest=digest,
        decode=decode,
    )


class Checked(NamedTuple):
    """Result of comparing a cache file of this node with the index."""

    images: Images | None
    """The array; None if the file cannot be used at all."""
    stale: set[int]
    """Numbers of the shards that must be decoded."""
    fault: str
    """What is wrong with the file; empty if nothing is, or if it was not compared."""


def open_cache(index: Index, directory: Path | None, accelerator: Accelerator) -> Images:
    """Map all images of the shards, decoding those that the cache of this node lacks.

    Each call compares the shards with their index, and each decoded sample and each row of an
    existing cache with its hash. Shards with a differing row are decoded again, and the main rank
    prints a line about it.

    The directory is on local disk, `default_cache` if None. The ranks of a node share the decoding.

    Returns:
        uint8 [samples, size, size], read-only, in the order of the index.

    Raises:
        CxrdistError: a shard or a sample differs from the index, a link or another special file
            has the name of a cache file, or the cache differs on a node that may not repair it.
    """
    local_rank, num_local = local_ranks(accelerator)
    together(accelerator, lambda: _verify(index, local_rank, num_local))
    return _open(_images_of(index), directory, accelerator)


def open_masks(index: Index, directory: Path | None, accelerator: Accelerator) -> Masks:
    """Map the masks of all samples as `open_cache` maps the images; call `open_cache` first.

    Returns:
        uint8 [samples, ceil(size * size / 8)], read-only: the pixels of each mask as bits, as
        `numpy.packbits` returns them; zeros without a mask (``mask_sha256`` is empty).
    """
    return _open(_masks_of(index), directory, accelerator)


def _open(layer: Layer, directory: Path | None, accelerator: Accelerator) -> NDArray[np.uint8]:
    path = (directory or default_cache()) / f"{layer.index.sha256[:32]}{layer.suffix}"
    local_rank, _ = local_ranks(accelerator)
    ours = _is_ours(path.parent, accelerator)
    lock = waiting_lock(path.with_suffix(".lock"))  # one run per node decodes at a time
    with entering(accelerator, lock, here=ours and local_rank == 0):
        cached = _check(layer, path, accelerator, look=ours)
        _report(path, cached, accelerator)
        _rebuild(layer, path, cached, accelerator)
        # Files written just now, or by another node, are checked before they are used.
        unchecked = not ours or bool(cached.fault)
        latest = _check(layer, path, accelerator, look=unchecked)
    return together(accelerator, lambda: _accept(path, latest if unchecked else cached))


def default_cache() -> Path:
    """Return ~/.cache/cxrdist, or cxrdist in XDG_CACHE_HOME.

    Raises:
        CxrdistError: the user has no home directory.
    """
    if where := os.environ.get("XDG_CACHE_HOME"):
        return Path(where) / "cxrdist"
    try:
        return Path("~/.cache/cxrdist").expanduser()
    except RuntimeError as error:
        raise CxrdistError(f"~/.cache/cxrdist: {error}; {OTHER_PLACE}") from error


def _is_ours(directory: Path, accelerator: Accelerator) -> bool:
    """Return whether this node fills the directory; of nodes that share one, exactly one does.

    The others neither write nor look until it is full: they would wait for each other's locks, and
    a network file system caches for a while that a file did not exist.
    """
    local_rank, _ = local_ranks(accelerator)
    # Drawn by rank 0 for all ranks, so that the mark of a killed run or of another does not count.
    mark = directory / f".{gather(accelerator, [secrets.token_hex(8)])[0]}.node"

    def create() -> bool:
        with room_for(mark, OTHER_PLACE):
            directory.mkdir(parents=True, exist_ok=True)
            _remove_old_marks(directory)
            try:
                mark.touch(exist_ok=False)  # exactly one of several nodes succeeds, also on NFS
            except FileExistsError:
                return False
        return True

    created = together(accelerator, lambda: local_rank == 0 and create())
    # `together` has waited for all nodes: removed earlier, a slower node could create it again.
    if created:
        mark.unlink()
    # Ranks of a node are numbered consecutively: this is the answer of its first one.
    return gather(accelerator, [created])[accelerator.process_index - local_rank]


def _remove_old_marks(directory: Path) -> None:
    """Remove the marks that killed runs have left."""
    for mark in directory.glob(".*.node"):
        with suppress(OSError):  # it is removed by another run, or is of another user
            if MARK.fullmatch(mark.name) and time.time() - mark.lstat().st_mtime > OLD_MARK:
                mark.unlink()


def _verify(index: Index, local_rank: int, num_local: int) -> None:
    """Compare this rank's shards with the index; remote ones are compared when fetched."""
    for shard in index.packed()[local_rank::num_local]:
        if isinstance(shard.file, Path):
            with open_shard(shard):
                pass


def _check(layer: Layer, path: Path, accelerator: Accelerator, *, look: bool) -> Checked:
    """Compare the cache with the index, each rank some of its rows; must be called on every rank.

    ``look`` says whether this node compares; it is the same on all ranks of the node.
    """
    local_rank, num_local = local_ranks(accelerator)
    images, fault = together(accelerator, lambda: _load(layer, path) if look else (None, ""))
    differing = together(accelerator, lambda: _differing(layer, images, local_rank, num_local))
    first = accelerator.process_index - local_rank
    node = gather(accelerator, [(fault, differing)])[first : first + num_local]
    if faults := [fault for fault, _ in node if fault]:
        return Checked(None, set(range(len(layer.index.shards))), faults[0])
    numbers = [number for _, differing in node for number in differing]
    if not numbers:
        return Checked(images, set(), "")
    ends = np.cumsum([shard.samples for shard in layer.index.shards])
    stale = set(np.searchsorted(ends, numbers, side="right").tolist())
    fault = f"{len(numbers)} of {layer.shape[0]} {layer.noun} differ from the index"
    return Checked(images, stale, fault)


def _load(layer: Layer, path: Path) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the mapped array and an empty text, or None and what is wrong with the file."""
    try:
        file = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return None, MISSING
    with file:
        size, expected = os.fstat(file.fileno()).st_size, layer.num_bytes()
        if size != expected:  # reading beyond the end of a mapped file is a bus error
            return None, f"has {size} bytes, expected {expected}"
        header = layer.header()
        if file.read(len(header)) != header:
            shape = " x ".join(map(str, layer.shape))
            return None, f"does not begin like an array of {shape} bytes"
        # The map that is checked is the one that is used: it keeps this file even if another run
        # gives its name to a new one. numpy gathers rows of a plain array a quarter faster.
        return np.asarray(np.memmap(file, np.uint8, "r", len(header), layer.shape)), ""


def _differing(
    layer: Layer, images: NDArray[np.uint8] | None, local_rank: int, num_local: int
) -> list[int]:
    """Return the samples of this rank whose rows differ from their sha256 in samples.csv.

    112,120 rows of 224 px take 4 s on a core with SHA instructions and 14 s on one without.
    """
    if images is None:
        return []
    count = len(images)

    def differing(numbers: range) -> list[int]:
        return [i for i in numbers if layer.digest(images[i]) != layer.sha256[i]]

    numbers = range(count * local_rank // num_local, count * (local_rank + 1) // num_local)
    blocks = [numbers[i : i + 256] for i in range(0, len(numbers), 256)]
    cores = len(os.sched_getaffinity(0)) // num_local
    # Threads are enough: hashlib releases the GIL for more than 2047 bytes.
    with ThreadPoolExecutor(max(1, min(NUM_THREADS, cores))) as pool:
        return [i for block in pool.map(differing, blocks) for i in block]


def _report(path: Path, cached: Checked, accelerator: Accelerator) -> None:
    """Print on the main rank what is wrong with the caches of all nodes."""
    damaged = cached.fault not in ("", MISSING)
    line = f"cache {path}: {cached.fault}; decoding again"
    lines = dict.fromkeys(gather(accelerator, [line] if damaged else []))
    if accelerator.is_main_process:  # Accelerator.print would repeat them on every node
        for text in lines:
            print(text, flush=True)


def _rebuild(layer: Layer, path: Path, cached: Checked, accelerator: Accelerator) -> None:
    """Replace a faulty cache; must be called on every rank.

    The old file is replaced, never written to: other runs may have mapped it.
    """
    local_rank, _ = local_ranks(accelerator)
    # The name has no process ID: all ranks of the node write into this file, under the lock.
    partial = path.with_suffix(".partial")
    first = cached.fault and local_rank == 0
    # All ranks finish a step before the next one begins: none fills a file that is not reserved
    # yet, and the file gets its name when all have filled it.
    together(accelerator, lambda: _reserve(layer, partial) if first else None)
    together(
        accelerator, lambda: _fill(layer, partial, cached, accelerator) if cached.fault else None
    )
    together(accelerator, lambda: os.replace(partial, path) if first else None)


def _reserve(layer: Layer, partial: Path) -> None:
    """Create the new cache at its full size; it is an error if there is no room for it."""
    with room_for(partial, OTHER_PLACE):
        partial.unlink(missing_ok=True)  # left by a killed run, or a link, which is never followed
        with open_regular(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            file.write(layer.header())
            # A full disk is an error here, not a bus error in the middle of the decoding.
            os.posix_fallocate(file.fileno(), 0, layer.num_bytes())


def _fill(layer: Layer, partial: Path, cached: Checked, accelerator: Accelerator) -> None:
    """Write this rank's shards into the new cache: decode stale ones, copy the others."""
    local_rank, num_local = local_ranks(accelerator)
    with open_regular(partial, os.O_RDWR) as file:
        # The map has a descriptor of its own, so the file may be closed.
        rows = np.memmap(file, np.uint8, "r+", len(layer.header()), layer.shape)
    shards = list(enumerate(layer.index.packed()))[local_rank::num_local]
    total = sum(shard.entry.samples for i, shard in shards if i in cached.stale)
    with progress(total, "decoding", layer.noun, show=accelerator.is_main_process) as bar:
        for i, shard in shards:
            if cached.images is not None and i not in cached.stale:
                these = slice(shard.first, shard.first + shard.entry.samples)
                rows[these] = cached.images[these]
                continue
            for number, row in enumerate(layer.decode(shard), shard.first):
                rows[number] = row
                bar.update()
    rows.flush()


def _accept(path: Path, checked: Checked) -> NDArray[np.uint8]:
    """Return the array of a cache; it is an error if the cache has a fault."""
    if checked.images is None or checked.fault:
        raise CxrdistError(
            f"{path}: {checked.fault}, though it was just written or checked; run the same "
            "command again, or choose a directory on a local disk with --cache"
        )
    return checked.images


class Squares(Protocol):
    """Squares by sample number: images of `open_cache`, or squares derived from them."""

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the squares of some samples, uint8 [B, size, size]."""


def read_rows(images: Squares, numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy images to the device by their sample numbers, int64 [B]; to a GPU asynchronously.

    They are returned as uint8 [B, 1, size, size].
    """
    # Indexing with an array copies: a tensor must not alias the read-only map.
    rows = torch.from_numpy(images[numbers]).unsqueeze(1)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def unpack_masks(rows: Masks, size_px: int) -> NDArray[np.uint8]:
    """Unpack some rows of `open_masks` to uint8 [B, size, size] of 0 and 1."""
    bits = np.unpackbits(rows, axis=1, count=size_px * size_px)
    return bits.reshape(-1, size_px, size_px)
