"""MIMIC-CXR-JPG (Johnson et al. 2019), 2.0.0 and 2.1.0, as published by PhysioNet.

The labels are those of CheXpert's labeller for a study's report. Not read: NegBio's labels, the
labels of a radiologist for 687 reports of the test split (2.1.0; other studies of the split have
none), the reports, and other metadata.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cxrdist.data import chexpert
from cxrdist.data.labels import read_cells
from cxrdist.data.listed import Listed
from cxrdist.data.patients import MOST_YEARS, age_of, sex_of
from cxrdist.data.records import Record, Source
from cxrdist.data.tables import Table, read_table
from cxrdist.data.views import UNKNOWN, view_of
from cxrdist.errors import CxrdistError

NAME = "MIMIC-CXR"
LABELS = tuple(sorted(chexpert.LABELS))  # of the same labeller; in the order of the tables
METADATA = "mimic-cxr-2.0.0-metadata.csv"  # so named in 2.1.0 as well
CHEXPERT = "mimic-cxr-2.0.0-chexpert.csv"
SPLIT = "mimic-cxr-2.0.0-split.csv"
PATIENTS = "patients.csv"  # of MIMIC-IV, module hosp
OTHER_TABLES = ("mimic-cxr-2.0.0-negbio.csv", "mimic-cxr-2.1.0-test-set-labeled.csv")
NEEDED = {
    METADATA: ("dicom_id", "subject_id", "study_id", "ViewPosition"),
    CHEXPERT: ("subject_id", "study_id", *LABELS),
    SPLIT: ("dicom_id", "split"),
    PATIENTS: ("subject_id", "gender", "anchor_age", "anchor_year"),
}
VIEW_CODE = "ViewCodeSequence_CodeMeaning"
OPTIONAL = (VIEW_CODE, "StudyDate")  # of the metadata
SPLITS = {"train": "train", "validate": "val", "test": "test"}
YEAR = re.compile(r"[0-9]{4}")
# The group is what subject_id, study_id and dicom_id give, whatever folders are above.
IMAGE = re.compile(r"(?:.*/)?(p\d+/s\d+/[0-9a-f-]+)")


Study = tuple[str, dict[str, str]]  # the subject; label, uncertain and missing, as in `Record`
# Sex, and year of birth on the patient's own shifted calendar, which ``StudyDate`` uses too. An
# anchor_age of 91 stands for all above 89.
Patient = tuple[str, float | None]


def read_mimic_cxr(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read the tables, gzipped or not, and the images that exist.

    The folder has the tables, and the images in ``files/p10/p10000032/s50414267/DICOM_ID.jpg``;
    folders in ``besides`` are skipped. ``patients.csv`` or ``patients.csv.gz`` of MIMIC-IV, if
    present, gives sex and age. The splits are the official ones, if their table is present.

    Images without a row, rows without an image, and images of studies without labels are left out.
    The labeller could not read the reports of such studies, so that missing labels must not be
    assumed absent.

    Raises:
        CxrdistError: the metadata or the labels are missing, a table is malformed, or two tables
            contradict each other.
    """
    tables = {
        name: read_table(file, columns)
        for name, columns in NEEDED.items()
        if (file := _find_file(folder, name))
    }
    for name in (METADATA, CHEXPERT):
        if name not in tables:
            raise CxrdistError(f"--input {folder}: has neither {name} nor {name}.gz; fetch it")
    studies = _read_studies(tables[CHEXPERT])
    splits = _read_splits(tables[SPLIT]) if SPLIT in tables else None
    patients = _read_patients(tables[PATIENTS]) if PATIENTS in tables else {}
    listed = Listed(folder, IMAGE, besides)
    records: list[Record] = []
    unknown: Counter[str] = Counter()
    for where, row in tables[METADATA].cells((*NEEDED[METADATA], *OPTIONAL), NEEDED[METADATA]):
        # Before `take`, which rejects two rows of an image whose view or facts differ.
        facts = _facts(where, row, studies, splits, patients)
        # An unknown word (None) in the first gives way to the code, as an empty cell does.
        views = {text: view_of(text) for text in (row["ViewPosition"], row.get(VIEW_CODE, ""))}
        view = next(filter(None, views.values()), UNKNOWN)
        image = f"p{row['subject_id']}/s{row['study_id']}/{row['dicom_id']}"
        taken = listed.take(image, where, (view, facts))
        if taken and facts is None:
            listed.leave(taken[1], f"its study has no row in {CHEXPERT}")
        elif taken and facts is not None:
            unknown.update([] if view else [t for t, named in views.items() if named is None][:1])
            records.append(Record(*taken, source=NAME, view=view, **facts))
    return Source(
        records,
        "multilabel",
        list(LABELS),
        NAME,
        (*_notes(folder, tables, records, unknown), *listed.notes(tables[METADATA].file)),
        *listed.account(),
    )


