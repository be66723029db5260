"""Records: one row per raw image."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from cxrdist.data.boxes import Box
from cxrdist.data.findings import Finding
from cxrdist.data.found import LeftOut
from cxrdist.data.labels import labels_of
from cxrdist.data.masks import MaskPlace
from cxrdist.data.views import PACKED
from cxrdist.info import Task

SPLITS = ("train", "val", "test")
DEVELOPMENT = "train+val"  # a given split of which validation is still to be drawn
# Names of the splits in folders and tables, in lower case.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# File names that reveal which data set an image comes from.
KNOWN_NAMES = {
    "ChestX-ray14": re.compile(r"^\d{8}_\d{3}\."),
    "Kermany": re.compile(r"^person\d+_(virus|bacteria)_\d+\.|^(NORMAL2-)?IM-\d{4}-\d{4}"),
}
# RSNA's X-rays are ChestX-ray14's under other names (Shih et al. 2019); other sets include RSNA's.
OF_NIH = ("ChestX-ray14", "RSNA")
NO_PATIENT = "image:"  # begins the placeholder of a patient that is not known


@dataclass(frozen=True, slots=True)
class Record:
    """One raw image.

    Attributes:
        file: where to read it, local or an fsspec path.
        path: its name relative to the source, with slashes; the same on every machine.
        label: class name; several labels are separated by ``|``; empty for none.
        patient: who was X-rayed; all images of a patient stay in one split.
        source: where the image comes from, for audits.
        split: train, val or test if the source fixes it; ``train+val`` if it leaves open which of
            the two; None if the split is to be drawn.
        view: one of `cxrdist.data.views.VIEWS` if the source gives it, else empty.
        boxes: burned-in text that may be covered, in px of the original.
        sex: M, F, or empty if unknown.
        age: age of the patient in years; None if unknown.
        uncertain: labels that the source is unsure about, separated by ``|``.
        missing: labels that the source does not mention, separated by ``|``.
        assumed_absent: labels that count as absent though the source does not mention them.
        findings: boxes around signs of disease.
        mask: where the mask of the lungs is, if there is one.
        lungs_only: whether everything outside the mask is made black.
        origin: name of its source when several sources are packed together, else empty.
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
    """The labels of a record, as in `Record`."""

    label: str
    uncertain: NotRequired[str]
    missing: NotRequired[str]
    assumed_absent: NotRequired[str]


@dataclass(frozen=True)
class Source:
    """All records of a source.

    Attributes:
        records: one per image.
        task: multiclass (each image has one label) or multilabel (any number).
        classes: names in the order of the network's outputs.
        name: what was read, such as a data set and its release.
        notes: what a user should know about it, one line each.
        left_out: files that are not among the records, and rows without a file.
        num_found: number of files and of rows without a file: records and left out together.
        dicom: whether any image is a DICOM file, judged by suffix or first bytes.
        views: views to pack, by `Record.origin`; some views are known only from a tag, later.
        public: names of public data sets among the records' sources.
    """

    records: list[Record]
    task: Task
    classes: list[str]
    name: str
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    num_found: int = 0
    dicom: bool = False
    views: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": PACKED})
    public: frozenset[str] = frozenset()


def count_unmatched(records: list[Record]) -> int:
    """Return the number of images without a known patient."""
    return sum(record.patient.startswith(NO_PATIENT) for record in records)


def known_source(name: str, otherwise: str) -> str:
    """Return the data set whose file names look like this one, else ``otherwise``."""
    return next((known for known, form in KNOWN_NAMES.items() if form.search(name)), otherwise)


def is_of_nih(source: str, path: str) -> bool:
    """Return whether an image is one of ChestX-ray14, by its source or its file's name."""
    # A table may name another source for files that keep the NIH's names.
    return source in OF_NIH or bool(KNOWN_NAMES["ChestX-ray14"].search(path.rpartition("/")[2]))


def own_patient(path: str) -> str:
    """Return a placeholder ID for an image with an unknown patient, unique to the image."""
    return f"{NO_PATIENT}{path}"


def differences(source: Source, expect: Mapping[str, int]) -> list[str]:
    """List classes with an unexpected number of images, a line each.

    Labels that a label map removed are not compared.
    """
    counts = Counter(label for record in source.records for label in labels_of(record.label))
    return [
        f"{name} has {counts[name]} images, expected {number}"
        for name, number in expect.items()
        if name in source.classes and counts[name] != number
    ]
