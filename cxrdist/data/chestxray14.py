"""ChestX-ray14 (Wang et al. 2017) as Kaggle and the NIH hand it out."""

import csv
from collections.abc import Iterator
from pathlib import Path

from cxrdist.data.records import DEVELOPMENT, SEPARATOR, Record, Source
from cxrdist.errors import CxrdistError

# The order of the outputs of the published CheXNet copies.
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
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")


def read_chestxray14(folder: Path, against_rest: str | None = None) -> Source:
    """Read the table, the official lists where they are there, and the images that are there.

    Args:
        folder: holds a table and the images, in ``images/`` (NIH) or ``images_001/images/`` to
            ``images_012/images/`` (Kaggle).
        against_rest: this label against all other images, instead of the 14 labels.

    Returns:
        Records with the splits ``train+val`` and ``test`` of the official lists, if these are
        there; the note tells of images in the table that are not on the disk.

    Raises:
        CxrdistError: there is no table, a row or list is malformed, or an image stands in no row
            or list.
    """
    if against_rest is not None and against_rest not in LABELS:
        raise CxrdistError(
            f"--against-rest {against_rest}: is no label; expected one of {', '.join(LABELS)}"
        )
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        raise CxrdistError(f"--input {folder}: has neither {TABLES[0]} nor {TABLES[1]}")
    files, splits = _images(folder), _splits(folder)
    records, missing = [], 0
    for where, name, labels, patient, view in _rows(table):
        file = files.pop(_stem(name), None)
        if file is None:
            missing += 1
            continue
        if splits and _stem(name) not in splits:
            raise CxrdistError(f"{where}: {name} is in neither {' nor '.join(LISTS)}")
        if against_rest is not None:
            labels = [against_rest if against_rest in labels else REST]
        records.append(
            Record(
                file=file,
                path=file.name,
                label=SEPARATOR.join(labels),
                patient=patient,
                source=NAME,
                split=splits.get(_stem(name)),
                view=view,
            )
        )
    if files:
        raise CxrdistError(f"{next(iter(files.values()))}: stands in no row of {table.name}")
    notes = (f"{missing} images of {table.name} are not here",) if missing else ()
    if against_rest is not None:
        return Source(records, "multiclass", [against_rest, REST], NAME, notes)
    return Source(records, "multilabel", list(LABELS), NAME, notes)


def _stem(name: str) -> str:
    """An image's name without its suffix: smaller copies are JPEGs of the same names."""
    return name.rpartition(".")[0]


def _images(folder: Path) -> dict[str, Path]:
    """All images by the stem of their names."""
    files: dict[str, Path] = {}
    for place in ("images", "images_*/images"):
        for directory in sorted(folder.glob(place), key=str):
            for file in directory.iterdir():
                if not file.name.lower().endswith((".png", ".jpg", ".jpeg")):
                    continue
                stem = _stem(file.name)
                if stem in files:
                    raise CxrdistError(f"{file}: stands in {files[stem].parent} too; remove one")
                files[stem] = file
    if not files:
        raise CxrdistError(
            f"--input {folder}: has no images; expected them in images/ or images_001/images/ ..."
        )
    return files


def _splits(folder: Path) -> dict[str, str]:
    """The official split of each image by the stem of its name; empty without the lists."""
    there = [name for name in LISTS if (folder / name).is_file()]
    if len(there) == 1:
        raise CxrdistError(f"{folder}: has {there[0]} alone; expected both {' and '.join(LISTS)}")
    splits: dict[str, str] = {}
    for list_name in there:
        for name in (folder / list_name).read_text(encoding="utf-8").split():
            if splits.setdefault(_stem(name), LISTS[list_name]) != LISTS[list_name]:
                raise CxrdistError(f"{folder / list_name}: {name} stands in both lists")
    return splits


def _rows(table: Path) -> Iterator[tuple[str, str, list[str], str, str]]:
    """Where a row is, the image's name, its labels in `LABELS`' order, the patient, the view.

    The header has an unquoted comma in ``OriginalImage[Width,Height]``, in the older table one at
    its end too, and calls one column ``Patient Gender`` or ``Patient Sex``: all after the columns
    that are read, or not among them.
    """
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        lacking = [name for name in COLUMNS if name not in header]
        if lacking:
            raise CxrdistError(f"{table}: has no column {lacking[0]!r}; fetch the table again")
        places = [header.index(name) for name in COLUMNS]
        for number, row in enumerate(rows, start=2):
            where = f"{table} row {number}"
            if len(row) <= max(places):
                raise CxrdistError(f"{where}: has {len(row)} cells; fetch the table again")
            name, findings, patient, view = (row[place].strip() for place in places)
            labels = set(findings.split(SEPARATOR)) - {NO_FINDING}
            if unknown := labels - {*LABELS}:
                raise CxrdistError(f"{where}: {min(unknown)!r} is none of the 14 labels")
            if not patient.isdecimal() or f"{int(patient):08d}" != name[:8]:
                raise CxrdistError(f"{where}: {name} is not of patient {patient!r}")
            yield where, name, [x for x in LABELS if x in labels], name[:8], view
