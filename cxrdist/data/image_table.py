"""Image tables: a CSV file that lists images with their labels.

Images have one label (column label) or several: in the columns labels, uncertain and missing, or
in one column per label, with the cells that `cxrdist.data.labels` reads.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxrdist.data.found import LeftOut, absolute, escaped, look_at, walk
from cxrdist.data.labels import CELLS, SEPARATOR, labels_of, read_cells
from cxrdist.data.listed import NOT_IN_TABLE
from cxrdist.data.patients import (
    MOST_YEARS,
    age_of,
    compile_pattern,
    patient_of,
    refuse_rounded,
    sex_of,
)
from cxrdist.data.records import SPLIT_NAMES, Record, Source, known_source
from cxrdist.data.tables import Row, Table, plain, read_table
from cxrdist.data.views import UNKNOWN, view_of
from cxrdist.errors import CxrdistError

COLUMNS = {
    "path": {"path", "filepath", "imagepath"},
    "label": {"label"},
    "labels": {"labels"},
    "uncertain": {"uncertain"},
    "missing": {"missing"},
    "patient": {"patient", "patientid"},
    "split": {"split"},
    "source": {"source"},
    "view": {"view", "viewposition"},
    "sex": {"sex", "gender", "patientsex", "patientgender"},
    "age": {"age", "patientage", "ageyears"},
}
# Columns that may be meant as one of `COLUMNS`: silently ignoring them would mislead the user.
LOOK_ALIKES = {
    "patient": re.compile(
        "(patient|subject|person|participant|case)s?(id|uid|identifier|n[or]|num|number|name|code"
        "|key|hash)?s?|(pat|pt|p|record|hospital)(id|n[or]|num|number)|mrn"
    ),
    "split": re.compile(
        "(data|train(val)?test)?splits?(name|type)?|(sub)?set|partition|(cv|k)?folds?|phase"
        "|train(val)?test|is(train|val|valid|validation|test)(ing)?"
    ),
    "label": re.compile(
        "lable|class(es)?|category|diagnos[ie]s|diseases?|findings?|findinglabels|patholog(y|ies)"
        "|targets?"
    ),
}
TABLE = "the table itself"
OPEN = ("uncertain", "missing")
NO_FINDING = "nofinding"
# As programs write a missing value. Not "none": as the only label of an image it may be a class.
MISSING = {"nan", "null", "n/a", "na", "#n/a", "<na>", "nat"}


@dataclass(frozen=True)
class _Reader:
    """Turns the rows of a table into records."""

    table: Table
    positions: dict[str, int]
    label_positions: dict[str, int]
    pattern: re.Pattern[str] | None
    allow_outside: bool

    def record(self, row: Row) -> Record:
        """Return the record of a row; reject an invalid cell and a missing file."""
        cells = {name: row.cells[position].strip() for name, position in self.positions.items()}
        for name in ("path", "label"):
            if name in cells and not cells[name]:
                raise CxrdistError(f"{row.where}: {name} is empty; fill it or drop the row")
        path = self._path(row.where, cells["path"])
        file = self.table.file.parent / path
        if not _is_file(file):
            raise CxrdistError(
                f"{row.where}: no file {str(file)[:300]}; paths are relative to the table"
            )
        labels = self._labels(row, cells)
        return Record(
            file,
            path,
            labels["label"],
            patient_in(row.where, cells.get("patient", "")) or patient_of(path, self.pattern),
            cells.get("source") or known_source(Path(path).name, self.table.file.stem),
            _split(row.where, cells),
            view_of(cells.get("view", "")) or UNKNOWN,
            sex=sex_of(cells.get("sex", "")),
            age=age_of(cells.get("age", "")),
            uncertain=labels.get("uncertain", ""),
            missing=labels.get("missing", ""),
        )

    def _labels(self, row: Row, cells: dict[str, str]) -> dict[str, str]:
        """Return label, uncertain and missing, as `Record` has them."""
        if self.label_positions:
            return read_cells(row.where, {n: row.cells[i] for n, i in self.label_positions.items()})
        if "label" in cells:
            return {"label": _one_label(row.where, cells["label"])}
        labels = {
            "label": _several_labels(row.where, cells["labels"]),
            **{n: _several_labels(row.where, cells[n]) for n in OPEN if n in cells},
        }
        named = Counter(name for text in labels.values() for name in labels_of(text))
        if twice := [name for name, times in named.items() if times > 1]:
            raise CxrdistError(
                f"{row.where}: {twice[0]} is in two of labels, uncertain and missing; keep one"
            )
        return labels

    def _path(self, where: str, cell: str) -> str:
        """Return the path without ``./`` and ``a/../``, so that one file has one spelling."""
        path = os.path.normpath(cell).replace(os.sep, "/")
        outside = path.startswith(("/", "../")) or path == ".."
        if outside and not self.allow_outside:
            raise CxrdistError(
                f"{where}: {cell} is outside of the table's folder; move the images there, or give "
                "--allow-outside"
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

    Its columns are path, and label or labels or one per label; optionally patient, split, source,
    view, sex, age, and with labels also uncertain and missing. The pattern is that of
    `read_class_folders`, for rows without a patient. Paths may lead out of the table's folder if
    ``allow_outside``. Images that the table does not list are left out, except those in folders of
    ``besides``, which are skipped.

    Raises:
        CxrdistError: the table or a row of it is malformed, or a file is missing.
    """
    pattern = compile_pattern(patient_pattern)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise CxrdistError(f"--input {file}: {what}; expected a CSV with path and label")
    table = read_table(file, {name for names in COLUMNS.values() for name in names})
    positions, rows = _find_columns(table), list(table.rows())
    has_label = {"label", "labels"} & positions.keys()
    label_positions = {} if has_label else _find_labels(table, positions, rows)
    reader = _Reader(table, positions, label_positions, pattern, allow_outside)
    if "split" not in positions:
        refuse_unread_splits(table, rows, {*positions.values(), *label_positions.values()})
    records = [reader.record(row) for row in rows]
    _refuse_bad_columns(file, rows, records)
    left_out, num_found = _find_unlisted(file, records, besides)
    return Source(
        records,
        "multiclass" if "label" in positions else "multilabel",
        list(label_positions) or _classes(records),
        file.name,
        (*table.notes, *_notes(reader, rows, records)),
        tuple(sorted(left_out)),
        num_found,
        any(look_at(record.file)[0] == "DICOM" for record in records),
    )


