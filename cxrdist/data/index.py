"""The index of a directory of shards: its content, with hashes to detect any change."""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from cxrdist.config import CoverHow, CoverSplit, Depth, Fit
from cxrdist.data.collector import collector_paused
from cxrdist.data.labels import MISSING, NOT_STATED, POSITIVE, UNCERTAIN, label_matrix, labels_of
from cxrdist.data.masks import MasksEntry
from cxrdist.data.records import SPLITS
from cxrdist.data.views import UNKNOWN, VIEWS
from cxrdist.documents import CONTROL, Between, Distinct, Matching, Sha256, Text, parse_json, typed
from cxrdist.errors import CxrdistError
from cxrdist.files import judging, read_bytes
from cxrdist.info import Amount, LabelAmount, Task

MEND = "copy it again or pack the shards again"
MOST_CLASSES = 1000  # ImageNet's; the longest list of findings, PadChest's, has 189
MOST_SIDE_PX = 4500  # of a square; the largest detectors have 4302 px (43 cm at 0.1 mm)
MOST_SAMPLES = 10_000_000  # all public chest X-rays together are 2 million
MOST_SHARDS = 1_000_000  # per split: a name has six digits
MOST_SHARD_BYTES = 1 << 40
MOST_INDEX_BYTES = 8 << 20  # of index.json, which has 200 bytes per shard
MOST_LINE_CHARACTERS = 1 << 16  # of samples.csv; a path has at most 4096 bytes
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with its suffix it fits a tar's 100 bytes for a name
SHA256 = re.compile(r"[0-9a-f]{64}")
SidePx = Annotated[int, Between(1, MOST_SIDE_PX)]
Count = Annotated[int, Between(0, MOST_SAMPLES)]
MOST_NAME = 255  # characters of a class
ClassName = Annotated[
    str,
    Matching(
        rf"[^|{CONTROL}\ud800-\udfff]{{1,{MOST_NAME}}}",
        f"1 to {MOST_NAME} characters without | and without control characters",
    ),
]
Classes = Annotated[list[ClassName], Between(1, MOST_CLASSES), Distinct()]


class Sample(NamedTuple):
    """One image in a shard; the columns of samples.csv, as in `Record`, empty if unknown."""

    key: str
    split: str
    shard: str
    label: str
    patient: str
    source: str
    path: str
    sha256: str
    sex: str = ""
    age: str = ""
    view: str = ""
    uncertain: str = ""
    missing: str = ""
    assumed_absent: str = ""
    mask_sha256: str = ""
    """Hash of the mask's pixels, rows from the top, one byte of 0 or 255 each; empty without."""


SAMPLE_COLUMNS = Sample._fields
NUM_COLUMNS = (8, 10, len(SAMPLE_COLUMNS))  # of the versions so far


@dataclass(frozen=True)
class ShardEntry:
    """Entry of a shard in index.json."""

    name: str
    samples: Annotated[int, Between(1, MOST_SAMPLES)]
    bytes: Annotated[int, Between(1, MOST_SHARD_BYTES)]
    sha256: Sha256


class SplitEntry(TypedDict):
    """Entry of a split in index.json."""

    samples: NotRequired[Count]
    classes: dict[str, Count]
    """Images per class; an image with two labels counts for both."""
    shards: Annotated[list[ShardEntry], Between(0, MOST_SHARDS)]


class CoverEntry(TypedDict):
    """How burned-in text was covered."""

    how: CoverHow
    split: CoverSplit
    images: Count
    boxes: Annotated[int, Between(0, 1000 * MOST_SAMPLES)]


class IndexFile(TypedDict):
    """The content of index.json."""

    format: Literal["cxrdist-shards-1"]
    task: Task
    classes: Classes
    image_size_px: SidePx
    fit: Fit
    split: Text
    """How the splits were drawn."""
    seed: NotRequired[int]
    samples_sha256: Sha256
    splits: dict[str, SplitEntry]
    depth: NotRequired[Depth | None]
    """Bit depth assumed for images that do not declare theirs."""
    masks: NotRequired[MasksEntry]
    """Only where images have a mask."""
    cover: NotRequired[CoverEntry | None]
    lungs_only: NotRequired[bool]
    """Whether everything outside the masks is black; false if missing."""


