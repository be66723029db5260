"""Sources: folders, tables and public data sets, read into records."""

import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cxrdist.config import PackConfig
from cxrdist.data.chestxray14 import read_chestxray14
from cxrdist.data.covid19_radiography import read_covid19_radiography
from cxrdist.data.found import find_images
from cxrdist.data.records import (
    SEPARATOR,
    SPLITS,
    Record,
    Source,
    known_source,
    labels_of,
    own_patient,
)
from cxrdist.errors import CxrdistError


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
    elif config.source == "covid19-radiography":
        source = read_covid19_radiography(config.input, drop_unusable=config.drop_unusable)
    elif config.source == "chestxray14":
        source = read_chestxray14(config.input, config.against_rest)
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
        files = find_images(child).images
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
