"""ChestX-ray14 (Wang et al. 2017) as published by the NIH and on Kaggle."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cxrdist.data.labels import SEPARATOR, labels_of
from cxrdist.data.listed import Listed
from cxrdist.data.nih_boxes import read_boxes
from cxrdist.data.patients import MOST_YEARS, age_of, sex_of
from cxrdist.data.records import DEVELOPMENT, Record, Source
from cxrdist.data.tables import Table, read_table, read_text
from cxrdist.errors import CxrdistError

# In the order of the outputs of the published CheXNet copies (arnoweng/CheXNet,
# jrzech/reproduce-chexnet).
LABELS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia"),
    *("Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening"),
    "Hernia",
)
NO_FINDING = "No Finding"
REST = "rest"
NAME = "ChestX-ray14"
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the corrected one first
LISTS = {"train_val_list.txt": DEVELOPMENT, "test_list.txt": "test"}
NEEDED = ("Image Index", "Finding Labels", "Patient ID", "View Position")
COLUMNS = {
    **{name: (name,) for name in (*NEEDED, "Patient Age")},
    "Patient Sex": ("Patient Sex", "Patient Gender"),  # in the newer and in the older table
}
IMAGE = re.compile(r"images(?:_[^/]+/images)?/([^/]+)")  # of the NIH, and of Kaggle


def read_chestxray14(
    folder: Path, against_rest: str | None = None, besides: Sequence[Path] = ()
) -> Source:
    """Read the table, the images, and the official lists and boxes if present.

    The folder has a table and the images, in ``images/`` (NIH) or ``images_001/images/`` to
    ``images_012/images/`` (Kaggle); folders in ``besides`` are skipped. The splits are
    ``train+val`` and ``test`` of the official lists, if present. Images without a row and rows
    without an image are left out. The classes are the 14 labels, or one against all other images.

    Raises:
        CxrdistError: there is no table, a row or list is malformed, or a row is in no list.
    """
    if against_rest is not None and against_rest not in LABELS:
        raise CxrdistError(
            f"--against-rest {against_rest}: is not a label; expected one of {', '.join(LABELS)}"
        )
    csv = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if csv is None:
        raise CxrdistError(
            f"--input {folder}: has neither {TABLES[0]} nor {TABLES[1]}; download one of them"
        )
    table = read_table(csv, NEEDED)
    listed = Listed(folder, IMAGE, besides, suffix=".png")
    splits, boxes = _splits(folder), read_boxes(folder, LABELS)
    records = []
    for where, name, known in _rows(table):
        taken = listed.take(_official(name), where, known)
        if taken is None:
            continue
        split = splits.get(_official(name))
        if splits and split is None:
            raise CxrdistError(f"{where}: {name} is in neither {' nor '.join(LISTS)}")
        if against_rest is not None:
            labels = labels_of(known["label"])
            known = {**known, "label": against_rest if against_rest in labels else REST}
        file, _ = taken
        drawn = boxes.on(_stem(name), file)
        records.append(Record(file, file.name, source=NAME, split=split, findings=drawn, **known))
    return Source(
        records,
        "multilabel" if against_rest is None else "multiclass",
        list(LABELS) if against_rest is None else [against_rest, REST],
        NAME,
        (*table.notes, *listed.notes(table.file), *_notes(records, splits), *boxes.notes(records)),
        *listed.account(),
    )


def _notes(records: Sequence[Record], splits: dict[str, str]) -> Iterator[str]:
    if not splits:
        yield f"without {' and '.join(LISTS)} the split is drawn here and is not the official one"
    if ageless := sum(record.age is None for record in records):
        yield f"{ageless} images have no age from 0 to {MOST_YEARS:g} years; left empty"


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _official(name: str) -> str:
    """Return an image's name in the NIH's tables; smaller copies may be JPEGs."""
    return f"{_stem(name)}.png"


def _splits(folder: Path) -> dict[str, str]:
    """Return the official split of each image; empty without the lists."""
    there = {folder / name: split for name, split in LISTS.items() if (folder / name).is_file()}
    if len(there) == 1:
        only = next(iter(there)).name
        raise CxrdistError(f"{folder}: has only {only}; expected both {' and '.join(LISTS)}")
    splits: dict[str, str] = {}
    for file, split in there.items():
        for name in read_text(file)[0].split():
            if splits.setdefault(_official(name), split) != split:
                raise CxrdistError(f"{file}: {name} is in both lists")
    return splits


def _rows(table: Table) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield file and number of each row, the image's name, and fields of its record.

    The header has an unquoted comma in ``OriginalImage[Width,Height]``: a cell for each number.
    """
    for where, cells in table.cells(COLUMNS, NEEDED):
        name, patient = cells["Image Index"], cells["Patient ID"]
        labels = set(cells["Finding Labels"].split(SEPARATOR)) - {NO_FINDING}
        if unknown := labels - {*LABELS}:
            raise CxrdistError(f"{where}: {min(unknown)!r} is not one of the 14 labels")
        # A column that was sorted or shifted alone would give images to other patients.
        if not patient.isdecimal() or f"{int(patient):08d}" != name[:8]:
            raise CxrdistError(f"{where}: {name} does not belong to patient {patient!r}")
        known = {
            "label": SEPARATOR.join(x for x in LABELS if x in labels),
            "patient": name[:8],
            "view": cells["View Position"],
            "sex": sex_of(cells.get("Patient Sex", "")),
            "age": age_of(cells.get("Patient Age", "")),
        }
        yield where, name, known