class PackedShard(NamedTuple):
    """A shard with everything needed to read it."""

    file: Path
    """Local or an fsspec path."""
    entry: ShardEntry
    samples: list[Sample]
    first: int
    """Sample number of its first sample."""
    size_px: int
    """Side of the squares."""


@dataclass(frozen=True)
class Index:
    """A directory of shards as index.json (`IndexFile`) and samples.csv describe it."""

    directory: Path
    """Local or an fsspec path."""
    sha256: str
    """Of index.json; since that holds all other hashes, it identifies the whole content."""
    task: Task
    """Whether each sample has one label (multiclass) or any number (multilabel)."""
    classes: list[str]
    """In the order of labels and logits."""
    image_size_px: int
    """Side of the squares."""
    fit: Fit
    split: str
    cover: CoverEntry | None
    """None if burned-in text was not covered."""
    depth: int | None
    """None if all images declare their depth."""
    shards: list[ShardEntry]
    """In the order of the samples."""
    samples: list[Sample]
    """A sample number is a position in this list."""
    lungs_only: bool = False

    def numbers(self, split: str) -> list[int]:
        """Return the sample numbers of a split, ascending."""
        return [i for i, sample in enumerate(self.samples) if sample.split == split]

    def packed(self) -> list[PackedShard]:
        """Return all shards, each with its samples."""
        ends = accumulate(shard.samples for shard in self.shards)
        return [
            PackedShard(
                file=self.directory / entry.name,
                entry=entry,
                samples=self.samples[end - entry.samples : end],
                first=end - entry.samples,
                size_px=self.image_size_px,
            )
            for entry, end in zip(self.shards, ends, strict=True)
        ]

    def targets(self) -> NDArray[np.int8]:
        """Return the labels of all samples as `targets_of` does, int8 [samples, classes]."""
        return targets_of(self.samples, self.classes)

    def counts(self) -> dict[str, dict[str, LabelAmount]]:
        """Count images and patients per split and class; an image of two labels counts for both."""
        rows = [(s.split, label, s.patient) for s in self.samples for label in labels_of(s.label)]
        images = Counter((split, label) for split, label, _ in rows)
        patients = Counter((split, label) for split, label, _ in set(rows))
        cells = ((s.split, what, getattr(s, what)) for s in self.samples for what in NOT_STATED)
        not_stated: Counter[tuple[str, str, str]] = Counter()
        for (split, what, text), times in Counter(cells).items():
            for label in labels_of(text):
                not_stated[split, label, what] += times
        return {
            split: {
                name: {
                    "images": images[split, name],
                    "patients": patients[split, name],
                    "uncertain": not_stated[split, name, "uncertain"],
                    "missing": not_stated[split, name, "missing"],
                    "assumed_absent": not_stated[split, name, "assumed_absent"],
                }
                for name in self.classes
            }
            for split in SPLITS
        }

    def totals(self) -> dict[str, Amount]:
        """Count images and patients per split, including those without a label."""
        images = Counter(s.split for s in self.samples)
        patients = Counter(split for split, _ in {(s.split, s.patient) for s in self.samples})
        return {split: {"images": images[split], "patients": patients[split]} for split in SPLITS}


def targets_of(samples: Sequence[Sample], classes: Sequence[str]) -> NDArray[np.int8]:
    """Return the labels of samples, int8 [samples, classes].

    Codes are those of `cxrdist.data.labels`; below 0, which only multilabel shards have, a label is
    not known.
    """
    columns = {
        POSITIVE: [sample.label for sample in samples],
        UNCERTAIN: [sample.uncertain for sample in samples],
        MISSING: [sample.missing for sample in samples],
    }
    return label_matrix(columns, classes)


def read_index(directory: Path) -> Index:
    """Read index.json and samples.csv and check that they agree with each other.

    Raises:
        CxrdistError: a file is missing or malformed, the two disagree, or a patient is in two
            splits.
    """
    index, faults = inspect_index(directory)
    if faults:
        raise CxrdistError(faults[0])
    return index


