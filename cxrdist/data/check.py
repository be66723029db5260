"""Check: compare shards with their index."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import CheckConfig
from cxrdist.data.audit import Entry, audit, summary
from cxrdist.data.duplicates import find_duplicates
from cxrdist.data.fingerprint import fingerprint
from cxrdist.data.index import Index, PackedShard, inspect_index
from cxrdist.data.masks import describe_masks, masks_line
from cxrdist.data.shards import OpenShard, open_shard
from cxrdist.data.workers import SECONDS_PER_IMAGE, image_workers, in_order
from cxrdist.errors import CxrdistError
from cxrdist.files import scratch_directory, write_json
from cxrdist.terminal import progress


class Inspected(NamedTuple):
    """Result of the inspection of a shard."""

    faults: list[str]
    entries: list[Entry]
    """Its samples for an audit; empty if none is wanted."""
    mask_shares: list[float]
    """Share of the square that each of its masks covers."""


def check(config: CheckConfig) -> None:
    """Compare the whole content of shards with their index, and print every fault.

    These are sizes and hashes of the shards, each sample's pixels, mask, label, patient, source and
    path, the counts in index.json and samples.csv, and unlisted shards. With ``audit`` it also
    writes SHARDS/audit.json.

    Raises:
        CxrdistError: something differs.
    """
    index, faults = inspect_index(config.shards)
    with scratch_directory() as scratch:
        squares = _reserve(index, scratch) if config.audit else None
        inspected = _inspect_all(index, squares)
        faults += [fault for shard in inspected for fault in shard.faults]
        faults += _strangers(index)
        _refuse(config.shards, faults)
        samples, shards = len(index.samples), len(index.shards)
        print(f"{config.shards}: {samples} samples in {shards} shards match the index")
        if masks := describe_masks([share for shard in inspected for share in shard.mask_shares]):
            print(masks_line(masks, samples))
        if squares is not None:
            _audit(index, [entry for shard in inspected for entry in shard.entries], squares)


def _refuse(shards: Path, faults: list[str]) -> None:
    if len(faults) == 1:
        raise CxrdistError(faults[0])
    if faults:
        print(*faults, sep="\n")
        raise CxrdistError(f"{shards}: {len(faults)} faults, the first is {faults[0]}")


def _reserve(index: Index, scratch: Path) -> Path:
    """Create a file for the pixels of all samples, so that workers need not send them back."""
    shape = (len(index.samples), index.image_size_px, index.image_size_px)
    path = scratch / "squares.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with path.open("r+b") as file:  # a full disk is an error here, not a bus error in a worker
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return path


def _inspect_all(index: Index, squares: Path | None) -> list[Inspected]:
    """Inspect all shards; one that crashes or hangs its worker has that as its fault."""
    shards, inspected = index.packed(), list[Inspected]()
    seconds = SECONDS_PER_IMAGE * max([len(shard.samples) for shard in shards], default=1)
    inspect = partial(_inspect, squares=squares)
    with (
        image_workers(None, [__name__]) as pool,
        progress(len(index.samples), "checking", "images") as bar,
    ):
        for shard, made in zip(shards, in_order(pool, inspect, shards, 1, seconds), strict=True):
            one = made if isinstance(made, Inspected) else Inspected([str(made)], [], [])
            inspected.append(one)
            bar.update(len(shard.samples))
    return inspected


def _inspect(shard: PackedShard, squares: Path | None) -> Inspected:
    """Open a shard, then decode each of its samples; store their pixels in the file of squares."""
    try:
        with open_shard(shard) as opened:
            return _inspect_samples(shard, opened, squares)
    except OSError as error:  # `in_order` yields no other error: it would end the check
        raise CxrdistError(str(error)) from error


def _inspect_samples(shard: PackedShard, opened: OpenShard, squares: Path | None) -> Inspected:
    faults, entries, mask_shares = [], [], []
    rows = np.load(squares, mmap_mode="r+") if squares else None
    for i, sample in enumerate(shard.samples):
        try:
            pixels, description = opened.read(i)
            mask = opened.read_mask(i)
        except CxrdistError as error:
            faults.append(str(error))
            continue
        share = None if mask is None else float(np.mean(mask > 0))
        mask_shares += [] if share is None else [share]
        if rows is not None:
            rows[shard.first + i] = pixels
            # samples.csv of older versions has no view
            known = sample._replace(view=description["view"])
            size_px = description["width_px"], description["height_px"]
            entries.append(Entry(known, *size_px, fingerprint(pixels), share))
    return Inspected(faults, entries, mask_shares)


def _strangers(index: Index) -> Iterator[str]:
    known = {shard.name for shard in index.shards}
    # A client that is given *.tar would read it as well.
    for path in sorted(index.directory.glob("*.tar"), key=str):
        if path.name not in known:
            yield f"{path}: is not listed in index.json; remove it"


def _audit(index: Index, entries: list[Entry], squares: Path) -> None:
    """Audit the samples in the same order as `pack` does, so that audit.json is the same."""
    rows = np.load(squares, mmap_mode="r")
    # `pack` audits in the order of the records, which are sorted by path.
    order = sorted(range(len(entries)), key=lambda i: entries[i].sample.path)
    entries = [entries[i] for i in order]

    def pixels(i: int) -> NDArray[np.uint8]:
        return np.asarray(rows[order[i]])

    duplicates = find_duplicates([entry.fingerprint for entry in entries], pixels)
    audit_file = audit(entries, duplicates, pixels, index.classes, index.task)
    write_json(index.directory / "audit.json", audit_file)
    print(summary(audit_file))
    print(f"the audit is in {index.directory / 'audit.json'}")
