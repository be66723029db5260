"""VinDr-CXR (Nguyen et al. 2022) as published by PhysioNet, and in Kaggle's competition.

Three radiologists read each training image. As in the authors' counts ("the numbers of positive
labels were reported based on the majority vote of the participating radiologists") a label is
present if most readers of an image state it. If fewer state it, it is uncertain here; if none does,
it is absent. Test images have the labels on which five radiologists agreed. The boxes of all
readers are kept, each with its reader.

The authors removed all DICOM tags but sex, age, size, weight and those of the pixels
(github.com/vinbigdata-medical/vindr-cxr, de-identification/tags.csv): patients are not known, so
each image counts as a patient of its own. All images are PA views.

Not read: size and weight, Kaggle's class_id and sample_submission.csv. Kaggle's test images have no
labels and are left out.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from cxrdist.data.findings import MOST_PX, ROUNDING_PX, Finding
from cxrdist.data.found import look_at
from cxrdist.data.labels import SEPARATOR, labels_of, read_cells
from cxrdist.data.listed import Listed
from cxrdist.data.pictures import picture_size
from cxrdist.data.records import DEVELOPMENT, LabelCells, Record, Source, own_patient
from cxrdist.data.tables import float_of, plain, read_table
from cxrdist.errors import CxrdistError

NAME = "VinDr-CXR"
# Columns of image_labels_train.csv in their order: 22 local labels, then 6 global ones.
LABELS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture"),
    *("Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity"),
    *("Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion"),
    *("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding"),
)
NO_FINDING = LABELS[-1]
# Kaggle's class_id 0 to 14.
KAGGLE_LABELS = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation"),
    *("ILD", "Infiltration", "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", NO_FINDING),
)
SPLITS = {"train": DEVELOPMENT, "test": "test"}
# Kaggle's copies have train/train/ and test/test/.
IMAGE = re.compile(r"(?:train/(?=train/)|test/(?=test/))?((?:train|test)/[^/]+)")
EDGES = ("x_min", "y_min", "x_max", "y_max")
BOX_COLUMNS = ("image_id", "class_name", *EDGES, "rad_id")  # the last is missing for test images
# The tables of training and test images differ in one column's name.
LABEL_COLUMNS = {
    **{name: (name,) for name in ("image_id", "rad_id", *LABELS)},
    "Other diseases": ("Other diseases", "Other disease"),
}
SPELLINGS = {plain(text): name for name in LABELS for text in LABEL_COLUMNS[name]}


class _Reading(NamedTuple):
    """A reader's labels of an image: present, uncertain and not mentioned."""

    present: set[str]
    uncertain: set[str]
    missing: set[str]


@dataclass
class _Content:
    """Content of the tables by image, named like ``train/0123456789abcdef``."""

    readings: dict[str, dict[str, _Reading]] = field(default_factory=dict)
    """By image and reader; a consensus has the reader ""."""
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    """Boxes by image."""
    notes: list[str] = field(default_factory=list)
    """For the user, on the tables, one line each."""