@collector_paused()
def inspect_index(directory: Path) -> tuple[Index, list[str]]:
    """Read index.json and samples.csv and list every disagreement between them.

    Raises:
        CxrdistError: a file is missing, malformed, or exceeds a limit.
    """
    path, table = directory / "index.json", directory / "samples.csv"
    if not path.is_file():
        raise CxrdistError(
            f"--shards {directory}: has no index.json; give a directory that `cxrdist pack` made"
        )
    if not table.is_file():
        raise CxrdistError(f"{table}: is missing; {MEND}")
    with judging(path, MEND):
        data = read_bytes(path.resolve(), MOST_INDEX_BYTES)  # a data set may be made of links
        content = typed(parse_json(data), IndexFile)
        shards = _shards_of(content)
    sha256, samples = _read_samples(table, shards)
    index = Index(
        directory=directory,
        sha256=hashlib.sha256(data).hexdigest(),
        task=content["task"],
        classes=content["classes"],
        image_size_px=content["image_size_px"],
        fit=content["fit"],
        split=content["split"],
        cover=content.get("cover"),
        depth=content.get("depth"),
        shards=shards,
        samples=samples,
        lungs_only=content.get("lungs_only", False),
    )
    faults = []
    if sha256 != content["samples_sha256"]:
        faults = [f"{table}: was changed after packing (sha256 differs from index.json); {MEND}"]
    declared = content.get("masks", {"images": 0})["images"]
    held = sum(sample.mask_sha256 != "" for sample in samples)
    if held != declared:
        faults.append(f"{table}: has {held} masks, index.json says {declared}; {MEND}")
    return index, [*faults, *_disagreements(index, content["splits"])]


