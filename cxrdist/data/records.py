"""Records: one row about a raw image, and the sources that are read into them."""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cxrdist.config import PackConfig
from cxrdist.errors import CxrdistError

DICOM_SUFFIXES = {".dcm", ".dicom", ".dic"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", *DICOM_SUFFIXES}
SPLITS = ("train", "val", "test")
DEVELOPMENT = "train+val"  # a given split of which validation is still to be drawn
SEPARATOR = "|"  # between the labels of an image, as in ChestX-ray14

# File names that tell where an image comes from.
KNOWN_NAMES = {
    "ChestX-ray14": re.compile(r"^\d{8}_\d{3}\."),
    "Kermany": re.compile(r"^person\d+_(virus|bacteria)_\d+\.|^(NORMAL2-)?IM-\d{4}-\d{4}"),
}
NO_PATIENT = "image:"


@dataclass(frozen=True)
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
        view: PA, AP, LATERAL ... where the source tells it, else empty.
    """

    file: Path
    path: str
    label: str
    patient: str
    source: str
    split: str | None = None
    view: str = ""


@dataclass(frozen=True)
class Source:
    """All records of a source.

    Attributes:
        records: one for each image.
        task: multiclass (each image has one label) or multilabel (any number).
        classes: names in the order of the network's outputs.
        name: what was read, such as a data set and its release.
    """

    records: list[Record]
    task: Literal["multiclass", "multilabel"]
    classes: list[str]
    name: str


def labels_of(label: str) -> list[str]:
    """The labels that a record's or sample's label holds."""
    return label.split(SEPARATOR) if label else []


def read_source(config: PackConfig) -> Source:
    """Read all records of a source, sorted by path: the order of a table's rows tells nothing.

    Raises:
        CxrdistError: the source is missing, malformed, or has fewer than two classes.
    """
    for option, only in (
        ("against_rest", "chestxray14"),
        ("drop_unusable", "covid19-radiography"),
    ):
        if getattr(config, option) and config.source != only:
            raise CxrdistError(f"--{option.replace('_', '-')}: is for --source {only} only")
    if config.source == "csv":
        source = read_table(config.input, config.patient_pattern)
    else:
        source = read_folder(config.input, config.patient_pattern)
    _refuse_bad_classes(config.input, source)
    return replace(source, records=sorted(source.records, key=lambda record: record.path))


def _refuse_bad_classes(path: Path, source: Source) -> None:
    least = 1 if source.task == "multilabel" else 2
    if len(source.classes) < least:
        raise CxrdistError(
            f"--input {path}: found {len(source.classes)} class"
            f"{'' if len(source.classes) == 1 else 'es'} "
            f"({', '.join(source.classes) or 'none'}), expected at least {least}"
        )
    bad = next((name for name in source.classes if not name or SEPARATOR in name), None)
    if bad is not None:
        raise CxrdistError(f"--input {path}: class {bad!r}: expected a name without {SEPARATOR!r}")


def images_in(folder: Path) -> list[Path]:
    """All PNG, JPEG and DICOM files of a folder and the folders in it, sorted by name.

    DICOM files without a suffix are found by their preamble (DICOM PS3.10, section 7.1).
    """
    return sorted(
        (
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES or _is_bare_dicom(file)
        ),
        key=str,
    )


def _is_bare_dicom(file: Path) -> bool:
    """Whether a file without a suffix, or named by a UID, is DICOM."""
    if file.suffix and not re.fullmatch(r"[\d.]+", file.name):
        return False
    if file.name.startswith(".") or not file.is_file():
        return False
    with file.open("rb") as content:
        return content.read(132)[128:] == b"DICM"


def count_unmatched(records: list[Record]) -> int:
    """How many images are a patient of their own for want of a name that tells the patient."""
    return sum(record.patient.startswith(NO_PATIENT) for record in records)


def known_source(name: str, otherwise: str) -> str:
    """The data set whose file names look like this one, or what else the source is called."""
    return next((known for known, form in KNOWN_NAMES.items() if form.search(name)), otherwise)


def own_patient(path: str) -> str:
    """Stands for the patient of an image of which nothing tells the patient."""
    return f"{NO_PATIENT}{path}"


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CxrdistError(
            f"--patient-pattern {pattern!r}: no regular expression ({error})"
        ) from error
    if compiled.groups == 0:
        raise CxrdistError(
            f"--patient-pattern {pattern!r}: expected a group around the patient, such as ^(\\d+)_"
        )
    return compiled


def _patient(path: str, pattern: re.Pattern[str] | None) -> str:
    match = pattern.search(path.rsplit("/", 1)[-1]) if pattern else None
    named = next((group for group in match.groups() if group), None) if match else None
    return named or own_patient(path)


def read_folder(folder: Path, patient_pattern: str | None = None) -> Source:
    """Read the images of class folders.

    Args:
        folder: holds a folder of images for each class.
        patient_pattern: regular expression; the first group that matches in the file name is the
            patient. Without it, or where it does not match, an image is a patient of its own.

    Raises:
        CxrdistError: there is no such folder, or a class has no image.
    """
    pattern = _compile(patient_pattern)
    if not folder.is_dir():
        raise CxrdistError(f"--input {folder}: no such folder; expected one sub-folder per class")
    records = []
    for child in sorted(folder.iterdir(), key=str):
        if not child.is_dir() or child.name.startswith("."):
            continue
        files = images_in(child)
        if not files:
            raise CxrdistError(
                f"{child}: the class has no PNG, JPEG or DICOM image; add some or remove the folder"
            )
        for file in files:
            path = file.relative_to(folder).as_posix()
            source = known_source(file.name, folder.name)
            records.append(Record(file, path, child.name, _patient(path, pattern), source))
    return Source(records, "multiclass", sorted({r.label for r in records}), folder.name)


def read_table(table: Path, patient_pattern: str | None = None) -> Source:
    """Read the images that a CSV file lists.

    Args:
        table: has the columns path, and label or labels; optionally patient, split, source, view.
        patient_pattern: as for `read_folder`, for rows without a patient.

    Raises:
        CxrdistError: the table or a row of it is malformed, or a file is missing.
    """
    pattern = _compile(patient_pattern)
    if not table.is_file():
        raise CxrdistError(f"--input {table}: no such file; expected a CSV with path and label")
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or ()
        column = "labels" if "labels" in names else "label"
        missing = {"path", column} - set(names)
        if missing:
            raise CxrdistError(
                f"{table}: has no column {' and '.join(sorted(missing))}; expected path and label "
                f"(or labels), found {', '.join(names) or 'no header'}"
            )
        records = list(_rows(table, rows, column, pattern))
    for path, times in Counter(record.path for record in records).items():
        if times > 1:
            raise CxrdistError(f"{table}: {path} stands in {times} rows; keep one of them")
    if any(r.split for r in records) and not all(r.split for r in records):
        bare = next(i for i, r in enumerate(records, start=2) if not r.split)
        raise CxrdistError(
            f"{table} row {bare}: has no split while other rows have one; fill all or none"
        )
    classes = sorted({label for record in records for label in labels_of(record.label)})
    task: Literal["multiclass", "multilabel"] = "multilabel" if column == "labels" else "multiclass"
    return Source(records, task, classes, table.name)


def _rows(
    table: Path, rows: "csv.DictReader[str]", column: str, pattern: re.Pattern[str] | None
) -> Iterator[Record]:
    """Rows as records; a row number counts lines as a spreadsheet does, the header is row 1."""
    for number, row in enumerate(rows, start=2):
        where = f"{table} row {number}"
        cells = {name: (text or "").strip() for name, text in row.items() if isinstance(name, str)}
        if len(cells) < len(row):
            raise CxrdistError(f"{where}: more cells than columns; quote the commas")
        for name in ("path", "label"):
            if name in cells and not cells[name]:
                raise CxrdistError(f"{where}: {name} is empty; fill it or drop the row")
        split = cells.get("split") or None
        if split not in (None, *SPLITS):
            raise CxrdistError(f"{where}: split is {split!r}, expected train, val or test")
        if SEPARATOR in cells.get("label", ""):
            raise CxrdistError(
                f"{where}: label {cells['label']!r} holds several; call the column labels"
            )
        file = table.parent / cells["path"]
        if not file.is_file():
            raise CxrdistError(f"{where}: no file {file}; paths are relative to the table")
        path = Path(cells["path"]).as_posix()
        yield Record(
            file,
            path,
            SEPARATOR.join(sorted({x.strip() for x in cells[column].split(SEPARATOR)} - {""})),
            cells.get("patient") or _patient(path, pattern),
            cells.get("source") or known_source(Path(path).name, table.stem),
            split,
            cells.get("view", ""),
        )


def differences(source: Source, expect: Mapping[str, int]) -> list[str]:
    """In what the number of images of each class is not as expected, a line each."""
    found = Counter(label for record in source.records for label in labels_of(record.label))
    return [
        f"{name} has {found[name]} images, expected {number}"
        for name, number in expect.items()
        if found[name] != number
    ]
