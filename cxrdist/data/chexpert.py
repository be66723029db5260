"""CheXpert (Irvin et al. 2019) as published by Stanford AIMI and on Kaggle, v1.0 and v1.0-small.

Not read: labels of other labellers (CheXbert, visualCheXbert), the single readings of radiologists
on the test set, the segmentations of CheXlocalize, and the table and reports of CheXpert Plus.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cxrdist.data.labels import read_cells
from cxrdist.data.listed import Listed
from cxrdist.data.patients import age_of, sex_of
from cxrdist.data.records import DEVELOPMENT, Record, Source
from cxrdist.data.tables import Table, plain, read_table
from cxrdist.data.views import LATERAL, view_in_name, view_of
from cxrdist.errors import CxrdistError

NAME = "CheXpert"
# In the order of the tables; the labeller writes No Finding like any other label.
LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
# Names of the table of each image folder: in CheXpert, in CheXlocalize (which has the images of the
# test set), and in the repository cheXpert-test-set-labels. The first one that exists is read.
TABLES = {
    "train": ("train.csv",),
    "valid": ("valid.csv", "val_labels.csv"),
    "test": ("test.csv", "test_labels.csv", "groundtruth.csv"),
}
OTHER_TABLES = ("train_cheXbert.csv", "train_visualCheXbert.csv")
SPLITS_WITH_TEST = {"train": "train", "valid": "val", "test": "test"}
# valid.csv, the only set labelled by radiologists, must not select a model and then score it.
SPLITS_WITHOUT_TEST = {"train": DEVELOPMENT, "valid": "test"}
COLUMNS = {
    **{name: (name,) for name in ("Path", "Study", "Sex", "Age")},
    **{name: (name,) for name in ("Frontal/Lateral", "AP/PA", *LABELS)},
    "Lung Opacity": ("Lung Opacity", "Airspace Opacity"),  # the latter of the radiologists' tables
}
IMAGE = re.compile(r"(?:.*/)?(patient\d+/study\d+/[^/]+)")  # no suffix: see `Listed`
FORMS = {  # of a row's cell, by the name of the column
    "Path": re.compile(r"(?:.*/)?(patient\d+/study\d+/[^/]+)\.\w+"),
    "Study": re.compile(r"(?:.*/)?(patient\d+/study\d+)"),
}


class View(NamedTuple):
    """The view of an image according to a table, and the view that is used."""

    frontal_lateral: str
    ap_pa: str
    taken_for: str


def read_chexpert(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read the tables and the images that exist.

    Both are in the folder or in folders below it, except those in ``besides``. The end of an
    image's path, ``patientNNNNN/studyN/viewN_frontal.jpg``, identifies it, so that the four parts
    of v1.0, Kaggle's copy and CheXlocalize can stay as unpacked. A record's path is ``train/``,
    ``valid/`` or ``test/`` followed by that end. With a table of the test set the splits are the
    official ones; without it valid.csv is the test split, and train.csv is ``train+val``.

    Raises:
        CxrdistError: there is no table or no image, or a table is malformed.
    """
    tables, not_read = _find_tables(folder)
    listed = Listed(folder, IMAGE, besides)
    splits = SPLITS_WITH_TEST if "test" in tables else SPLITS_WITHOUT_TEST
    records: list[Record] = []
    views: Counter[View] = Counter()
    notes: list[str] = []
    for part, file in tables.items():
        table = read_table(file, {spelling for names in COLUMNS.values() for spelling in names})
        notes += table.notes
        num_before = len(records)
        for name, view, facts in _images(table, listed):
            if taken := listed.take(name, file, facts):
                views[view] += 1
                path, split = f"{part}/{name}{taken[0].suffix}", splits[part]
                records.append(Record(taken[0], path, source=NAME, split=split, **facts))
        # Its table alone has already made valid.csv the validation split, and test would be empty.
        if part == "test" and len(records) == num_before:
            raise CxrdistError(
                f"{file}: none of its images is here; download them or move the table away"
            )
    if "test" not in tables:
        test = (
            "valid.csv, labelled by radiologists, is test" if "valid" in tables else "test is empty"
        )
        val = "val is drawn from train.csv" if "train" in tables else "train and val are empty"
        notes.append(f"without the table of the test set {test}, and {val}")
    if not_read:
        notes.append(f"{', '.join(not_read)}: not read")
    notes += [*listed.notes(*tables.values()), *_view_notes(views)]
    return Source(records, "multilabel", list(LABELS), NAME, tuple(notes), *listed.account())


