"""Predictions of any program: a CSV file, read as scored images.

It has a column key (or path), one prob_CLASS per class, and label or labels; optionally also
patient, split, source, view, sex, age, uncertain and missing. If there is also one logit_CLASS per
class, as in predictions.csv, these rank the images, because probabilities near 1 are equal once
rounded. File encodings and separators are those of `cxrdist.data.tables`, column names those of
`cxrdist.data.image_table`.

An image has one label if the column is called label and each of its cells names one class. It may
have several or none if the column is called labels, if a cell of label contains ``|``, if there is
a column uncertain or missing, or if there is only one class.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit

from cxrdist.data import image_table
from cxrdist.data.index import MOST_CLASSES
from cxrdist.data.labels import SEPARATOR, label_matrix
from cxrdist.data.patients import MOST_YEARS, age_of, sex_of
from cxrdist.data.records import SPLIT_NAMES, own_patient
from cxrdist.data.tables import Row, Table, float_of, plain, read_table
from cxrdist.data.views import view_of
from cxrdist.documents import FLOAT32, Between
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.scored import STATED, Scored

COLUMNS = {"key": {"key"}, **image_table.COLUMNS}
MOST_IMAGES = 500_000  # MIMIC-CXR has 377,110; the replicates then take 1 GB
CERTAIN_LOGIT = 40.0  # at least, for a probability of 1; its sigmoid is 1 in float64
SCALE = "prob_ columns are probabilities, logit_ columns log(p / (1 - p)); convert other scores"


@dataclass(frozen=True)
class PredictionTable:
    """The N images of a table of predictions.

    Attributes:
        scored: the images.
        probabilities: float64 [N, classes], as given.
        splits: split of each image; empty if the table has no column split.
        notes: assumptions made about the table, one per line.
    """

    scored: Scored
    probabilities: NDArray[np.float64]
    splits: list[str]
    notes: tuple[str, ...]


def read_prediction_table(file: Path) -> PredictionTable:
    """Read the predictions of any program.

    Raises:
        CxrdistError: the table or a row is malformed, or it has too many rows or classes.
    """
    table = read_table(file, {name for names in COLUMNS.values() for name in names})
    positions, classes = _find_columns(table), _find_classes(table, "prob_")
    if not 0 < len(classes) <= MOST_CLASSES:
        raise CxrdistError(
            f"{file}: has {len(classes)} columns prob_CLASS, expected 1 to {MOST_CLASSES}; found "
            f"{', '.join(table.columns)[:300]}"
        )
    rows = list(islice(table.rows(), MOST_IMAGES + 1))
    if len(rows) > MOST_IMAGES:
        raise CxrdistError(f"{file}: has more than {MOST_IMAGES} rows, expected fewer")
    if not rows:
        raise CxrdistError(f"{file}: has no rows below the header; give at least one image")
    cells = {name: [row.cells[i].strip() for row in rows] for name, i in positions.items()}
    keys = _keys(rows, cells["key"])
    task, texts = _labels(rows, cells, list(classes))
    probabilities = _numbers(rows, "prob_", classes, Between(0, 1))
    logit_columns = _find_classes(table, "logit_")
    if logit_columns.keys() == classes.keys():
        logits = _numbers(rows, "logit_", {n: logit_columns[n] for n in classes}, FLOAT32)
    else:
        logit_columns, logits = {}, to_logits(probabilities)
    named = cells.get("patient") or [""] * len(rows)
    patients = [
        image_table.patient_in(row.where, patient) for row, patient in zip(rows, named, strict=True)
    ]
    image_table.refuse_two_spellings(file, patients)
    groups, notes = _groups(cells)
    taken = {*positions.values(), *classes.values(), *logit_columns.values()}
    if "split" not in positions:
        image_table.refuse_unread_splits(table, rows, taken)
    unused = [name or "(no name)" for i, name in enumerate(table.columns) if i not in taken]
    scored = Scored(
        task,
        list(classes),
        keys,
        [patient or own_patient(key) for patient, key in zip(patients, keys, strict=True)],
        label_matrix({code: texts[name] for name, code in STATED.items()}, list(classes)),
        logits,
        {name: values for name, values in groups.items() if any(values)},
    )
    notes += [f"columns that were not used: {', '.join(unused)}"] if unused else []
    splits = _splits(rows, cells)
    notes += _shared_patients(scored.patients, splits)
    return PredictionTable(scored, probabilities, splits, (*table.notes, *notes))


def to_logits(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of probabilities of any shape.

    Probabilities of exactly 0 or 1 become finite logits beyond all others of the table.
    """
    with np.errstate(divide="ignore"):
        logits: NDArray[np.float64] = logit(probabilities)
    finite = np.isfinite(logits)
    edge = max(CERTAIN_LOGIT, 1 + np.abs(logits[finite]).max(initial=0.0))
    return np.where(finite, logits, np.copysign(edge, logits))


def _find_columns(table: Table) -> dict[str, int]:
    """Find the position of each known column, with ``path`` as ``key``."""
    positions = table.find_columns(COLUMNS)
    if "path" in positions:  # as `cxrdist predict` calls it
        positions.setdefault("key", positions.pop("path"))
    has_label = [name for name in ("label", "labels") if name in positions]
    for name, present in (("key", "key" in positions), ("label", bool(has_label))):
        if not present:
            raise CxrdistError(
                f"{table.file}: has no column {name}; expected key, label and prob_CLASS for each "
                f"class, found {', '.join(table.columns)[:300] or 'no header'}"
            )
    if len(has_label) > 1:
        raise CxrdistError(f"{table.file}: has the columns label and labels; remove one of them")
    image_table.refuse_look_alikes(table, {*positions, "label"})
    return positions


