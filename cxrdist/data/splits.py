"""Splits of train, val and test: by patient, stratified by class."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.labels import labels_of
from cxrdist.data.records import DEVELOPMENT, SPLITS, Record, Source
from cxrdist.errors import CxrdistError

PAPER = "paper"
PAPER_TEST_IMAGES = 60  # of each class (paper, section 2.2)
PAPER_VAL_FRACTION = 0.2  # of what is left (paper, section 2.2)
DEFAULT_FRACTIONS = "0.7/0.1/0.2"  # CheXNet's (Rajpurkar et al. 2017)
DOMINANT_IMAGES = 20  # a patient with more, and with most of all images, looks like a placeholder
MISSED = 0.03  # of all images; splits further from their target are reported

Counts = NDArray[np.int64]


def assign_splits(
    source: Source, split: str | None, seed: int, groups: Sequence[int] | None = None
) -> list[str]:
    """Choose train, val or test for each record so that no patient is in two of them.

    Splits that the records give are kept, the others are drawn.

    Args:
        source: all records; of several sources some may give splits and others not.
        split: ``paper``, fractions of train/val/test such as ``0.7/0.1/0.2`` (a split of fraction
            0 stays empty), or None for the default fractions.
        seed: of the order of groups.
        groups: a number per record, equal for records that stay together; by patient if None.

    Raises:
        CxrdistError: the source gives a patient two splits, one patient has most of the images, or
            a split would lack a class.
    """
    records = source.records
    if not records:
        raise CxrdistError("no image is left to split; rejected.csv lists why images are left out")
    numbers = np.asarray(group_by_patient(records) if groups is None else groups)
    asked = asked_splits(source, split)
    given = [record.split for record in records]
    # In a single split, a placeholder in place of the patients does no harm.
    if None in given and len(asked) > 1:
        drawn = [record for record in records if record.split is None]
        _refuse_dominant_group(drawn, numbers[[name is None for name in given]])
    if DEVELOPMENT in given:
        given = _draw_val(source, split, seed, numbers)
    splits = _draw(source, split or DEFAULT_FRACTIONS, seed, numbers, given)
    _refuse_shared_patients(records, splits)
    _refuse_missing_classes(source, splits, asked)
    return splits


def is_drawn(source: Source) -> bool:
    """Return whether the source leaves all splits open."""
    return all(record.split is None for record in source.records)


def asked_splits(source: Source, split: str | None) -> list[str]:
    """List the splits that must have images; arguments as in `assign_splits`."""
    given = {record.split for record in source.records}
    asked = given & {*SPLITS}
    if None in given:
        fractions = parse_split(split)
        asked |= {name for name, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0}
    if DEVELOPMENT in given:
        train, val = _development_fractions(split)
        asked |= {name for name, fraction in (("train", train), ("val", val)) if fraction > 0}
    return [name for name in SPLITS if name in asked]


def describe_split(source: Source, split: str | None) -> str:
    """Describe how the splits were made, for index.json; arguments as in `assign_splits`."""
    if is_drawn(source):
        return split or DEFAULT_FRACTIONS
    text = "given by the source"
    if num_drawn := sum(record.split is None for record in source.records):
        text += f" for {len(source.records) - num_drawn} images, drawn for {num_drawn}"
        text += f" ({split or DEFAULT_FRACTIONS})"
    is_open = any(record.split == DEVELOPMENT for record in source.records)
    if is_open and _development_fractions(split)[1] > 0:
        text += f", val drawn ({_known_fractions(split)})"
    asked = asked_splits(source, split)
    return text if len(asked) == len(SPLITS) else f"{text}, {' and '.join(asked)} only"


def group_by_patient(records: Sequence[Record]) -> list[int]:
    """Return a number per record, the same for all images of a patient."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(record.patient, len(numbers)) for record in records]


