"""Derived shards: the images of other shards, each changed in the same way."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.images import encode_png
from cxrdist.data.index import (
    SAMPLE_COLUMNS,
    Index,
    IndexFile,
    PackedShard,
    Sample,
    ShardEntry,
    describe_splits,
    shard_name,
)
from cxrdist.data.shards import SampleFile, describe_shard, open_shard, write_shard
from cxrdist.files import sha256_of, write_json, write_table
from cxrdist.terminal import progress


class PackedSample(NamedTuple):
    """A sample of the shards that others are derived from."""

    number: int
    pixels: NDArray[np.uint8]
    """uint8 [size, size]."""
    mask: NDArray[np.uint8] | None
    """uint8 [size, size] of 0 and 255; None without."""
    facts: SampleFile
    """Content of its KEY.json."""


# One square per derived set, all of the same size; None leaves the sample out.
Change = Callable[[PackedSample], Sequence[NDArray[np.uint8]] | None]


def derive_shards(
    index: Index, directories: Sequence[Path], size_px: int, change: Change
) -> list[int]:
    """Write sets of shards with the samples, labels and splits of existing shards.

    Masks and boxes of findings are not written, since they fit squares of the original size. Each
    set has a directory, which must exist and be empty; ``change`` returns a square of ``size_px``
    for each set. The numbers of the samples that were left out are returned.

    Raises:
        CxrdistError: the shards differ from their index.
    """
    samples: list[list[Sample]] = [[] for _ in directories]
    entries: list[list[ShardEntry]] = [[] for _ in directories]
    written, left_out = Counter[str](), list[int]()
    with progress(len(index.samples), "changing", "images") as bar:
        for shard in index.packed():
            rows: list[list[tuple[Sample, SampleFile, bytes]]] = [[] for _ in directories]
            split = shard.samples[0].split
            name = shard_name(split, written[split])
            for packed in _packed_samples(shard):
                squares = change(packed)
                if squares is None:
                    left_out.append(packed.number)
                for row, square in zip(rows, squares or (), strict=squares is not None):
                    row.append(_derive(index.samples[packed.number], name, packed, square))
                bar.update()
            # Readers refuse empty shards and gaps in numbers: the next shard takes this number.
            if not rows[0]:
                continue
            written[split] += 1
            for directory, row, own, known in zip(directories, rows, samples, entries, strict=True):
                write_shard(directory / name, ((facts, png, b"") for _, facts, png in row))
                own += [sample for sample, _, _ in row]
                known.append(describe_shard(directory / name, len(row)))
    for directory, own, known in zip(directories, samples, entries, strict=True):
        _write_index(directory, index, size_px, own, known)
    return left_out


def _packed_samples(shard: PackedShard) -> Iterator[PackedSample]:
    with open_shard(shard) as opened:
        for i in range(len(shard.samples)):
            pixels, facts = opened.read(i)
            yield PackedSample(shard.first + i, pixels, opened.read_mask(i), facts)


def _derive(
    sample: Sample, shard: str, packed: PackedSample, square: NDArray[np.uint8]
) -> tuple[Sample, SampleFile, bytes]:
    """Return the row of samples.csv, the content of KEY.json, and the PNG of a derived sample."""
    facts = packed.facts.copy()
    facts.pop("boxes", None)
    digest = hashlib.sha256(square.tobytes()).hexdigest()
    row = sample._replace(shard=shard, sha256=digest, mask_sha256="")
    return row, facts, encode_png(square)


def _write_index(
    directory: Path, index: Index, size_px: int, samples: list[Sample], entries: list[ShardEntry]
) -> None:
    """Write samples.csv, then index.json."""
    table = directory / "samples.csv"
    write_table(table, SAMPLE_COLUMNS, samples)
    content: IndexFile = {
        "format": "cxrdist-shards-1",
        "task": index.task,
        "classes": index.classes,
        "image_size_px": size_px,
        "fit": index.fit,
        "split": index.split,
        "samples_sha256": sha256_of(table),
        "splits": describe_splits(index.classes, samples, entries),
        "cover": index.cover,
        "depth": index.depth,
    }
    write_json(directory / "index.json", content)