def _find_columns(table: Table) -> dict[str, int]:
    positions = table.find_columns(COLUMNS)
    labels = [name for name in ("label", "labels") if name in positions]
    if "path" not in positions:
        raise CxrdistError(
            f"{table.file}: has no column path; expected path and label (or labels), found "
            f"{', '.join(table.columns) or 'no header'}"
        )
    if len(labels) > 1:
        raise CxrdistError(
            f"{table.file}: has the columns label and labels; remove or rename one of them"
        )
    stray = next((table.columns[positions[name]] for name in OPEN if name in positions), None)
    if stray is not None and labels != ["labels"]:
        raise CxrdistError(
            f"{table.file}: the column {stray!r} needs a column labels, for several labels per "
            "image; rename one of them"
        )
    # Beside a column labels, a diagnosis is another fact about the image, and no lost label.
    refuse_look_alikes(table, {**positions, "label": 0} if labels else positions)
    return positions


def refuse_look_alikes(table: Table, names: Collection[str]) -> None:
    """Reject a column that may be meant as the patient, split or label, unless that is in names."""
    for name, spellings in LOOK_ALIKES.items():
        like = next((c for c in table.columns if spellings.fullmatch(plain(c))), None)
        if like and name not in names:
            raise CxrdistError(
                f"{table.file}: the column {like!r} may be meant as the {name}; call it {name} if "
                f"it is, or rename it, such as to other_{like}"
            )


def refuse_unread_splits(table: Table, rows: Sequence[Row], used: Collection[int]) -> None:
    """Reject a column beside the used ones that has nothing but splits, whatever its name."""
    for i, column in enumerate(table.columns):
        if i not in used and rows and all(_names_split(row.cells[i]) for row in rows):
            raise CxrdistError(
                f"{table.file}: the column {column!r} has nothing but train, val and test; call it "
                "split, or remove it"
            )


def _names_split(cell: str) -> bool:
    return cell.strip().casefold() in SPLIT_NAMES


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # its name is too long, or a folder above it may not be read
        return False


def _find_labels(table: Table, positions: dict[str, int], rows: Sequence[Row]) -> dict[str, int]:
    """Find the columns of labels: those whose cells are all in `CELLS`.

    Columns without a name, and those in which most cells are something else, are ignored. A column
    in which a few cells are something else is refused: it may be meant as a label.
    """
    label_columns: dict[str, int] = {}
    for position, name in enumerate(table.columns):
        if position in positions.values() or not name:
            continue
        cells = [row.cells[position].strip().casefold() for row in rows]
        stray = next((i for i, cell in enumerate(cells) if cell not in CELLS), None)
        if stray is None:
            if name in label_columns:
                raise CxrdistError(
                    f"{table.file}: two columns of labels are called {name}; rename or remove one"
                )
            label_columns[name] = position
            continue
        filled = [cell for cell in cells if cell]
        num_like = sum(cell in CELLS or cell in MISSING for cell in filled)
        # A column of missing values alone has no cell like a label's, and is only ignored.
        if 2 * num_like > len(filled) and any(cell in CELLS for cell in filled):
            raise CxrdistError(
                f"{rows[stray].where}: {name} is {rows[stray].cells[position]!r:.40}, but most of "
                "its column is 1, 0, -1 or U like a label; correct the cell (empty: not known), or "
                "remove the column"
            )
    # An empty cell is a missing label, so empty columns pass for labels, but not they alone.
    if not any(row.cells[position].strip() for row in rows for position in label_columns.values()):
        raise CxrdistError(
            f"{table.file}: has no column label; expected path and label (or labels), or a column "
            "of 1, 0, -1, U or empty cells per label, found "
            f"{', '.join(table.columns)}"
        )
    return label_columns