def _notes(
    folder: Path, tables: Mapping[str, Table], records: Sequence[Record], unknown: Counter[str]
) -> Iterator[str]:
    """Yield notes for the user on the tables and their records, one line each."""
    for table in tables.values():
        yield from table.notes
    if SPLIT not in tables:
        yield f"without {SPLIT}.gz the split is drawn here and is not the official one"
    if PATIENTS not in tables:
        yield f"without {PATIENTS}.gz of MIMIC-IV sex and age are not known"
    elif ageless := sum(record.age is None for record in records):
        yield f"{ageless} images have no age by {tables[PATIENTS].file.name}"
    for name in OTHER_TABLES:
        if _find_file(folder, name):
            yield f"{name}: not read, the labels are those of {tables[CHEXPERT].file.name}"
    for view, number in sorted(unknown.items()):
        yield f"{number} images have the view {view!r:.40}, which counts as unknown"


def _find_file(folder: Path, name: str) -> Path | None:
    """Return a table of the data set, plain or gzipped; None if neither exists."""
    files = (folder / name, folder / f"{name}.gz")
    return next((file for file in files if file.is_file()), None)


def _read_studies(table: Table) -> dict[str, Study]:
    """Return the labels of each study by its number; reject two rows of a study."""
    studies: dict[str, Study] = {}
    alike: dict[tuple[str, ...], dict[str, str]] = {}  # most studies repeat the cells of another
    for where, row in table.cells(NEEDED[CHEXPERT], NEEDED[CHEXPERT]):
        cells = tuple(row[label] for label in LABELS)
        if cells not in alike:
            alike[cells] = read_cells(where, dict(zip(LABELS, cells, strict=True)))
        if row["study_id"] in studies:
            raise CxrdistError(f"{where}: study {row['study_id']} has two rows; fetch it again")
        studies[row["study_id"]] = row["subject_id"], alike[cells]
    return studies


def _read_splits(table: Table) -> dict[str, str]:
    """Return the split of each image by its dicom_id."""
    splits: dict[str, str] = {}
    for where, row in table.cells(NEEDED[SPLIT], NEEDED[SPLIT]):
        if row["split"] not in SPLITS:
            raise CxrdistError(
                f"{where}: the split is {row['split']!r:.40}, expected {', '.join(SPLITS)}"
            )
        split = SPLITS[row["split"]]
        if splits.setdefault(row["dicom_id"], split) != split:
            raise CxrdistError(f"{where}: {row['dicom_id']} is in two splits; fetch it again")
    return splits


def _read_patients(table: Table) -> dict[str, Patient]:
    """Return sex and year of birth of each patient by number."""
    patients: dict[str, Patient] = {}
    for _, row in table.cells(NEEDED[PATIENTS], NEEDED[PATIENTS]):
        year, age = YEAR.fullmatch(row["anchor_year"]), age_of(row["anchor_age"])
        birth = int(year[0]) - age if year and age is not None else None
        patients[row["subject_id"]] = sex_of(row["gender"]), birth
    return patients


def _facts(
    where: str,
    row: Mapping[str, str],
    studies: Mapping[str, Study],
    splits: Mapping[str, str] | None,
    patients: Mapping[str, Patient],
) -> dict[str, Any] | None:
    """Return the fields of an image's record from the tables; None if its study has no labels.

    It is an error if the tables contradict each other.
    """
    subject, study = row["subject_id"], row["study_id"]
    split = None if splits is None else splits.get(row["dicom_id"])
    if splits is not None and split is None:
        raise CxrdistError(f"{where}: {row['dicom_id']} has no row in {SPLIT}; fetch both again")
    if study not in studies:
        return None
    owner, labels = studies[study]
    if owner != subject:
        raise CxrdistError(
            f"{where}: study {study} is of subject {subject}, but of {owner} in {CHEXPERT}; fetch "
            "both again"
        )
    sex, birth = patients.get(subject, ("", None))
    age = _age(birth, row.get("StudyDate", ""))
    return {**labels, "patient": f"p{subject}", "split": split, "sex": sex, "age": age}


def _age(birth: float | None, date: str) -> float | None:
    year = YEAR.match(date)
    if year is None or birth is None:
        return None
    age = int(year[0]) - birth
    return age if 0 <= age <= MOST_YEARS else None