def _find_tables(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the table of each image folder, and the names of tables that are not read.

    It is an error if there is no table, or if one is in two folders.
    """
    below = sorted(child for child in folder.iterdir() if child.is_dir())
    tables, not_read = {}, []
    for part, names in (*TABLES.items(), ("", OTHER_TABLES)):
        files = [
            home / name for name in names for home in (folder, *below) if (home / name).is_file()
        ]
        twice = next((file for file in files[1:] if file.name == files[0].name), None)
        if twice and part:
            raise CxrdistError(f"{twice}: is also in {files[0].parent}; remove one")
        if part and files:
            tables[part] = files.pop(0)
        not_read += [file.name for file in files]
    if not tables:
        expected = ", ".join(name for names in TABLES.values() for name in names)
        raise CxrdistError(
            f"--input {folder}: has no table, here or in a folder below; expected one of {expected}"
        )
    return tables, not_read


def _images(table: Table, listed: Listed) -> Iterator[tuple[str, View, dict[str, Any]]]:
    """Yield the name of each image in a table, its view, and fields of its record.

    In a table of studies, a row stands for all images of its study.
    """
    columns = {plain(name) for name in table.columns}
    key = "Study" if "study" in columns and "path" not in columns else "Path"
    of_study: dict[str, list[str]] = {}
    if key == "Study":
        for name in sorted(listed.names()):
            of_study.setdefault(name.rpartition("/")[0], []).append(name)
    for where, cells in table.cells(COLUMNS, (key, *LABELS)):
        asked = _asked(where, cells[key], FORMS[key])
        facts = {
            "patient": asked.partition("/")[0],
            "sex": sex_of(cells.get("Sex", "")),
            "age": age_of(cells.get("Age", "")),
            **read_cells(where, {label: cells[label] for label in LABELS}),
        }
        # A study without images is taken by its own name, so that it is counted as missing.
        for name in of_study.get(asked, [asked]):
            view = _view(name, cells)
            yield name, view, {**facts, "view": view.taken_for}


def _asked(where: str, text: str, form: re.Pattern[str]) -> str:
    """Return the image or study of a row, as the group of `IMAGE`."""
    if not (match := form.fullmatch(text)):
        raise CxrdistError(
            f"{where}: {text!r:.80} does not end like patient00001/study1/view1_frontal.jpg, "
            "or patient00001/study1 in a table of studies"
        )
    return match[1]


def _view(name: str, cells: dict[str, str]) -> View:
    """Return the view of an image by its row, or by its name if the row has none."""
    frontal_lateral, ap_pa = cells.get("Frontal/Lateral", ""), cells.get("AP/PA", "")
    side, position = view_of(frontal_lateral), view_of(ap_pa)
    named = view_in_name(name.rpartition("/")[2])
    # Lateral in either column wins, since lateral images are not packed by default.
    taken_for = LATERAL if side == LATERAL else position or side or named
    return View(frontal_lateral, ap_pa, taken_for)


def _view_notes(views: Counter[View]) -> Iterator[str]:
    """Yield notes on views whose two columns contradict each other or have unknown words."""
    for view, number in sorted(views.items()):
        side, position = view_of(view.frontal_lateral), view_of(view.ap_pa)
        is_contradiction = side and position and (side == LATERAL) != (position == LATERAL)
        if side is None or position is None or is_contradiction:
            yield (
                f"{number} images are {view.frontal_lateral!r:.20} by Frontal/Lateral and "
                f"{view.ap_pa!r:.20} by AP/PA: they count as {view.taken_for or 'unknown'}"
            )