def parse_split(split: str | None) -> tuple[float, float, float]:
    """Parse ``TRAIN/VAL/TEST``; ``paper`` and None give the default fractions, all above 0.

    Raises:
        CxrdistError: the text is not three numbers from 0 to 1 that add up to 1.
    """
    text = _known_fractions(split)
    try:
        train, val, test = (float(part) for part in text.split("/"))
    except ValueError:
        train = val = test = -1.0
    # A comparison with NaN is false, so NaN is refused as well.
    if not (min(train, val, test) >= 0 and abs(train + val + test - 1) <= 1e-6):
        raise CxrdistError(
            f"--split {split}: expected paper, or three fractions of train/val/test, 0 or more, "
            "that add up to 1, such as 0.7/0.1/0.2"
        )
    return train, val, test


def _known_fractions(split: str | None) -> str:
    return DEFAULT_FRACTIONS if split in (None, PAPER) else str(split)


def _development_fractions(split: str | None) -> tuple[float, float]:
    """Return the fractions of train and val among images given for both together, not both 0."""
    train, val, _ = parse_split(split)
    if train + val == 0:
        raise CxrdistError(
            f"--split {split}: leaves no split for the images that the source gives for training "
            "and validation together; give train or val more than 0, such as 0.7/0.1/0.2"
        )
    return train / (train + val), val / (train + val)


def _draw(
    source: Source, split: str, seed: int, groups: Counts, given: Sequence[str | None]
) -> list[str]:
    """Draw the splits of the groups that have none, and keep the given ones.

    If only some records of a group have a split, such as copies of another source's image, the
    others follow: into test before val, and into val before train.
    """
    known: dict[int, str] = {}
    # A later split overrides an earlier one: what is a copy of a test image goes to test.
    for name in SPLITS:
        known |= {group: name for group, n in zip(groups.tolist(), given, strict=True) if n == name}
    counts = _images_by_group(source, groups)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(counts))
    order = order[~np.isin(order, list(known))]
    if len(order):
        total = counts[order].sum(axis=0)
        if split == PAPER:
            _refuse_small_classes(source, total)
        chosen = _place_groups(order, counts, *_targets(split, total))
        known |= {int(group): SPLITS[chosen[group]] for group in order}
    return [name or known[group] for group, name in zip(groups.tolist(), given, strict=True)]


def _draw_val(source: Source, split: str | None, seed: int, groups: Counts) -> list[str | None]:
    """Draw val from images that the source gives for train and val together; keep the others."""
    given = [record.split for record in source.records]
    counts = _images_by_group(source, groups)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(counts))
    by_split = {name: groups[[n == name for n in given]] for name in (*SPLITS, DEVELOPMENT)}
    # Groups with a given split are not drawn, so that no copy of a train image gets into val.
    closed = np.concatenate([by_split[name] for name in SPLITS])
    order = order[np.isin(order, by_split[DEVELOPMENT]) & ~np.isin(order, closed)]
    fractions = (*_development_fractions(split), 0.0)
    targets = _targets_of(fractions, counts[order].sum(axis=0))
    chosen = _place_groups(order, counts, *targets)
    chosen[by_split["val"]] = SPLITS.index("val")  # also their copies that are given for both
    return [
        SPLITS[number] if name == DEVELOPMENT else name
        for number, name in zip(chosen[groups], given, strict=True)
    ]


def _images_by_group(source: Source, groups: Counts) -> Counts:
    """Count images per group and class, int64 [groups, classes + 1]; the last have no label."""
    column_of = {name: i for i, name in enumerate(source.classes)}
    counts = np.zeros((groups.max() + 1, len(column_of) + 1), np.int64)
    for group, record in zip(groups, source.records, strict=True):
        counts[group, [column_of[name] for name in labels_of(record.label)] or [-1]] += 1
    return counts


def _targets(split: str, total: Counts) -> tuple[Counts, list[int]]:
    """Return how many images of each class a split should have, and which splits are requested.

    The targets for ``paper`` or fractions are int64 [3, classes + 1], from the images per class,
    int64 [classes + 1]. The first of the requested splits takes the remainder of rounding.
    """
    if split != PAPER:
        return _targets_of(parse_split(split), total)
    test = np.minimum(total, PAPER_TEST_IMAGES)
    val = np.rint(PAPER_VAL_FRACTION * (total - test)).astype(np.int64)
    return np.stack([total - test - val, val, test]), [0, 1, 2]


