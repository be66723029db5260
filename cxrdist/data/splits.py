"""Splits of train, val and test: by patient, stratified by class."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.records import DEVELOPMENT, SPLITS, Record, Source, labels_of
from cxrdist.errors import CxrdistError

PAPER_TEST_IMAGES = 60  # of each class (paper, section 2.2)
PAPER_VAL_FRACTION = 0.2  # of what is left (paper, section 2.2)
DEFAULT_FRACTIONS = "0.7/0.1/0.2"  # of several labels an image (CheXNet's, Rajpurkar et al. 2017)


def assign_splits(
    source: Source, split: str | None, seed: int, groups: Sequence[int] | None = None
) -> list[str]:
    """Choose the split of each record so that no patient stands in two.

    Groups are taken in random order as long as no class exceeds its target, so a class misses its
    target only if its last groups have too many images.

    Args:
        source: all records; a split given by them is kept, and what they leave open is drawn.
        split: ``paper``, fractions of train/val/test such as ``0.7/0.1/0.2``, or None for what
            suits the task.
        seed: seed of the order of groups.
        groups: a number for each record; records of the same number stay together. By patient if
            not given.

    Returns:
        ``train``, ``val`` or ``test`` for each record.

    Raises:
        CxrdistError: a given split has a patient twice, or a split would lack a class.
    """
    records = source.records
    if groups is None:
        groups = group_by_patient(records)
    split = split or default_split(source.task)
    splits = [str(record.split) for record in records]
    if records[0].split is None:
        splits = _draw(source, split, seed, np.asarray(groups))
    elif DEVELOPMENT in splits:
        splits = _draw_val(source, split, seed, np.asarray(groups))
    _refuse_shared_patients(records, splits)
    _refuse_missing_classes(source, splits)
    return splits


def default_split(task: str) -> str:
    """How splits are drawn if nobody says it."""
    return "paper" if task == "multiclass" else DEFAULT_FRACTIONS


def describe_split(source: Source, split: str | None) -> str:
    """What index.json says of how the splits came about; arguments as of `assign_splits`."""
    split = split or default_split(source.task)
    given = {record.split for record in source.records}
    if given == {None}:
        return split
    return (
        f"given by the source, val drawn ({split})"
        if DEVELOPMENT in given
        else "given by the source"
    )


def group_by_patient(records: Sequence[Record]) -> list[int]:
    """A number for each record, the same for all images of a patient."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(record.patient, len(numbers)) for record in records]


def _draw(source: Source, split: str, seed: int, groups: NDArray[np.int64]) -> list[str]:
    counts = _images_by_group(source, groups)
    total = counts.sum(axis=0)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(counts))
    if split == "paper":
        _refuse_small_classes(source, total)
        test_target = np.full_like(total, PAPER_TEST_IMAGES)
        test = _take(order, counts, test_target)
        val_target = np.rint(PAPER_VAL_FRACTION * (total - counts[test].sum(axis=0)))
    else:
        _, val_fraction, test_fraction = parse_fractions(split)
        test = _take(order, counts, np.rint(test_fraction * total))
        val_target = np.rint(val_fraction * total)
    val = _take(order[~np.isin(order, test)], counts, val_target)
    return _names(groups, val, test)


def _draw_val(source: Source, split: str, seed: int, groups: NDArray[np.int64]) -> list[str]:
    """Draw val from what the source gives for train and val together; the rest is as given."""
    given = [str(record.split) for record in source.records]
    train, val_fraction, _ = parse_fractions(DEFAULT_FRACTIONS if split == "paper" else split)
    counts = _images_by_group(source, groups)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(counts))
    closed = {group for group, name in zip(groups, given, strict=True) if name != DEVELOPMENT}
    order = order[~np.isin(order, list(closed))]
    target = np.rint(val_fraction / (train + val_fraction) * counts[order].sum(axis=0))
    drawn = _names(groups, _take(order, counts, target), np.array([], np.int64))
    return [new if old == DEVELOPMENT else old for old, new in zip(given, drawn, strict=True)]


def _names(groups: NDArray[np.int64], val: NDArray[np.int64], test: NDArray[np.int64]) -> list[str]:
    places = np.zeros(groups.max() + 1, np.int64)
    places[val], places[test] = 1, 2
    return [SPLITS[place] for place in places[groups]]


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


def _images_by_group(source: Source, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images of each class in each group, and in a last column those without any label.

    Returns:
        int64 [groups, classes + 1].
    """
    place = {name: i for i, name in enumerate(source.classes)}
    counts = np.zeros((groups.max() + 1, len(place) + 1), np.int64)
    for group, record in zip(groups, source.records, strict=True):
        counts[group, [place[name] for name in labels_of(record.label)] or [-1]] += 1
    return counts


def _take(
    order: NDArray[np.int64], counts: NDArray[np.int64], target: NDArray[np.float64]
) -> NDArray[np.int64]:
    taken, filled = [], np.zeros_like(target)
    for group in order:
        if np.all(filled + counts[group] <= target):
            taken.append(group)
            filled += counts[group]
    return np.array(taken, dtype=np.int64)


def _refuse_small_classes(source: Source, total: NDArray[np.int64]) -> None:
    for name, images in zip(source.classes, total, strict=False):
        if images < PAPER_TEST_IMAGES + 2:
            raise CxrdistError(
                f"--split paper: takes {PAPER_TEST_IMAGES} test images of each class, but class "
                f"{name!r} has {images}; use fractions, such as --split 0.7/0.1/0.2"
            )


def _refuse_shared_patients(records: list[Record], splits: list[str]) -> None:
    seen: dict[str, tuple[str, Record]] = {}
    for record, split in zip(records, splits, strict=True):
        first, other = seen.setdefault(record.patient, (split, record))
        if first != split:
            raise CxrdistError(
                f"patient {record.patient}: {other.path} is in {first}, {record.path} in {split}; "
                "give all images of a patient the same split"
            )


def _refuse_missing_classes(source: Source, splits: list[str]) -> None:
    """Each split needs images; of one label an image, also of each class."""
    lacking = [split for split in SPLITS if split not in splits]
    if lacking:
        raise CxrdistError(
            f"no image is in {lacking[0]}; add images or patients, or change --split"
        )
    if source.task == "multilabel":
        return
    there = {(r.label, split) for r, split in zip(source.records, splits, strict=True)}
    for label in source.classes:
        for split in SPLITS:
            if (label, split) not in there:
                raise CxrdistError(
                    f"class {label!r} has no image in {split}; "
                    "add images or patients of it, or change --split"
                )