def read_vindr_cxr(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read the tables, and the images that exist.

    The folder has ``train/`` and ``test/`` with the images, and the tables: those of PhysioNet in
    ``annotations/`` or next to these two, at least one image_labels_*.csv; or Kaggle's train.csv.
    Folders in ``besides`` are skipped. The splits are ``train+val`` and ``test`` of the authors.
    Images without a row and rows without an image are left out.

    The images may be copies of the DICOM files in another format. Boxes are in px of the DICOM
    files; if a box exceeds such a copy, the boxes of all copies are dropped.

    Raises:
        CxrdistError: there is no table, a table is there twice, or a row is malformed.
    """
    homes = (folder / "annotations", folder)
    files = [home / f"image_labels_{split}.csv" for split in SPLITS for home in homes]
    tables = [file for file in files if file.is_file()]
    for file, other in itertools.combinations(tables, 2):
        if file.name == other.name:
            raise CxrdistError(f"{other}: is also in {file.parent}; remove one")
    kaggle = folder / "train.csv"
    classes: Sequence[str] = LABELS
    if tables:
        content = _read_physionet(tables)
    elif kaggle.is_file():
        content, classes, tables = _read_kaggle(kaggle), KAGGLE_LABELS, [kaggle]
    else:
        raise CxrdistError(
            f"--input {folder}: has no annotations/image_labels_train.csv (PhysioNet) and no "
            "train.csv (Kaggle)"
        )
    listed = Listed(folder, IMAGE, besides)
    records = [
        _record(image, taken, content, classes)
        for image in content.readings
        if (taken := listed.take(image)) is not None
    ]
    records, resized = _without_unfit_boxes(records)
    notes = (*content.notes, *listed.notes(*tables), *resized, *_notes(records))
    return Source(records, "multilabel", list(classes), NAME, notes, *listed.account())


def _record(
    image: str, taken: tuple[Path, str], content: _Content, classes: Sequence[str]
) -> Record:
    return Record(
        file=taken[0],
        path=taken[1],
        patient=own_patient(taken[1]),
        source=NAME,
        split=SPLITS[image.partition("/")[0]],
        view="PA",
        findings=tuple(sorted(content.findings.get(image, ()))),
        **_agree(list(content.readings[image].values()), classes),
    )


def _agree(readings: Sequence[_Reading], classes: Sequence[str]) -> LabelCells:
    """Combine the readings of an image by majority vote."""
    label, uncertain, missing = list[str](), list[str](), list[str]()
    for name in classes:
        votes = [reading for reading in readings if name not in reading.missing]
        present = sum(name in reading.present for reading in votes)
        if not votes:
            missing.append(name)
        elif 2 * present > len(votes):
            label.append(name)
        elif present or any(name in reading.uncertain for reading in votes):
            uncertain.append(name)
    return {
        "label": SEPARATOR.join(label),
        "uncertain": SEPARATOR.join(uncertain),
        "missing": SEPARATOR.join(missing),
    }


def _read_physionet(tables: Sequence[Path]) -> _Content:
    """Read tables of labels, and the table of boxes next to each."""
    content = _Content()
    for file in tables:
        split = file.stem.rpartition("_")[2]
        _read_labels(file, split, content)
        boxes = file.with_name(f"annotations_{split}.csv")
        if not boxes.is_file():
            content.notes.append(f"without {boxes.name} the {split} images have no boxes")
            continue
        unmatched = set()
        for image, finding in _read_boxes(boxes, split, LABELS):
            if image not in content.readings:
                unmatched.add(image)
            if finding.width:
                content.findings.setdefault(image, []).append(finding)
        if unmatched:
            content.notes.append(f"{len(unmatched)} images of {boxes.name} are not in {file.name}")
    return content


def _read_labels(file: Path, split: str, content: _Content) -> None:
    """Read a table with a row per image and reader, and a column per label."""
    table = read_table(file, LABEL_COLUMNS)
    for where, cells in table.cells(LABEL_COLUMNS, ("image_id", *LABELS)):
        image, reader = f"{split}/{cells.pop('image_id')}", cells.pop("rad_id", "")
        readings = content.readings.setdefault(image, {})
        if reader in readings:
            raise CxrdistError(
                f"{where}: {image} already has a row of {reader or 'no reader'}; remove one"
            )
        known = read_cells(where, cells)
        readings[reader] = _Reading(
            *({*labels_of(known[name])} for name in ("label", "uncertain", "missing"))
        )


def _read_kaggle(file: Path) -> _Content:
    """Read the table of boxes, with a row No finding for each reader who drew none in an image."""
    content = _Content(notes=["is Kaggle's release: 14 labels, and test images without labels"])
    for image, finding in _read_boxes(file, "train", KAGGLE_LABELS):
        readings = content.readings.setdefault(image, {})
        reading = readings.setdefault(finding.reader, _Reading(set(), set(), set()))
        reading.present.add(finding.label)
        if finding.width:
            content.findings.setdefault(image, []).append(finding)
    return content


def _read_boxes(file: Path, split: str, labels: Sequence[str]) -> Iterator[tuple[str, Finding]]:
    """Yield the image and the box of each row; the box has size 0 if the row has none."""
    table = read_table(file, BOX_COLUMNS)
    for where, cells in table.cells(BOX_COLUMNS, ("image_id", "class_name", *EDGES)):
        label = SPELLINGS.get(plain(cells["class_name"]), "")
        if label not in labels:
            raise CxrdistError(
                f"{where}: {cells['class_name']!r:.40} is not one of the {len(labels)} labels"
            )
        edges = [cells[name] for name in EDGES]
        x, y, right, bottom = (0.0,) * 4 if label == NO_FINDING else _read_edges(where, edges)
        finding = Finding(label, x, y, right - x, bottom - y, cells.get("rad_id", ""))
        yield f"{split}/{cells['image_id']}", finding


def _read_edges(where: str, cells: Sequence[str]) -> tuple[float, float, float, float]:
    """Return the edges of a box; all 0 if its cells are empty, as those of global labels are."""
    if not any(cells):
        return 0.0, 0.0, 0.0, 0.0
    x, y, right, bottom = map(float_of, cells)
    # A comparison with NaN is false, so NaN is refused as well.
    if not (0 <= x < right <= MOST_PX and 0 <= y < bottom <= MOST_PX):
        raise CxrdistError(
            f"{where}: the box {', '.join(cells)!r:.80}, expected {', '.join(EDGES)} in px"
        )
    return x, y, right, bottom


def _without_unfit_boxes(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Drop the boxes of pictures if these are smaller copies of the DICOM files; a note says so."""
    pictures = {record.path for record in records if look_at(record.file)[0] != "DICOM"}
    unfit = sum(_reaches_out(record) for record in records if record.path in pictures)
    if not unfit:
        return records, []
    # Also boxes that happen to fit: nothing tells the scale of a smaller copy.
    bare = [replace(r, findings=()) if r.path in pictures else r for r in records]
    return bare, [
        f"the boxes of {unfit} images exceed them, so the pictures are smaller copies, and their "
        f"boxes are dropped; use the DICOM files, or copies of the same size"
    ]


def _reaches_out(record: Record) -> bool:
    """Return whether a box exceeds its picture; False if the picture cannot be read."""
    size = picture_size(record.file) if record.findings else None
    return size is not None and any(
        box.x + box.width > size[0] + ROUNDING_PX or box.y + box.height > size[1] + ROUNDING_PX
        for box in record.findings
    )


def _notes(records: Sequence[Record]) -> Iterator[str]:
    yield "no patient is known: even the official splits may share patients"
    if uncertain := sum(bool(record.uncertain) for record in records):
        yield f"{uncertain} images have uncertain labels: some readers state them, but not most"
    held = [labels_of(record.label) for record in records]
    if both := sum(NO_FINDING in labels and len(labels) > 1 for labels in held):
        yield f"{both} images have both {NO_FINDING} and a finding"