def _targets_of(fractions: Sequence[float], total: Counts) -> tuple[Counts, list[int]]:
    asked = [number for number, fraction in enumerate(fractions) if fraction > 0]
    targets = np.rint(np.outer(fractions, total)).astype(np.int64)
    targets[asked[0]] += total - targets.sum(axis=0)
    return targets, asked


def _place_groups(order: Counts, counts: Counts, targets: Counts, asked: list[int]) -> Counts:
    """Choose the split of each group: first test, then val; the other groups go to ``asked[0]``.

    ``order`` are the groups to place, in random order; ``counts`` are images, int64 [groups,
    columns]; ``targets`` are int64 [3, columns]; ``asked`` are the splits that may take groups. The
    result is int64 [groups].
    """
    chosen = np.full(len(counts), asked[0])
    for split in reversed(asked[1:]):
        left = order[chosen[order] == asked[0]]
        chosen[_take(left, counts, targets[split])] = split
    _give_each_split_each_class(order, counts, targets, asked, chosen)
    return chosen


def _take(order: Counts, counts: Counts, target: Counts) -> Counts:
    """Take groups for a split until none brings it closer to its target.

    First groups are taken that let no class exceed its target, then groups that reduce the relative
    distance from the target, summed over the classes. So a class misses its target by at most half
    of its largest group, if no group has two classes.
    """
    taken, left = [], []
    missing = target.copy()
    for group in order:
        if np.all(counts[group] <= missing):
            taken.append(group)
            missing -= counts[group]
        else:
            left.append(group)
    weights = 1 / np.maximum(target, 1)
    for group in left:
        after = missing - counts[group]
        if np.abs(after) @ weights < np.abs(missing) @ weights:
            taken.append(group)
            missing = after
    return np.array(taken, dtype=np.int64)


def _give_each_split_each_class(
    order: Counts, counts: Counts, targets: Counts, asked: list[int], chosen: Counts
) -> None:
    """Move groups, changing ``chosen``, so that each requested split has an image of each class.

    A tenth of a class of four images rounds to none, and a patient with many images may have left
    no room. The group is moved that leaves the two splits closest to their targets, among those
    whose move takes no other class away from a split.
    """
    has = counts > 0

    def per_split(table: NDArray[Any]) -> Counts:
        return np.stack([table[order[chosen[order] == i]].sum(axis=0) for i in range(len(SPLITS))])

    absent = (per_split(has) == 0) & has[order].any(axis=0)
    # From test to train, as in `_place_groups`. A move changes the counts, so they are made anew.
    for split, column in np.argwhere(absent)[::-1]:
        held, off = per_split(has), per_split(counts) - targets
        if split not in asked or held[split, column]:
            continue
        groups = order[has[order, column]]
        groups = groups[np.all((held[chosen[groups]] > 1) | ~has[groups], axis=1)]
        if len(groups):
            old, moved = chosen[groups], counts[groups]
            gained = np.abs(off[split] + moved) - np.abs(off[split])
            lost = np.abs(off[old] - moved) - np.abs(off[old])
            distance = (gained + lost).sum(axis=1)
            # lexsort sorts by its last key first: the distance, then the number of the old split.
            chosen[groups[np.lexsort((old, distance))[0]]] = split


