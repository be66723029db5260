"""COVIDx (Wang et al. 2020; CXR-4: Wu et al. 2023): lists of images that COVID-Net gathered.

Kaggle: andyczhao/covidx-cxr2. Its current version, CXR-4, has train.txt, val.txt and test.txt; for
older ones the lists are in COVID-Net's repository, such as train_COVIDx9A.txt. A line of a list is
``patient file label source``; in the oldest lists some lines lack the source.

Not read: the severity lists (COVIDxSev), competition_test/, which has no labels, copies of images
with other suffixes, since two images may differ only in theirs, and the sex and age that some
collections have.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cxrdist.data.listed import Listed
from cxrdist.data.records import DEVELOPMENT, SPLITS, Record, Source
from cxrdist.data.rsna_pneumonia import NAME as RSNA
from cxrdist.data.rsna_pneumonia import patients_note, read_nih_patients
from cxrdist.data.tables import read_text
from cxrdist.errors import CxrdistError
from cxrdist.terminal import few

NAME = "COVIDx"
IMAGE = re.compile(r"((?:train|val|test)/[^/]+)")
LIST = re.compile(r"(train|val|test)(_[A-Za-z0-9_.-]+)?\.txt")
# In the order of COVID-Net's outputs (its data.py).
CLASSES = (("negative", "positive"), ("normal", "pneumonia", "COVID-19"))
LABELS = tuple(label for classes in CLASSES for label in classes)
# Names of the collections in the lists; rnsa is a typo in COVIDx 9.
SOURCES = {
    **dict.fromkeys(("rsna", "rnsa"), RSNA),
    "cohen": "covid-chestxray-dataset",
    "fig1": "Figure1",
    "actmed": "Actualmed",
    "sirm": "COVID-19 Radiography Database",
    "ricord": "RICORD",
    "bimcv": "BIMCV",
    "stonybrook": "Stony Brook",
}
# RSNA's images are named by a UUID, which identifies them if a line lacks its source.
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BIMCV_VIEW = re.compile(r"_vp-([a-z]+)_")  # in a file's name, of BIDS
# COVID-Net's create_COVIDx.ipynb and create_COVIDx_binary.ipynb list their test patients as
# ``'190', '191' 'COVID-00024', 'COVID-00025'``. Because of the missing comma Python joins the two
# in the middle to an ID that does not exist, so both patients went to train: in the lists of
# COVIDx 3 to 9 and of CXR-4.
TEST_PATIENTS = {("cohen", "191"), ("fig1", "COVID-00024")}
MISPLACED = "of a patient whom COVID-Net meant for test, and a missing comma put into train"
MOST_NAMED = 5  # patients in a note


class Line(NamedTuple):
    """A line of a list."""

    split: str
    """train, val or test."""
    image: str
    """Name in the folder of the split."""
    patient: str
    """Patient as in the list, unique within a collection."""
    label: str
    collection: str
    """Collection as in the list, or empty."""

    def source(self) -> str:
        """Return where the image comes from."""
        word = "rsna" if not self.collection and UUID.fullmatch(self.patient) else self.collection
        return SOURCES.get(word, word or NAME)


def read_covidx(folder: Path, besides: Sequence[Path] = ()) -> Source:
    """Read the lists of one version and those of their images that exist.

    The folder has the lists, and the images in ``train/``, ``val/`` and ``test/``; folders in
    ``besides`` are skipped. The records have two or three classes, and the splits of the lists:
    ``train+val`` for the training list of a version without val. Patients are those of the
    collections; for RSNA's images those of the NIH, if `rsna_pneumonia.MAPPING` is next to the
    lists.

    A patient in two lists stays in the later one of train, val and test, so that the test list is
    the published one: the other images are left out, and so are `TEST_PATIENTS` in train and val.

    Raises:
        CxrdistError: the lists of a version are missing, several versions are mixed, or a line is
            malformed.
    """
    listed, lists = Listed(folder, IMAGE, besides, suffix=None), _find_lists(folder)
    lines = [line for split, file in lists.items() for line in _read_list(split, file)]
    classes, origins = _classes(folder, lines), read_nih_patients(folder)
    patients = [_patient(line, origins) for line in lines]
    # The lists are in the order of `SPLITS`, so that the last line of a patient decides.
    last = {patient: line.split for patient, line in zip(patients, lines, strict=True)}
    records: list[Record] = []
    left_out: dict[str, Counter[str]] = defaultdict(Counter)
    for line, patient in zip(lines, patients, strict=True):
        taken = listed.take(f"{line.split}/{line.image}")
        if taken is None:
            continue
        if reason := _why_left_out(line, last[patient]):
            listed.leave(taken[1], reason)
            left_out[reason][patient] += 1
            continue
        split = DEVELOPMENT if line.split == "train" and "val" not in lists else line.split
        named = BIMCV_VIEW.search(line.image)
        view = named[1].upper() if named else ""
        records.append(Record(*taken, line.label, patient, line.source(), split, view))
    notes = (*listed.notes(*lists.values()), *_notes(records, left_out, origins))
    return Source(records, "multiclass", list(classes), NAME, notes, *listed.account())


def _find_lists(folder: Path) -> dict[str, Path]:
    """Return the list of each split, in the order of `SPLITS`; older versions have no val.

    It is an error if no version has both train and test lists, or if several have.
    """
    versions: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in sorted(folder.iterdir()):
        if found := LIST.fullmatch(file.name):
            versions[found[2] or ""][found[1]] = file
    whole = [lists for lists in versions.values() if {"train", "test"} <= lists.keys()]
    if not whole:
        raise CxrdistError(
            f"--input {folder}: has no train.txt and test.txt; expected the lists of one version, "
            "such as train_COVIDx9A.txt and test_COVIDx9A.txt, beside train/ and test/"
        )
    if len(whole) > 1:
        names = " and ".join(lists["train"].name for lists in whole)
        raise CxrdistError(f"--input {folder}: has {names}; leave the lists of one version there")
    return {split: whole[0][split] for split in SPLITS if split in whole[0]}


def _read_list(split: str, file: Path) -> Iterator[Line]:
    """Yield the lines of a list, each image once, since some lists repeat images.

    It is an error if a line has no label, or if two lines of an image differ.
    """
    before: dict[str, Line] = {}
    text, _ = read_text(file)
    for number, words in enumerate(map(str.split, text.split("\n")), start=1):
        if not words:
            continue
        where = f"{file} line {number}"
        # A patient's name may hold blanks: `COVID 216 COVID(216).png COVID-19 sirm`.
        has_source = len(words) > 3 and words[-1] not in LABELS
        fields = words[:-1] if has_source else words
        *patient, image, label = fields if len(fields) > 2 else ("", "", "")
        if label not in LABELS:
            raise CxrdistError(
                f"{where}: {' '.join(words)!r:.80}, expected patient, file, label (one of "
                f"{', '.join(LABELS)}) and source, with blanks between them"
            )
        line = Line(split, image, " ".join(patient), label, words[-1] if has_source else "")
        if before.setdefault(image, line) is line:
            yield line
        elif before[image] != line:
            raise CxrdistError(
                f"{where}: differs from the earlier line of {image}, {before[image].label} of "
                f"patient {before[image].patient}; fetch the list again"
            )


def _classes(folder: Path, lines: Sequence[Line]) -> tuple[str, ...]:
    """Return the classes of the lists; reject a mix of lists with two and with three classes."""
    labels = {line.label for line in lines}
    classes = next((classes for classes in CLASSES if labels <= {*classes}), None)
    if classes is None:
        raise CxrdistError(f"{folder}: the lists mix {', '.join(sorted(labels))}; fetch them again")
    return classes


def _patient(line: Line, origins: Mapping[str, str]) -> str:
    """Return a patient's name with its collection, since two collections count from 1."""
    source = line.source()
    return f"{source}/{origins.get(line.patient, line.patient) if source == RSNA else line.patient}"


def _why_left_out(line: Line, last: str) -> str:
    """Return why an image is not packed, given the last split that has its patient; else empty."""
    # Where the lists have been mended, these patients are in test, and stay there.
    if line.split != "test" and (line.collection, line.patient) in TEST_PATIENTS:
        return MISPLACED
    return "" if line.split == last else f"of a patient who is in the {last} list too"


def _notes(
    records: Sequence[Record], left_out: Mapping[str, Counter[str]], origins: Mapping[str, str]
) -> Iterator[str]:
    for reason, images in left_out.items():
        names = few(sorted(images), MOST_NAMED)
        yield f"images left out, each {reason}: {images.total()} ({names})"
    num_rsna = sum(record.source == RSNA for record in records)
    if num_rsna and not origins:
        yield patients_note(num_rsna)