def _classes(records: Sequence[Record]) -> list[str]:
    """Return all labels that some row names, also as uncertain or missing."""
    texts = {text for r in records for text in (r.label, r.uncertain, r.missing)}
    return sorted({label for text in texts for label in labels_of(text)})


def _one_label(where: str, name: str) -> str:
    """Return the label of a row, which must be a single one."""
    if SEPARATOR in name:
        raise CxrdistError(f"{where}: label {name!r} has several; call the column labels")
    if name.casefold() in MISSING:
        raise CxrdistError(
            f"{where}: label {name!r} stands for a missing value; fill it or drop the row"
        )
    return name


def _several_labels(where: str, cell: str) -> str:
    """Return the labels of a cell separated by ``|``; ``No Finding`` means that there is none."""
    names = sorted({name.strip() for name in cell.split(SEPARATOR)} - {""})
    known = [name for name in names if plain(name) != NO_FINDING]
    if known and len(known) < len(names):
        raise CxrdistError(f"{where}: has No Finding beside {known[0]}; remove one of them")
    missing = next((name for name in known if name.casefold() in {*MISSING, "none"}), None)
    if missing is not None:
        raise CxrdistError(
            f"{where}: label {missing!r} stands for a missing value; leave it empty if it has none"
        )
    return SEPARATOR.join(known)


def patient_in(where: str, patient: str) -> str:
    """Return the patient of a row, empty if unknown.

    Raises:
        CxrdistError: it stands for a missing value, or is a rounded number.
    """
    if patient.casefold() in {*MISSING, "none"}:
        raise CxrdistError(
            f"{where}: patient {patient!r} stands for a missing value; leave it empty, so that the "
            "image counts as a patient of its own"
        )
    refuse_rounded(where, patient)
    return patient


def _split(where: str, cells: dict[str, str]) -> str | None:
    split = cells.get("split", "")
    if split and split.casefold() not in SPLIT_NAMES:
        raise CxrdistError(f"{where}: split is {split!r}, expected train, val or test")
    return SPLIT_NAMES[split.casefold()] if split else None


def _refuse_bad_columns(file: Path, rows: Sequence[Row], records: Sequence[Record]) -> None:
    """Reject duplicate files, splits in only some rows, and patients in two spellings."""
    # By file: with --allow-outside a relative and an absolute path may lead to the same one.
    for path, times in Counter(absolute(record.file) for record in records).items():
        if times > 1:
            name = next(record.path for record in records if absolute(record.file) == path)
            raise CxrdistError(f"{file}: {name} is in {times} rows; keep one of them")
    bare = next((row for row, r in zip(rows, records, strict=True) if not r.split), None)
    if bare is not None and any(record.split for record in records):
        raise CxrdistError(
            f"{bare.where}: has no split while other rows have one; fill all or none"
        )
    refuse_two_spellings(file, (record.patient for record in records))


def refuse_two_spellings(file: Path, patients: Iterable[str]) -> None:
    """Reject patients that are the same number, such as 7, 7.0 and 007."""
    spellings: dict[str, str] = {}
    for patient in sorted({*patients}):
        number = re.fullmatch(r"0*(\d+)(\.0*)?", patient)
        other = spellings.setdefault(number[1] if number else patient, patient)
        if other != patient:
            raise CxrdistError(
                f"{file}: patients {other!r} and {patient!r} are two spellings of one; write all "
                "in the same way"
            )


def _notes(reader: _Reader, rows: Sequence[Row], records: Sequence[Record]) -> Iterator[str]:
    """Yield notes on the columns of labels, ignored columns and invalid cells, a line each."""
    positions, labels = reader.positions, reader.label_positions

    def cells(position: int) -> list[str]:
        return [row.cells[position].strip() for row in rows]

    if labels:
        yield f"columns of labels: {', '.join(labels)}"
    if empty := [name for name, position in labels.items() if not any(cells(position))]:
        yield f"columns of labels without a filled cell: {', '.join(empty)}"
    used = {*positions.values(), *labels.values()}
    if ignored := [x or "(no name)" for i, x in enumerate(reader.table.columns) if i not in used]:
        yield f"ignored columns: {', '.join(ignored)}"
    for name, expected in (("sex", "M or F"), ("age", f"0 to {MOST_YEARS:g} years")):
        if name in positions:
            pairs = zip(cells(positions[name]), records, strict=True)
            lost = sum(cell != "" and getattr(record, name) in ("", None) for cell, record in pairs)
            if lost:
                yield f"{name} is not {expected} in {lost} rows; it is left empty"
    views = cells(positions["view"]) if "view" in positions else []
    if strange := [view for view in views if view_of(view) is None]:
        yield (
            f"view is not known in {len(strange)} rows, such as {strange[0]!r:.40}; it is left "
            "empty"
        )
    if nones := sum(record.label.casefold() == "none" for record in records):
        yield f"{nones} images have the label 'none', which is a class like any other"


def _find_unlisted(
    file: Path, records: Sequence[Record], besides: Sequence[Path]
) -> tuple[list[LeftOut], int]:
    """Return the files below the table's folder that no row lists, and the number of all files."""
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