def split_notes(
    source: Source, split: str | None, groups: Sequence[int], splits: Sequence[str]
) -> list[str]:
    """Return lines for the user about the result of `assign_splits`, given its arguments.

    There is a line if ``split`` was not used, since the source gives the splits; else a line for a
    patient with more than a tenth of all images, and one for each split that misses its target by
    more than `MISSED` of all images and by more than rounding (an image per class).
    """
    drawn = [i for i, record in enumerate(source.records) if record.split is None]
    if not drawn:
        is_open = any(record.split == DEVELOPMENT for record in source.records)
        if split is None or (is_open and split != PAPER):
            return []
        return [f"--split {split} is not used, since the source gives the splits"]
    of_all = "of the images" if is_drawn(source) else "of the images whose split is drawn"
    source = replace(source, records=[source.records[i] for i in drawn])
    groups, splits = [groups[i] for i in drawn], [splits[i] for i in drawn]
    # A group per image, since only the sums are used.
    counts = _images_by_group(source, np.arange(len(splits)))
    targets, asked = _targets(split or DEFAULT_FRACTIONS, counts.sum(axis=0))
    largest = max(Counter(groups).values())
    of_one = _images_of_largest_patient(source.records)
    lines = []
    if of_one > max(DOMINANT_IMAGES, len(splits) / 10):
        lines.append(
            f"one patient ID has {of_one} of {len(splits)} images; if it is a placeholder, give "
            "the patients with --patient-pattern or a csv column patient"
        )
    for number in asked:
        share = splits.count(SPLITS[number]) / len(splits)
        target = targets[number].sum() / counts.sum()
        if abs(share - target) > max(MISSED, len(source.classes) / len(splits)):
            lines.append(
                f"{SPLITS[number]} has {share:.0%} {of_all} instead of {target:.0%}, since "
                f"patients and copies stay together (up to {largest} images)"
            )
    return lines


def _refuse_small_classes(source: Source, total: Counts) -> None:
    for name, images in zip(source.classes, total, strict=False):  # the last total has no label
        # One more for train, and one for val.
        if images < PAPER_TEST_IMAGES + 2:
            raise CxrdistError(
                f"--split paper: takes {PAPER_TEST_IMAGES} test images of each class, but class "
                f"{name!r} has {images}; use fractions, such as --split {DEFAULT_FRACTIONS}"
            )


def _refuse_dominant_group(records: Sequence[Record], groups: Counts) -> None:
    """Reject a patient, or patients joined by copies, with more than half of all images.

    An anonymiser may have given all patients one ID. The message omits the ID: it may identify a
    person.
    """
    images = max(Counter(groups.tolist()).values())
    if images <= max(DOMINANT_IMAGES, len(records) / 2):
        return
    if images == _images_of_largest_patient(records):
        why = (
            "have the same patient ID, which looks like a placeholder (ANONYMIZED, UNKNOWN, 0); "
            "give the patients with --patient-pattern or a csv column patient"
        )
    else:
        why = "belong to patients that are joined by equal images; see --duplicates"
    raise CxrdistError(
        f"{images} of {len(records)} images {why}, or pack one split only, such as --split 0/0/1"
    )


def _images_of_largest_patient(records: Sequence[Record]) -> int:
    return max(Counter(record.patient for record in records).values())


def _refuse_shared_patients(records: Sequence[Record], splits: Sequence[str]) -> None:
    seen: dict[str, tuple[str, Record]] = {}
    for record, split in zip(records, splits, strict=True):
        first, other = seen.setdefault(record.patient, (split, record))
        if first != split:
            # A placeholder in place of the patients would explain it, and has another mend.
            _refuse_dominant_group(records, np.asarray(group_by_patient(records)))
            raise CxrdistError(
                f"patient {record.patient}: {other.file} is in {first}, {record.file} in {split}; "
                "give all images of a patient the same split"
            )


def _refuse_missing_classes(source: Source, splits: Sequence[str], asked: Sequence[str]) -> None:
    """Check that each requested split has images; with one label per image, of each class."""
    if lacking := [split for split in asked if split not in splits]:
        _refuse_dominant_group(source.records, np.asarray(group_by_patient(source.records)))
        raise CxrdistError(
            f"no image is in {lacking[0]}; add images or patients, or change --split"
        )
    if source.task == "multilabel":
        return
    there = {(r.label, split) for r, split in zip(source.records, splits, strict=True)}
    for label in source.classes:
        for split in asked:
            if (label, split) not in there:
                raise CxrdistError(
                    f"class {label!r} has no image in {split}; add images or patients of it, or "
                    "change --split (0 leaves a split empty)"
                )
