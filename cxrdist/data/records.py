"""Records: one row about a raw image, from class folders or a CSV table."""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cxrdist.errors import CxrdistError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One raw image.

    Attributes:
        file: where to read it.
        path: its name relative to the source, with slashes; stable between machines.
        label: class name.
        patient: who was X-rayed; all images of a patient stay in one split.
        source: where the image comes from, for audits.
        split: train, val or test where the source fixes it.
    """

    file: Path
    path: str
    label: str
    patient: str
    source: str
    split: str | None = None


def read_records(source: str, path: Path, patient_pattern: str | None) -> list[Record]:
    """Read all records of a source.

    Args:
        source: ``folder`` or ``csv``.
        path: the folder or the table.
        patient_pattern: regular expression; the first group that matches in the file name is the
            patient. Without it, or where it does not match, an image is a patient of its own.

    Raises:
        CxrdistError: the source is missing, malformed, or has fewer than two classes.
    """
    pattern = _compile(patient_pattern)
    records = _folder(path, pattern) if source == "folder" else _table(path, pattern)
    classes = sorted({record.label for record in records})
    if len(classes) < 2:
        raise CxrdistError(
            f"--input {path}: found {len(classes)} class{'' if len(classes) == 1 else 'es'} "
            f"({', '.join(classes) or 'none'}), expected at least two"
        )
    return records


def images_in(folder: Path) -> list[Path]:
    """All PNG and JPEG files of a folder and the folders in it, by their names, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)


def count_unmatched(records: list[Record]) -> int:
    """How many images are a patient of their own for want of a name that tells the patient."""
    return sum(record.patient == _own_patient(record.path) for record in records)


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
    return named or _own_patient(path)


def _own_patient(path: str) -> str:
    return f"image:{path}"


def _folder(folder: Path, pattern: re.Pattern[str] | None) -> list[Record]:
    if not folder.is_dir():
        raise CxrdistError(f"--input {folder}: no such folder; expected one sub-folder per class")
    records = []
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        files = images_in(child)
        if not files:
            raise CxrdistError(
                f"{child}: the class has no PNG or JPEG image; add some or remove the folder"
            )
        for file in files:
            path = file.relative_to(folder).as_posix()
            records.append(Record(file, path, child.name, _patient(path, pattern), folder.name))
    return records


def _table(table: Path, pattern: re.Pattern[str] | None) -> list[Record]:
    if not table.is_file():
        raise CxrdistError(f"--input {table}: no such file; expected a CSV with path and label")
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"path", "label"} - set(rows.fieldnames or ())
        if missing:
            raise CxrdistError(
                f"{table}: has no column {' and '.join(sorted(missing))}; expected path and label, "
                f"found {', '.join(rows.fieldnames or ()) or 'no header'}"
            )
        records = [_row(table, number, row, pattern) for number, row in enumerate(rows, start=2)]
    for path, times in Counter(record.path for record in records).items():
        if times > 1:
            raise CxrdistError(f"{table}: {path} stands in {times} rows; keep one of them")
    if any(r.split for r in records) and not all(r.split for r in records):
        bare = next(i for i, r in enumerate(records, start=2) if not r.split)
        raise CxrdistError(
            f"{table} row {bare}: has no split while other rows have one; fill all or none"
        )
    return records


def _row(table: Path, number: int, row: dict[str, str], pattern: re.Pattern[str] | None) -> Record:
    """One row; a row number counts lines as a spreadsheet does, the header is row 1."""
    cells = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}
    if len(cells) < len(row):
        raise CxrdistError(f"{table} row {number}: more cells than columns; quote the commas")
    for name in ("path", "label"):
        if not cells[name]:
            raise CxrdistError(f"{table} row {number}: {name} is empty; fill it or drop the row")
    split = cells.get("split") or None
    if split not in (None, *SPLITS):
        raise CxrdistError(f"{table} row {number}: split is {split!r}, expected train, val or test")
    file = table.parent / cells["path"]
    if not file.is_file():
        raise CxrdistError(f"{table} row {number}: no file {file}; paths are relative to the table")
    path = Path(cells["path"]).as_posix()
    patient = cells.get("patient") or _patient(path, pattern)
    source = cells.get("source") or table.stem
    return Record(file, path, cells["label"], patient, source, split)
