"""Class folders: images in folders that are named after classes, and perhaps splits.

The layouts are CLASS/..., SPLIT/CLASS/... and CLASS/SPLIT/..., with SPLIT from `SPLIT_NAMES`.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cxrdist.data.found import Found, LeftOut, escaped, find_images, is_hidden, is_within
from cxrdist.data.patients import compile_pattern, patient_of
from cxrdist.data.records import DEVELOPMENT, SPLIT_NAMES, Record, Source, known_source
from cxrdist.errors import CxrdistError

# Only where a word begins: not in `strain` or `latest`.
LOOKS_LIKE_SPLIT = re.compile(r"(?:^|[\W_\d])(train|val|test|dev)")
MASKS = ("mask", "masks")
# As cross-validation, ChestX-ray14 and PadChest name the parts of a set.
PART = re.compile(r"(k?folds?|cv|images?|parts?|batch|splits?|subset)[\W_]*\d+", re.IGNORECASE)


def read_class_folders(
    folder: Path, patient_pattern: str | None = None, besides: Sequence[Path] = ()
) -> Source:
    """Read the images of class folders, except those in folders of ``besides``.

    The pattern is a regular expression; the first group that matches in a file's name is the
    patient. Without it, or if it does not match, the image has a patient of its own.

    Raises:
        CxrdistError: a class has no image, or it is unclear which folders are classes, which are
            splits, and which are neither.
    """
    pattern = compile_pattern(patient_pattern)
    found = find_images(folder, besides)
    levels = [file.relative_to(folder).parts[:-1] for file in found.images]
    _refuse_other_folders(folder, {*levels})
    split_level = _find_split_level(folder, levels)
    num_levels = 1 if split_level is None else 2
    records, stray = [], []
    for file, names in zip(found.images, levels, strict=True):
        path = file.relative_to(folder).as_posix()
        if len(names) < num_levels:
            stray.append(LeftOut(path, "beside the class folders"))
            continue
        label = names[1 if split_level == 0 else 0]
        split = None if split_level is None else SPLIT_NAMES[names[split_level].lower()]
        source = known_source(file.name, folder.name)
        records.append(Record(file, path, label, patient_of(path, pattern), source, split))
    if stray and not records:
        raise CxrdistError(
            f"--input {folder}: has {len(stray)} images, none of them in the folder of a class; "
            "expected one sub-folder per class"
        )
    records = _leave_val_open(records)
    _refuse_empty_classes(folder, besides, split_level, records, found)
    return Source(
        records,
        "multiclass",
        sorted({record.label for record in records}),
        folder.name,
        left_out=(*found.left_out, *stray),
        num_found=found.num_files,
        dicom=found.dicom,
    )


def _refuse_other_folders(folder: Path, levels: Collection[tuple[str, ...]]) -> None:
    """Reject folders of masks, and parts of a set in place of its classes."""
    if masks := next((name for names in levels for name in names if name.lower() in MASKS), None):
        raise CxrdistError(
            f"--input {folder}: the folder {masks} has masks, which are no X-rays; move it out and "
            "give it with --masks"
        )
    tops = sorted({names[0] for names in levels if names})
    if len(tops) > 1 and all(map(PART.fullmatch, tops)):
        raise CxrdistError(
            f"--input {folder}: the folders {', '.join(tops[:3])} are named like parts of a set; "
            "expected one sub-folder per class: put the images of a class together, or list them "
            "in a table (--source csv)"
        )


def _find_split_level(folder: Path, levels: Iterable[tuple[str, ...]]) -> int | None:
    """Return the level of the folders that are splits: 0 upper, 1 lower, None if none are.

    It is an error if only some folders of a level are splits, or if two are the same split.
    """
    below: dict[str, set[str]] = defaultdict(set)
    for parts in levels:
        if parts:
            # The empty name stands for images that are directly in the upper folder.
            below[parts[0]].add(parts[1] if len(parts) > 1 else "")
    for level, siblings in enumerate(([set(below)], list(below.values()))):
        folders = set[str]().union(*siblings)
        splits = sorted(name for name in folders if name.lower() in SPLIT_NAMES)
        if not splits:
            _refuse_like_splits(folder, siblings)
            continue
        others = sorted(folders - {*splits})
        # All upper folders are splits: the lower ones are the classes, and none may be a split.
        if level == 0 and not others:
            lower = set[str]().union(*below.values())
            others = sorted(name for name in lower if name.lower() in SPLIT_NAMES)
        if others:
            raise CxrdistError(
                f"--input {folder}: has folders of splits ({', '.join(splits[:3])}) and others "
                f"({', '.join(name or 'images' for name in others[:3])}); expected SPLIT/CLASS or "
                "CLASS/SPLIT for all images, or no folder named like a split: move or rename the "
                "others, or list the images in a table (--source csv)"
            )
        for names in siblings:
            _refuse_equal_splits(folder, names)
        return level
    return None


def _refuse_like_splits(folder: Path, siblings: Iterable[set[str]]) -> None:
    """Reject folders such as train_images and test_images; a single such name may be a class."""
    for names in siblings:
        like = {
            name: match[1] for name in names if (match := LOOKS_LIKE_SPLIT.search(name.lower()))
        }
        if len(set(like.values())) > 1:
            raise CxrdistError(
                f"--input {folder}: the folders {', '.join(sorted(like)[:3])} look like splits; "
                "rename them to train, val and test, or to other names if they are classes"
            )


def _refuse_equal_splits(folder: Path, names: Iterable[str]) -> None:
    names = sorted(names)
    splits = [SPLIT_NAMES[name.lower()] for name in names]
    if twice := next((split for split in splits if splits.count(split) > 1), None):
        both = " and ".join(n for n, s in zip(names, splits, strict=True) if s == twice)
        raise CxrdistError(
            f"--input {folder}: the folders {both} are both {twice}; put their images together"
        )


def _leave_val_open(records: list[Record]) -> list[Record]:
    """Let validation images be drawn from the training images if there is no val folder."""
    if {record.split for record in records} & {None, "val"}:  # None: all splits are to be drawn
        return records
    return [replace(r, split=DEVELOPMENT) if r.split == "train" else r for r in records]


def _refuse_empty_classes(
    folder: Path,
    besides: Sequence[Path],
    split_level: int | None,
    records: Sequence[Record],
    found: Found,
) -> None:
    """Reject class folders without an image, with the reason from the files left out of them."""
    tops = _class_folders(folder, besides)
    if split_level == 0:
        splits = [top for top in tops if top.name.lower() in SPLIT_NAMES]
        tops = [child for split in splits for child in _class_folders(split, besides)]
    labels = {record.label for record in records}
    for child in tops:
        if child.name not in labels:
            path = escaped(child.relative_to(folder).as_posix())
            inside = [x for x in found.left_out if x.path == path or x.path.startswith(f"{path}/")]
            why = f" ({inside[0].path}: {inside[0].reason})" if inside else ""
            raise CxrdistError(
                f"{escaped(str(child))}: the class has no image{why}; add some or remove the folder"
            )


def _class_folders(folder: Path, besides: Sequence[Path]) -> list[Path]:
    return [
        child
        for child in sorted(folder.iterdir(), key=str)
        if child.is_dir()
        and not is_hidden(child.name)
        and not any(is_within(child, other) for other in besides)
    ]
