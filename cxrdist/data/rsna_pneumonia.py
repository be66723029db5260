"""RSNA Pneumonia Detection Challenge (Shih et al. 2019), stage 2, as published on Kaggle.

Its images are ChestX-ray14's under other names, with labels and boxes of radiologists.

Not read: the test images, which have no labels on Kaggle, the readings of each radiologist that
RSNA published later, and the tables of stage 1.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from cxrdist.data.findings import Finding
from cxrdist.data.listed import OUTSIDE, Listed
from cxrdist.data.nih_boxes import SIDE_PX, finding_of, fitted
from cxrdist.data.records import Record, Source
from cxrdist.data.tables import read_table
from cxrdist.documents import Matching, Text
from cxrdist.errors import CxrdistError
from cxrdist.files import read_document

NAME = "RSNA"
OPACITY = "Lung Opacity"
CLASSES = (OPACITY, "No Lung Opacity / Not Normal", "Normal")
BOXES, READINGS = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
COLUMNS = ("patientId", "x", "y", "width", "height", "Target")
IMAGE, TEST_IMAGES = re.compile(r"stage_2_train_images/([^/]+)"), "stage_2_test_images/"
# Maps each image to its name in ChestX-ray14; from RSNA's page of the challenge.
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


class Origin(NamedTuple):
    """An entry of `MAPPING`, with only the fields that are used."""

    subset_img_id: Text
    """Name in the challenge, without a suffix."""
    img_id: Annotated[str, Matching(r"\d{8}_\d{3}\.png", "a name such as 00000001_000.png")]
    """Name in ChestX-ray14; it begins with the patient."""


def read_rsna_pneumonia(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read both tables, the images that exist, and the patients if `MAPPING` exists.

    The folder has the two tables and ``stage_2_train_images/``; folders in ``besides`` are skipped.
    The records have one of three classes and the boxes of opacities. Images without a row and rows
    without an image are left out. Pack takes view, sex and age from the DICOM files, but not the
    patient: their PatientID differs for each image.

    Raises:
        CxrdistError: a table is missing or malformed, or the two tables disagree.
    """
    boxes, readings = _read_boxes(folder), _read_readings(folder)
    if unmatched := sorted(boxes.keys() ^ readings.keys()):
        raise CxrdistError(
            f"{folder}: {unmatched[0]} is in only one of {BOXES} and {READINGS}; fetch both again"
        )
    patients = read_nih_patients(folder)
    listed = Listed(folder, IMAGE, besides)
    records = []
    for name, label in readings.items():
        if bool(boxes[name]) != (label == OPACITY):
            raise CxrdistError(
                f"{folder / READINGS}: {name} is {label!r}, but has {len(boxes[name])} boxes in "
                f"{BOXES}; fetch both again"
            )
        taken = listed.take(name)
        if taken is None:
            continue
        if patients and name not in patients:
            raise CxrdistError(f"{folder / MAPPING}: lacks {name}; fetch it again")
        findings = fitted(tuple(boxes[name]), taken[0])
        # Not `own_patient`, which pack replaces by the PatientID of the DICOM file.
        records.append(Record(*taken, label, patients.get(name, name), NAME, findings=findings))
    notes = (*listed.notes(folder / READINGS), *_notes(records, patients))
    left_out, num_found, dicom = listed.account()
    reason = "test image of the challenge, of which no label is given"
    left_out = tuple(
        left._replace(reason=reason)
        if left.reason == OUTSIDE and left.path.startswith(TEST_IMAGES)
        else left
        for left in left_out
    )
    return Source(records, "multiclass", list(CLASSES), NAME, notes, left_out, num_found, dicom)


def read_nih_patients(folder: Path) -> dict[str, str]:
    """Return the patient in ChestX-ray14 of each image of the challenge; none without `MAPPING`.

    Raises:
        CxrdistError: the file is damaged.
    """
    file = folder / MAPPING
    if not file.is_file():
        return {}
    origins = read_document(file, list[Origin], "fetch it again")
    return {origin.subset_img_id: origin.img_id[:8] for origin in origins}


def _cells(file: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield file and number of each row of a table, and its cells by column."""
    if not file.is_file():
        raise CxrdistError(
            f"--input {file.parent}: has no {file.name}; expected the files of stage 2 from Kaggle"
        )
    yield from read_table(file, names).cells(names, names)


def _read_readings(folder: Path) -> dict[str, str]:
    """Return the class of each image; the table repeats it for each box."""
    readings: dict[str, str] = {}
    for where, row in _cells(folder / READINGS, ("patientId", "class")):
        name, label = row["patientId"], row["class"]
        if label not in CLASSES:
            raise CxrdistError(f"{where}: the class {label!r:.40}, expected {', '.join(CLASSES)}")
        if readings.setdefault(name, label) != label:
            raise CxrdistError(f"{where}: {name} was {readings[name]!r} before; fetch it again")
    return readings


def _read_boxes(folder: Path) -> dict[str, list[Finding]]:
    """Return the boxes of each image, in px of the originals; none without an opacity."""
    boxes: dict[str, list[Finding]] = {}
    for where, row in _cells(folder / BOXES, COLUMNS):
        own = boxes.setdefault(row["patientId"], [])
        if row["Target"] not in ("0", "1"):
            raise CxrdistError(f"{where}: Target is {row['Target']!r:.40}, expected 0 or 1")
        if row["Target"] == "1":
            own.append(finding_of(OPACITY, row, where, SIDE_PX))
    return boxes


def patients_note(num_images: int) -> str:
    """Return the note that without `MAPPING` the patients are not known."""
    return (
        f"without {MAPPING} the patients of RSNA's {num_images} images are not known: each image "
        "counts as a patient of its own"
    )


def _notes(records: Sequence[Record], patients: dict[str, str]) -> Iterator[str]:
    if not patients:
        yield patients_note(len(records))
    if cut := sum(record.label == OPACITY and not record.findings for record in records):
        yield (
            f"{cut} images cannot be read or are not square, unlike the originals: their boxes are "
            "left out"
        )
