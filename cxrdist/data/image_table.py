"""Image tables: a CSV file that lists images with their labels."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cxrdist.data.found import LeftOut, escaped, look_at, walk
from cxrdist.data.labels import SEPARATOR, labels_of
from cxrdist.data.patients import age_of, compile_pattern, patient_of, sex_of
from cxrdist.data.records import SPLIT_NAMES, Record, Source, known_source
from cxrdist.data.tables import Row, Table, plain, read_table
from cxrdist.errors import CxrdistError

COLUMNS = {
    "path": {"path", "filepath", "imagepath"},
    "label": {"label"},
    "labels": {"labels"},
    "patient": {"patient", "patientid"},
    "split": {"split"},
    "source": {"source"},
    "view": {"view", "viewposition"},
    "sex": {"sex", "gender", "patientsex", "patientgender"},
    "age": {"age", "patientage", "ageyears"},
}
# Columns that may be meant, and would mislead if they were left aside without a word.
LOOK_ALIKES = {
    "patient": {
        *("subject", "subjectid", "person", "personid", "participant", "participantid", "case"),
        *("caseid", "patients", "patientname", "patientnumber", "patientno", "patientnr", "mrn"),
        *("pid", "patid", "ptid"),
    },
    "split": {
        *("splits", "set", "subset", "partition", "fold", "phase", "datasplit", "splitname"),
        *("traintest", "trainvaltest", "traintestsplit", "istest", "istrain"),
    },
    "label": {"lable"},
}
NOT_IN_TABLE = "not in the table"
TABLE = "the table itself"
NO_FINDING = "nofinding"
MISSING = {"nan", "null", "n/a", "na", "#n/a", "<na>", "nat"}  # as programs write a missing value


@dataclass(frozen=True)
class _Reader:
    """What is needed to make a record of a row."""

    table: Table
    places: dict[str, int]
    pattern: re.Pattern[str] | None
    allow_outside: bool

    def record(self, row: Row) -> Record:
        """The record of a row.

        Raises:
            CxrdistError: a cell is no such thing, or the file is missing.
        """
        cells = {name: row.cells[place].strip() for name, place in self.places.items()}
        for name in ("path", "label"):
            if name in cells and not cells[name]:
                raise CxrdistError(f"{row.where}: {name} is empty; fill it or drop the row")
        path = self._path(row.where, cells["path"])
        file = self.table.file.parent / path
        if not _is_file(file):
            raise CxrdistError(
                f"{row.where}: no file {str(file)[:300]}; paths are relative to the table"
            )
        return Record(
            file,
            path,
            _label(row.where, cells),
            _patient(row.where, cells) or patient_of(path, self.pattern),
            cells.get("source") or known_source(Path(path).name, self.table.file.stem),
            _split(row.where, cells),
            cells.get("view", ""),
            sex=sex_of(cells.get("sex", "")),
            age=age_of(cells.get("age", "")),
        )

    def _path(self, where: str, cell: str) -> str:
        """The path without ``./`` and ``a/../``, so that one file has one spelling."""
        path = os.path.normpath(cell).replace(os.sep, "/")
        outside = path.startswith(("/", "../")) or path == ".."
        if outside and not self.allow_outside:
            raise CxrdistError(
                f"{where}: {cell} is outside of the table's folder; move the images there, or read "
                "them where they are with --allow-outside"
            )
        return path


def read_image_table(
    file: Path,
    patient_pattern: str | None = None,
    *,
    allow_outside: bool = False,
    besides: Sequence[Path] = (),
) -> Source:
    """Read the images that a CSV file lists.

    Args:
        file: has the columns path, and label or labels; optionally patient, split, source, view,
            sex, age.
        patient_pattern: as for `read_class_folders`, for rows without a patient.
        allow_outside: whether paths may lead out of the table's folder.
        besides: folders that are not looked into for images that the table does not list.

    Raises:
        CxrdistError: the table or a row of it is malformed, or a file is missing.
    """
    pattern = compile_pattern(patient_pattern)
    if not file.is_file():
        raise CxrdistError(f"--input {file}: no such file; expected a CSV with path and label")
    table = read_table(file, {name for names in COLUMNS.values() for name in names})
    places = _find_columns(table)
    reader = _Reader(table, places, pattern, allow_outside)
    rows = list(table.rows())
    records = [reader.record(row) for row in rows]
    _refuse_bad_columns(file, rows, records)
    task: Literal["multiclass", "multilabel"] = "multilabel" if "labels" in places else "multiclass"
    left_out, num_found = _find_unlisted(file, records, besides)
    return Source(
        records,
        task,
        sorted({label for record in records for label in labels_of(record.label)}),
        file.name,
        (*table.notes, *_notes(table, places, rows, records)),
        tuple(sorted(left_out)),
        num_found,
        any(look_at(record.file)[0] == "DICOM" for record in records),
    )


def _find_columns(table: Table) -> dict[str, int]:
    places = table.find_columns(COLUMNS)
    labels = [name for name in ("label", "labels") if name in places]
    if "path" not in places or not labels:
        missing = [name for name in ("path", "label") if name not in places]
        raise CxrdistError(
            f"{table.file}: has no column {' and '.join(missing)}; expected path and label "
            f"(or labels), found {', '.join(table.columns) or 'no header'}"
        )
    if len(labels) > 1:
        raise CxrdistError(
            f"{table.file}: has the columns label and labels; remove or rename one of them"
        )
    for name, spellings in LOOK_ALIKES.items():
        like = [column for column in table.columns if plain(column) in spellings]
        if like and name not in places and (name != "label" or not labels):
            raise CxrdistError(
                f"{table.file}: the column {like[0]!r} may be meant as the {name}; call it {name} "
                f"if it is, or rename it, such as to other_{like[0]}"
            )
    return places


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # its name is too long, or a folder above it closed
        return False


def _label(where: str, cells: dict[str, str]) -> str:
    """The labels of a row with ``|`` between them; ``No Finding`` stands for none of several."""
    if "label" in cells:
        names = [cells["label"]]
        if SEPARATOR in names[0]:
            raise CxrdistError(f"{where}: label {names[0]!r} holds several; call the column labels")
    else:
        names = sorted({name.strip() for name in cells["labels"].split(SEPARATOR)} - {""})
        known = [name for name in names if plain(name) != NO_FINDING]
        if known and len(known) < len(names):
            raise CxrdistError(f"{where}: has No Finding beside {known[0]}; remove one of them")
        names = known
    empty = MISSING if "label" in cells else {*MISSING, "none"}
    missing = next((name for name in names if name.casefold() in empty), None)
    if missing is not None:
        mend = "fill it or drop the row" if "label" in cells else "leave it empty if it has none"
        raise CxrdistError(f"{where}: label {missing!r} stands for a missing value; {mend}")
    return SEPARATOR.join(names)


def _patient(where: str, cells: dict[str, str]) -> str:
    patient = cells.get("patient", "")
    if patient.casefold() in {*MISSING, "none"}:
        raise CxrdistError(
            f"{where}: patient {patient!r} stands for a missing value; leave it empty, then the "
            "image counts as a patient of its own"
        )
    return patient


def _split(where: str, cells: dict[str, str]) -> str | None:
    split = cells.get("split", "")
    if split and split.casefold() not in SPLIT_NAMES:
        raise CxrdistError(f"{where}: split is {split!r}, expected train, val or test")
    return SPLIT_NAMES[split.casefold()] if split else None


def _refuse_bad_columns(file: Path, rows: Sequence[Row], records: Sequence[Record]) -> None:
    """What a row alone does not tell: paths twice, splits in part, names that are almost equal."""
    for path, times in Counter(record.path for record in records).items():
        if times > 1:
            raise CxrdistError(f"{file}: {path} stands in {times} rows; keep one of them")
    bare = next((row for row, r in zip(rows, records, strict=True) if not r.split), None)
    if bare is not None and any(record.split for record in records):
        raise CxrdistError(
            f"{bare.where}: has no split while other rows have one; fill all or none"
        )
    patients = {record.patient for record in records}
    number = next((name for name in patients if f"{name}.0" in patients), None)
    if number is not None:
        raise CxrdistError(
            f"{file}: patients {number!r} and {number + '.0'!r} are written in two ways; write "
            "each in one"
        )


def _notes(
    table: Table, places: dict[str, int], rows: Sequence[Row], records: Sequence[Record]
) -> list[str]:
    """What was not taken from the table, a line each."""
    aside = [x or "(no name)" for i, x in enumerate(table.columns) if i not in places.values()]
    notes = [f"columns left aside: {', '.join(aside)}"] if aside else []
    for name, what, expected in (
        ("sex", [record.sex for record in records], "M or F"),
        ("age", [record.age for record in records], "0 to 120 years"),
    ):
        if name in places:
            pairs = zip(rows, what, strict=True)
            lost = sum(
                bool(row.cells[places[name]].strip()) and x in ("", None) for row, x in pairs
            )
            notes += [f"{name} is not {expected} in {lost} rows, and empty there"] if lost else []
    nones = sum(record.label.casefold() == "none" for record in records)
    if nones:
        notes.append(f"{nones} images have the label 'none', which is a class like any other")
    return notes


def _find_unlisted(
    file: Path, records: Sequence[Record], besides: Sequence[Path]
) -> tuple[list[LeftOut], int]:
    """Files below the table's folder that no row lists, and how many files there are in all."""
    walked = dict(walk(file.parent, besides))
    listed = {record.file for record in records}
    # A row may lead through a link, or out of the folder, to a file of another name.
    elsewhere = {path.resolve() for path in listed - walked.keys()}
    num_found = len(walked) + len(elsewhere)
    left_out = []
    for path, reason in walked.items():
        if path in listed:
            continue
        if elsewhere and path.resolve() in elsewhere:
            num_found -= 1
            continue
        reason = TABLE if path == file else reason or NOT_IN_TABLE
        left_out.append(LeftOut(escaped(path.relative_to(file.parent).as_posix()), reason))
    return left_out, num_found