def _find_classes(table: Table, prefix: str) -> dict[str, int]:
    """Find the column of each class, in the order of the table."""
    columns: dict[str, int] = {}
    for i, column in enumerate(table.columns):
        name = column.removeprefix(prefix).strip()
        if not column.startswith(prefix):
            continue
        if not name or SEPARATOR in name or len(name) > 255 or name in columns:
            fault = "a second time" if name in columns else "without a valid class name"
            raise CxrdistError(
                f"{table.file}: has the column {column!r:.80} {fault}; expected {prefix}CLASS once "
                "for each class, 1 to 255 characters without |"
            )
        columns[name] = i
    return columns


def _keys(rows: Sequence[Row], keys: list[str]) -> list[str]:
    """Check that each image has a unique key."""
    first: dict[str, Row] = {}
    for row, key in zip(rows, keys, strict=True):
        if not key:
            raise CxrdistError(f"{row.where}: key is empty; fill it or drop the row")
        if key in first:
            raise CxrdistError(
                f"{row.where}: key {key!r:.80} is also in {first[key].where}; keep one row per "
                "image"
            )
        first[key] = row
    return keys


def _labels(
    rows: Sequence[Row], cells: Mapping[str, list[str]], classes: list[str]
) -> tuple[str, dict[str, list[str]]]:
    """Read the labels and infer the task.

    Returns:
        The task, and the columns label, uncertain and missing with ``|`` between labels.
    """
    stated = cells.get("label") or cells["labels"]
    several = (
        "labels" in cells
        or "uncertain" in cells
        or "missing" in cells
        or len(classes) == 1
        or any(SEPARATOR in text for text in stated)
    )
    nothing = [""] * len(rows)
    texts = {"label": stated, **{name: cells.get(name, nothing) for name in image_table.OPEN}}
    columns: dict[str, list[str]] = {name: [] for name in texts}
    for i, row in enumerate(rows):
        named = {name: _names(texts[name][i], classes) for name in texts}
        every = [label for names in named.values() for label in names]
        if not several and not named["label"]:
            raise CxrdistError(
                f"{row.where}: label is empty; fill it or drop the row (call the column labels if "
                "an image may have several labels or none)"
            )
        if stray := [label for label in every if label not in classes]:
            raise CxrdistError(
                f"{row.where}: label {stray[0]!r:.80} has no column prob_{stray[0][:80]}; the "
                f"table has {', '.join(classes)[:300]}"
            )
        if twice := [label for label, times in Counter(every).items() if times > 1]:
            raise CxrdistError(f"{row.where}: {twice[0]} is named twice; keep one of them")
        for name, names in named.items():
            columns[name].append(SEPARATOR.join(names))
    return "multilabel" if several else "multiclass", columns


def _names(cell: str, classes: Sequence[str]) -> list[str]:
    """Return the labels of a cell; No Finding means no label unless it is a class."""
    names = [name for part in cell.split(SEPARATOR) if (name := part.strip())]
    return [name for name in names if name in classes or plain(name) != image_table.NO_FINDING]


def _numbers(
    rows: Sequence[Row], prefix: str, positions: Mapping[str, int], bounds: Between
) -> NDArray[np.float64]:
    """Read one number per class, float64 [N, classes]; a decimal comma is read as a point."""
    values = np.empty((len(rows), len(positions)))
    for i, row in enumerate(rows):
        for column, (name, position) in enumerate(positions.items()):
            text = row.cells[position].strip()
            values[i, column] = float_of(text.replace(",", "."))  # NaN is outside all bounds
            if expected := bounds.expected(values[i, column]):
                raise CxrdistError(
                    f"{row.where}: {prefix}{name} is {text!r:.40}, expected {expected}; {SCALE}"
                )
    return values


def _splits(rows: Sequence[Row], cells: Mapping[str, list[str]]) -> list[str]:
    """Read the splits."""
    splits = []
    # Not strict: without the column there are no cells, and no splits.
    for row, text in zip(rows, cells.get("split", ()), strict=False):
        split = SPLIT_NAMES.get(text.casefold())
        if split is None:
            raise CxrdistError(f"{row.where}: split is {text!r:.40}, expected train, val or test")
        splits.append(split)
    if splits and "test" not in splits:
        # A row knows its file only as a part of `where`, FILE row NUMBER.
        raise CxrdistError(
            f"{rows[0].where.rpartition(' row ')[0]}: no row has the split test; mark the images "
            "to score as test, or remove the column"
        )
    return splits


def _shared_patients(patients: Sequence[str], splits: Sequence[str]) -> list[str]:
    """Return a note if patients of test images are in train or val too."""
    in_test, others = set[str](), set[str]()
    for patient, split in zip(patients, splits, strict=False):
        (in_test if split == "test" else others).add(patient)
    shared = len(in_test & others)
    return [f"{shared} patients of test images have images in train or val too"] * bool(shared)


def _groups(cells: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """Read source, view, sex and age as in shards, with notes on cells that could not be read."""
    groups = {"source": list(cells.get("source", ()))}
    notes = []
    for name, read, expected in (
        ("view", lambda text: view_of(text) or "", "a known view"),
        ("sex", sex_of, "M or F"),
        ("age", _age, f"0 to {MOST_YEARS:g} years"),
    ):
        texts = cells.get(name, [])
        groups[name] = [read(text) for text in texts]
        lost = sum(
            bool(text) and not value for text, value in zip(texts, groups[name], strict=True)
        )
        notes += [f"{name} is not {expected} in {lost} rows, and counts as unknown"] if lost else []
    return groups, notes


def _age(text: str) -> str:
    age = age_of(text)
    return "" if age is None else f"{age:g}"
