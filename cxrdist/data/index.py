"""The index of a directory of shards: what is in it, and the proof that it is still so."""

import csv
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import CheckConfig
from cxrdist.data.records import SPLITS, labels_of
from cxrdist.errors import CxrdistError
from cxrdist.terminal import progress

FORMAT = "cxrdist-shards-1"
SAMPLE_COLUMNS = ("key", "split", "shard", "label", "patient", "source", "path", "sha256")


class Sample(NamedTuple):
    """One image in a shard; the columns of samples.csv."""

    key: str
    split: str
    shard: str
    label: str
    patient: str
    source: str
    path: str
    sha256: str


class ShardEntry(NamedTuple):
    """What the index says of a shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A directory of shards as index.json and samples.csv describe it.

    Attributes:
        directory: where the shards are, local or an fsspec path.
        sha256: of index.json; since that holds the hashes of all else, it names the whole content.
        task: multiclass (each sample has one label) or multilabel (any number).
        classes: class names; their order is the order of labels and logits.
        image_size_px: side of the squares.
        fit: how the images became square.
        split: how the splits were drawn.
        shards: all shards, in the order of the samples.
        samples: all samples; their place in this list is their sample number.
    """

    directory: Path
    sha256: str
    task: str
    classes: list[str]
    image_size_px: int
    fit: str
    split: str
    shards: list[ShardEntry]
    samples: list[Sample]

    def numbers(self, split: str) -> list[int]:
        """Sample numbers of a split, ascending."""
        return [i for i, sample in enumerate(self.samples) if sample.split == split]

    def targets(self) -> NDArray[np.uint8]:
        """The truth: uint8 [samples, classes], 1 where a sample has the label."""
        place = {name: i for i, name in enumerate(self.classes)}
        targets = np.zeros((len(self.samples), len(self.classes)), np.uint8)
        for row, sample in zip(targets, self.samples, strict=True):
            row[[place[name] for name in labels_of(sample.label)]] = 1
        return targets

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Images and patients by split and class; an image of two labels counts for both."""
        rows = [(s.split, label, s.patient) for s in self.samples for label in labels_of(s.label)]
        images = Counter((split, label) for split, label, _ in rows)
        patients = Counter((split, label) for split, label, _ in set(rows))
        return {
            split: {
                name: {"images": images[split, name], "patients": patients[split, name]}
                for name in self.classes
            }
            for split in SPLITS
        }


def read_index(directory: Path) -> Index:
    """Read index.json and samples.csv and check that they agree with each other.

    Raises:
        CxrdistError: a file is missing or malformed, the two disagree, or a patient is in two
            splits.
    """
    path = directory / "index.json"
    if not path.is_file():
        raise CxrdistError(
            f"--shards {directory}: has no index.json; give a directory that `cxrdist pack` made"
        )
    data = path.read_bytes()
    try:
        about: dict[str, Any] = json.loads(data)
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']!r}, expected {FORMAT!r}")
        index = Index(
            directory=directory,
            sha256=hashlib.sha256(data).hexdigest(),
            task=str(about["task"]),
            classes=list(about["classes"]),
            image_size_px=int(about["image_size_px"]),
            fit=str(about["fit"]),
            split=str(about["split"]),
            shards=[ShardEntry(**e) for split in SPLITS for e in about["splits"][split]["shards"]],
            samples=_read_samples(directory / "samples.csv", about["samples_sha256"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CxrdistError):
            raise
        raise CxrdistError(
            f"{path}: no index of this version ({error!r:.120}); pack the shards again"
        ) from error
    _refuse_disagreement(index)
    return index


def _read_samples(path: Path, expected_sha256: str) -> list[Sample]:
    if not path.is_file():
        raise CxrdistError(f"{path}: is missing; copy it again or pack the shards again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected_sha256:
        raise CxrdistError(
            f"{path}: was changed after packing (sha256 differs from index.json); "
            "copy it again or pack the shards again"
        )
    rows = csv.reader(data.decode("utf-8").splitlines())
    next(rows)
    return [Sample(*row) for row in rows]


def _refuse_disagreement(index: Index) -> None:
    held = Counter(sample.shard for sample in index.samples)
    for shard in index.shards:
        if held[shard.name] != shard.samples:
            raise CxrdistError(
                f"{index.directory / 'samples.csv'}: lists {held[shard.name]} samples of "
                f"{shard.name}, index.json {shard.samples}; pack the shards again"
            )
    home: dict[str, str] = {}
    for sample in index.samples:
        if home.setdefault(sample.patient, sample.split) != sample.split:
            raise CxrdistError(
                f"{index.directory}: patient {sample.patient} is in two splits; pack again"
            )


def verify_shard(directory: Path, shard: ShardEntry) -> None:
    """Compare a shard's size and sha256 with the index.

    Raises:
        CxrdistError: it is missing or differs.
    """
    path = directory / shard.name
    if not path.is_file():
        raise CxrdistError(f"{path}: the shard is missing; copy it again or pack the shards again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CxrdistError(
            f"{path}: the shard has {size} bytes, the index says {shard.bytes}; "
            "copy it again or pack the shards again"
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise CxrdistError(
            f"{path}: the shard's content differs from the index (sha256); "
            "copy it again or pack the shards again"
        )


def check(config: CheckConfig) -> None:
    """Check each shard of a directory against its index.

    Raises:
        CxrdistError: something differs.
    """
    index = read_index(config.shards)
    with progress(len(index.shards), "checking", "shards") as bar:
        for shard in index.shards:
            verify_shard(index.directory, shard)
            bar.update()
    print(f"{config.shards}: {len(index.samples)} samples in {len(index.shards)} shards are whole")