def _shards_of(content: IndexFile) -> list[ShardEntry]:
    """Return all shards, checking that each has the name that pack gives it.

    A name from untrusted JSON could otherwise lead out of the directory. A missing split and too
    many samples are errors too.
    """
    shards = []
    for split in SPLITS:
        if split not in content["splits"]:
            raise ValueError(f"splits.{split}: is missing")
        entries = content["splits"][split]["shards"]
        for number, entry in enumerate(entries):
            if entry.name != (expected := shard_name(split, number)):
                raise ValueError(f"names the shard {entry.name!r:.80}, expected {expected}")
        shards += entries
    if not 1 <= (total := sum(shard.samples for shard in shards)) <= MOST_SAMPLES:
        raise ValueError(f"has {total} samples in its shards, expected 1 to {MOST_SAMPLES}")
    return shards


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard, SPLIT-000000.tar."""
    return f"{split}-{number:06d}.tar"


def describe_splits(
    classes: Sequence[str], samples: Sequence[Sample], shards: Sequence[ShardEntry]
) -> dict[str, SplitEntry]:
    """Return the entries of the splits in index.json."""
    splits: dict[str, SplitEntry] = {}
    for split in SPLITS:
        own = [sample for sample in samples if sample.split == split]
        labels = Counter(name for sample in own for name in labels_of(sample.label))
        splits[split] = {
            "samples": len(own),
            "classes": {name: labels[name] for name in classes},
            "shards": [shard for shard in shards if shard.name.startswith(f"{split}-")],
        }
    return splits


def _read_samples(table: Path, shards: list[ShardEntry]) -> tuple[str, list[Sample]]:
    """Return the sha256 and the rows of samples.csv, at most as many as the index names."""
    most = sum(shard.samples for shard in shards)
    try:
        with table.open("rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            rows = csv.reader(_lines(text))
            header = next(rows, [])
            # The newest version that fits: further columns are of a later one, and are ignored.
            fits = (n for n in reversed(NUM_COLUMNS) if header[:n] == [*SAMPLE_COLUMNS[:n]])
            if not (known := next(fits, 0)):
                raise ValueError(f"expected the columns {', '.join(SAMPLE_COLUMNS)}")
            samples = [_read_sample(row, header, known) for row in islice(rows, most)]
            if next(rows, None) is not None:
                raise ValueError(f"has more rows than the {most} samples of index.json")
            # The hash of the same open file, so that what is compared is what was parsed.
            text.detach().seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, csv.Error) as error:
        raise CxrdistError(
            f"{table}: is not a valid table of samples ({error!s:.150}); {MEND}"
        ) from error
    return digest, samples


def _lines(table: io.TextIOWrapper) -> Iterator[str]:
    """Yield the lines of a table, refusing overlong ones before they fill the memory."""
    while line := table.readline(MOST_LINE_CHARACTERS):
        if len(line) == MOST_LINE_CHARACTERS:
            raise ValueError(f"a line of more than {MOST_LINE_CHARACTERS} characters")
        yield line


def _read_sample(row: list[str], header: list[str], num_columns: int) -> Sample:
    """Return a row of samples.csv; only its first ``num_columns`` columns are known."""
    if len(row) != len(header):
        raise ValueError(f"a row of {len(row)} fields, expected {len(header)}: {row!r:.80}")
    sample = Sample(*row[:num_columns])
    if not KEY.fullmatch(sample.key):
        raise ValueError(f"the key {sample.key!r:.80}, expected letters, digits, _ and -")
    if sample.split not in SPLITS or not SHA256.fullmatch(sample.sha256):
        raise ValueError(f"the split or the sha256 of {sample.key} is invalid")
    if sample.mask_sha256 and not SHA256.fullmatch(sample.mask_sha256):
        raise ValueError(f"the mask_sha256 of {sample.key} is invalid")
    if sample.view not in (*VIEWS, UNKNOWN):
        raise ValueError(f"the view of {sample.key} is {sample.view!r:.40}")
    return sample


def _disagreements(index: Index, splits: dict[str, SplitEntry]) -> list[str]:
    """List disagreements of samples.csv and index.json, duplicate keys, and shared patients."""
    table, faults = index.directory / "samples.csv", []
    expected = [(shard.name.split("-")[0], shard.name, shard.samples) for shard in index.shards]
    held = groupby(index.samples, lambda sample: (sample.split, sample.shard))
    if [(*home, sum(1 for _ in samples)) for home, samples in held] != expected:
        there = Counter(sample.shard for sample in index.samples)
        names = [s.name for s in index.shards if there[s.name] != s.samples]
        faults += [
            f"{table}: lists {there[name]} samples of {name}, not as many as index.json; {MEND}"
            for name in names
        ] or [f"{table}: lists the samples in another order than index.json; {MEND}"]
    known, single = {*index.classes}, index.task == "multiclass"
    samples = ((s.label, s.uncertain, s.missing, s.assumed_absent) for s in index.samples)
    # Samples share few combinations of labels, so each of these is judged once.
    for label, *not_stated in dict.fromkeys(samples):
        labels, others = labels_of(label), [n for text in not_stated for n in labels_of(text)]
        fault = _bad_label(known, labels, others, single=single)
        faults += [f"{table}: {fault}"] if fault else []
    counts = index.counts()
    for split, name in ((split, name) for split in SPLITS for name in index.classes):
        number = splits[split]["classes"].get(name)
        images = counts[split][name]["images"]
        if number != images:
            faults.append(
                f"{table}: has {images} images of {name} in {split}, index.json says {number}"
            )
    keys = Counter(sample.key for sample in index.samples)
    faults += [f"{table}: key {key} is in {n} rows" for key, n in keys.items() if n > 1]
    home: dict[str, str] = {}
    for sample in index.samples:
        if home.setdefault(sample.patient, sample.split) != sample.split:
            faults.append(f"{table}: patient {sample.patient} is in two splits; pack again")
    return list(dict.fromkeys(faults))


def _bad_label(
    known: set[str], labels: list[str], others: list[str], *, single: bool
) -> str | None:
    """Return what is wrong with the labels of a sample; None if nothing is.

    ``labels`` are those that it has, ``others`` those that its source does not state; ``single``
    says whether a sample has exactly one label.
    """
    if unknown := [name for name in (*labels, *others) if name not in known]:
        return f"label {unknown[0]!r:.80} is not a class of index.json"
    if len({*labels}) != len(labels) or (single and len(labels) != 1):
        task = "multiclass" if single else "multilabel"
        return f"{'|'.join(labels)!r:.80} is not a valid label of a {task} sample"
    if single and others:
        return f"{others[0]!r:.80} is uncertain or missing in a multiclass sample"
    if len({*labels, *others}) != len(labels) + len(others):
        twice = next(name for name, n in Counter((*labels, *others)).items() if n > 1)
        return f"{twice!r:.80} is in two of label, {', '.join(NOT_STATED)}"
    return None
