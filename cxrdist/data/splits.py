"""Splits of train, val and test: by patient, stratified by class."""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.records import SPLITS, Record
from cxrdist.errors import CxrdistError

PAPER_TEST_IMAGES = 60  # of each class (paper, section 2.2)
PAPER_VAL_FRACTION = 0.2  # of what is left (paper, section 2.2)


def assign_splits(records: list[Record], split: str, seed: int) -> list[str]:
    """Choose the split of each record so that no patient stands in two.

    Patients are taken in random order as long as no class exceeds its target, so a class misses
    its target only if its last patients have too many images.

    Args:
        records: all records; a split given by their source is kept.
        split: ``paper`` or fractions of train/val/test such as ``0.7/0.1/0.2``.
        seed: seed of the order of patients.

    Returns:
        ``train``, ``val`` or ``test`` for each record.

    Raises:
        CxrdistError: a given split has a patient twice, or a split would lack a class.
    """
    if records[0].split is not None:
        splits = [str(record.split) for record in records]
    else:
        splits = _draw(records, split, seed)
    _refuse_shared_patients(records, splits)
    _refuse_missing_classes(records, splits)
    return splits


def _draw(records: list[Record], split: str, seed: int) -> list[str]:
    classes = sorted({record.label for record in records})
    patients, counts = _images_by_patient(records, classes)
    total = counts.sum(axis=0)
    random = np.random.Generator(np.random.Philox(seed))
    order = random.permutation(len(patients))
    if split == "paper":
        test_target = np.full(len(classes), PAPER_TEST_IMAGES)
        small = [c for c, n in zip(classes, total, strict=True) if n < PAPER_TEST_IMAGES + 2]
        if small:
            raise CxrdistError(
                f"--split paper: takes {PAPER_TEST_IMAGES} test images of each class, but class "
                f"{small[0]!r} has {total[classes.index(small[0])]}; "
                "use fractions, such as --split 0.7/0.1/0.2"
            )
    else:
        fractions = parse_fractions(split)
        test_target = np.rint(fractions[2] * total).astype(int)
    test = _take(order, counts, test_target)
    rest = order[~np.isin(order, test)]
    if split == "paper":
        val_target = np.rint(PAPER_VAL_FRACTION * (total - counts[test].sum(axis=0))).astype(int)
    else:
        val_target = np.rint(fractions[1] * total).astype(int)
    val = _take(rest, counts, val_target)
    chosen = {patients[i]: "test" for i in test} | {patients[i]: "val" for i in val}
    return [chosen.get(record.patient, "train") for record in records]


def parse_fractions(split: str) -> tuple[float, float, float]:
    """Read ``TRAIN/VAL/TEST``.

    Raises:
        CxrdistError: these are not three numbers above 0 that add up to 1.
    """
    try:
        train, val, test = (float(part) for part in split.split("/"))
    except ValueError:
        train = val = test = 0.0
    if min(train, val, test) <= 0 or abs(train + val + test - 1) > 1e-6:
        raise CxrdistError(
            f"--split {split}: expected paper, or three fractions above 0 of train/val/test "
            "that add up to 1, such as 0.7/0.1/0.2"
        )
    return train, val, test


def _images_by_patient(
    records: list[Record], classes: list[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """Patients in sorted order and their images per class, int64 [patients, classes]."""
    counts: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros(len(classes), np.int64))
    number = {name: i for i, name in enumerate(classes)}
    for record in records:
        counts[record.patient][number[record.label]] += 1
    patients = sorted(counts)
    return patients, np.stack([counts[patient] for patient in patients])


def _take(
    order: NDArray[np.int64], counts: NDArray[np.int64], target: NDArray[np.int64]
) -> NDArray[np.int64]:
    taken, filled = [], np.zeros_like(target)
    for patient in order:
        if np.all(filled + counts[patient] <= target):
            taken.append(patient)
            filled += counts[patient]
    return np.array(taken, dtype=np.int64)


def _refuse_shared_patients(records: list[Record], splits: list[str]) -> None:
    seen: dict[str, tuple[str, Record]] = {}
    for record, split in zip(records, splits, strict=True):
        first, other = seen.setdefault(record.patient, (split, record))
        if first != split:
            raise CxrdistError(
                f"patient {record.patient}: {other.path} is in {first}, {record.path} in {split}; "
                "give all images of a patient the same split"
            )


def _refuse_missing_classes(records: list[Record], splits: list[str]) -> None:
    there = {(record.label, split) for record, split in zip(records, splits, strict=True)}
    for label in sorted({record.label for record in records}):
        for split in SPLITS:
            if (label, split) not in there:
                raise CxrdistError(
                    f"class {label!r} has no image in {split}; "
                    "add images or patients of it, or change --split"
                )
