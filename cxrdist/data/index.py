"""The index of a directory of shards: what is in it, and the proof that it is still so."""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.records import SPLITS, labels_of
from cxrdist.errors import CxrdistError

FORMAT = "cxrdist-shards-1"
SAMPLE_COLUMNS = (
    *("key", "split", "shard", "label", "patient", "source", "path", "sha256", "sex", "age"),
)


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
    sex: str = ""
    """M, F, or empty where nothing tells."""
    age: str = ""
    """In years, or empty."""


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
        cover: how burned-in text was covered (how, split, images, boxes); empty if it was not.
        depth: bits by which images were scaled that do not declare their depth; None without such.
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
    cover: dict[str, Any]
    depth: int | None
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

    def totals(self) -> dict[str, dict[str, int]]:
        """Images and patients by split, those without a label too."""
        images = Counter(s.split for s in self.samples)
        patients = Counter(split for split, _ in {(s.split, s.patient) for s in self.samples})
        return {split: {"images": images[split], "patients": patients[split]} for split in SPLITS}


def read_index(directory: Path) -> Index:
    """Read index.json and samples.csv and make sure that they agree with each other.

    Raises:
        CxrdistError: a file is missing or malformed, the two disagree, or a patient is in two
            splits.
    """
    index, faults = inspect_index(directory)
    if faults:
        raise CxrdistError(faults[0])
    return index


def inspect_index(directory: Path) -> tuple[Index, list[str]]:
    """Read index.json and samples.csv and list all in which they disagree.

    Raises:
        CxrdistError: a file is missing or malformed.
    """
    path, table = directory / "index.json", directory / "samples.csv"
    if not path.is_file():
        raise CxrdistError(
            f"--shards {directory}: has no index.json; give a directory that `cxrdist pack` made"
        )
    if not table.is_file():
        raise CxrdistError(f"{table}: is missing; copy it again or pack the shards again")
    data, rows = path.read_bytes(), table.read_bytes()
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
            cover=dict(about.get("cover", {})),
            depth=about.get("depth"),
            shards=[ShardEntry(**e) for split in SPLITS for e in about["splits"][split]["shards"]],
            samples=[Sample(*row) for row in _read_rows(rows)][1:],
        )
        return index, [*_changes(table, rows, about), *_disagreements(index, about)]
    except (ValueError, KeyError, TypeError) as error:
        raise CxrdistError(
            f"{path}: no index of this version ({error!r:.120}); pack the shards again"
        ) from error


def _read_rows(table: bytes) -> Iterator[list[str]]:
    """Rows of a CSV; a name in it may hold what `str.splitlines` takes for the end of a line."""
    return csv.reader(io.StringIO(table.decode("utf-8"), newline=""))


def _changes(table: Path, rows: bytes, about: dict[str, Any]) -> list[str]:
    if hashlib.sha256(rows).hexdigest() == about["samples_sha256"]:
        return []
    return [
        f"{table}: was changed after packing (sha256 differs from index.json); "
        "copy it again or pack the shards again"
    ]


def _disagreements(index: Index, about: dict[str, Any]) -> list[str]:
    """In what samples.csv and index.json differ, and patients and keys that stand twice."""
    faults = []
    table = index.directory / "samples.csv"
    held = [sample.shard for sample in index.samples]
    expected = [shard.name for shard in index.shards for _ in range(shard.samples)]
    if held != expected:
        said, there = Counter(expected), Counter(held)
        names = [name for name in {**said, **there} if said[name] != there[name]] or ["a shard"]
        faults += [
            f"{table}: lists {there[name]} samples of {name}, index.json {said[name]}, or in "
            "another order; pack the shards again"
            for name in names
        ]
    unknown = sorted({x for s in index.samples for x in labels_of(s.label)} - {*index.classes})
    faults += [f"{table}: label {x!r} is no class of index.json" for x in unknown]
    counts = index.counts()
    for split, name in ((split, name) for split in SPLITS for name in index.classes):
        number, images = about["splits"][split]["classes"][name], counts[split][name]["images"]
        if number != images:
            faults.append(f"{table}: has {images} images of {name} in {split}, index.json {number}")
    keys = Counter(sample.key for sample in index.samples)
    faults += [f"{table}: key {key} stands in {n} rows" for key, n in keys.items() if n > 1]
    home: dict[str, str] = {}
    for sample in index.samples:
        if home.setdefault(sample.patient, sample.split) != sample.split:
            faults.append(f"{table}: patient {sample.patient} is in two splits; pack again")
    return list(dict.fromkeys(faults))
