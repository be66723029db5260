"""Records: one row about a raw image."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from cxrdist.data.boxes import Box
from cxrdist.data.findings import Finding
from cxrdist.data.found import LeftOut
from cxrdist.data.labels import labels_of
from cxrdist.data.masks import MaskPlace
from cxrdist.data.views import PACKED

SPLITS = ("train", "val", "test")
DEVELOPMENT = "train+val"  # a given split of which validation is still to be drawn
# What folders and tables call them, in small letters.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# File names that tell where an image comes from.
KNOWN_NAMES = {
    "ChestX-ray14": re.compile(r"^\d{8}_\d{3}\."),
    "Kermany": re.compile(r"^person\d+_(virus|bacteria)_\d+\.|^(NORMAL2-)?IM-\d{4}-\d{4}"),
}
NO_PATIENT = "image:"


@dataclass(frozen=True, slots=True)
class Record:
    """One raw image.

    Attributes:
        file: where to read it, local or an fsspec path.
        path: its name relative to the source, with slashes; stable between machines.
        label: class name; of several labels with ``|`` between them, or empty for none.
        patient: who was X-rayed; all images of a patient stay in one split.
        source: where the image comes from, for audits.
        split: train, val or test where the source fixes it; ``train+val`` where it leaves open
            which of the two.
        view: one of `cxrdist.data.views.VIEWS` where the source tells it, else empty.
        boxes: burned-in text that may be covered, in px of the original.
        sex: M, F, or empty where nothing tells.
        age: of the patient in years, where something tells.
        uncertain: labels of which the source is not sure, with ``|`` between them.
        missing: labels of which the source says nothing, with ``|`` between them.
        assumed_absent: labels that count as absent though the source says nothing of them.
        findings: boxes around signs of disease.
        mask: of the lungs, where there is one.
        lungs_only: make all of it black that its mask does not cover.
        origin: its name among several sources that are packed together, else empty.
    """

    file: Path
    path: str
    label: str
    patient: str
    source: str
    split: str | None = None
    view: str = ""
    boxes: tuple[Box, ...] = ()
    sex: str = ""
    age: float | None = None
    uncertain: str = ""
    missing: str = ""
    assumed_absent: str = ""
    findings: tuple[Finding, ...] = ()
    mask: MaskPlace | None = None
    lungs_only: bool = False
    origin: str = ""


class LabelCells(TypedDict):
    """What a record states of its labels, as in `Record`."""

    label: str
    uncertain: NotRequired[str]
    missing: NotRequired[str]
    assumed_absent: NotRequired[str]


@dataclass(frozen=True)
class Source:
    """All records of a source.

    Attributes:
        records: one for each image.
        task: multiclass (each image has one label) or multilabel (any number).
        classes: names in the order of the network's outputs.
        name: what was read, such as a data set and its release.
        notes: what a user should know of it, a line each.
        left_out: files that are there and not among the records, and rows without a file.
        num_found: files that were found, and rows without a file; records and left out together.
        dicom: whether DICOM files are among the images, as far as suffix or first bytes tell.
        views: which views are packed, by the `Record.origin`; some are told by a tag only.
        public: names of public data sets among the records' sources.
    """

    records: list[Record]
    task: Literal["multiclass", "multilabel"]
    classes: list[str]
    name: str
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    num_found: int = 0
    dicom: bool = False
    views: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": PACKED})
    public: frozenset[str] = frozenset()


def count_unmatched(records: list[Record]) -> int:
    """How many images are a patient of their own for want of a name that tells the patient."""
    return sum(record.patient.startswith(NO_PATIENT) for record in records)


def known_source(name: str, otherwise: str) -> str:
    """The data set whose file names look like this one, or what else the source is called."""
    return next((known for known, form in KNOWN_NAMES.items() if form.search(name)), otherwise)


def own_patient(path: str) -> str:
    """Stands for the patient of an image of which nothing tells the patient."""
    return f"{NO_PATIENT}{path}"


def differences(source: Source, expect: Mapping[str, int]) -> list[str]:
    """In what the number of images of each class is not as expected, a line each.

    Labels that a label map took away are not compared.
    """
    found = Counter(label for record in source.records for label in labels_of(record.label))
    return [
        f"{name} has {found[name]} images, expected {number}"
        for name, number in expect.items()
        if name in source.classes and found[name] != number
    ]
