"""Outlines: boxes and masks that people drew, in px of the squares of samples."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.boxes import inside
from cxrdist.data.cache import Masks, unpack_masks
from cxrdist.data.findings import Finding
from cxrdist.data.found import path_ends
from cxrdist.data.geometry import clipped, in_square, scaled
from cxrdist.data.index import Index
from cxrdist.data.labels import labels_of
from cxrdist.data.masked import masks_of_samples
from cxrdist.data.masks import mask_square
from cxrdist.data.nih_boxes import Boxes, read_box_table
from cxrdist.data.shards import SampleFile
from cxrdist.errors import CxrdistError

OF_SHARDS = "the shards"
STRANGE = "of images that are not in the shards"
UNKNOWN = "of labels that the model does not have"
OUTSIDE = "outside the squares"
CUT = "of images that are not square, unlike the NIH's originals"
UNLABELLED = "of images without a label"
Case = tuple[int, str]  # number of the sample, and class


@dataclass(frozen=True)
class Outlines:
    """Boxes or masks of some samples."""

    kind: Literal["boxes", "masks"]
    """Boxes, around signs of one class each; or masks of the lungs, for all classes of an image."""
    origin: str
    """Where they come from."""
    shapes: Mapping[Case, int]
    """Number of boxes or masks per case."""
    left_out: Mapping[str, int]
    """Number of unused ones, by reason."""
    read: Callable[[Case], NDArray[np.bool_]]
    """Returns the pixels of a case, bool [S, S]; possibly none."""
    notes: tuple[str, ...] = ()
    """What a user should know, one line each."""


def boxes_of_shards(index: Index, originals: Mapping[int, SampleFile]) -> Outlines:
    """Return the boxes that were packed with the samples; ``originals`` are their KEY.json."""
    cases, left_out = defaultdict(list), Counter[str]()
    for number, original in originals.items():
        for box in original.get("boxes", ()):
            if box.label in index.classes:
                cases[number, box.label].append(box)
            else:
                left_out[UNKNOWN] += 1
    return _boxes(index, OF_SHARDS, cases, left_out)


def boxes_of_table(index: Index, originals: Mapping[int, SampleFile], file: Path) -> Outlines:
    """Read a table of boxes and convert them to px of the squares of its images.

    The index is that of the shards as the model takes them; only samples in ``originals`` are used.

    Raises:
        CxrdistError: it cannot be read, or none of its images is in the shards.
    """
    table = read_box_table(file)
    cases, left_out = defaultdict(list), Counter[str]()
    named = _match(table.findings, index, file)
    for name, boxes in table.findings.items():
        number = named.get(name)
        if number is None or number not in originals:
            left_out[STRANGE if number is None else _elsewhere(index, number)] += len(boxes)
            continue
        for box in boxes:
            fate = _fate(box, index, originals[number], table)
            if isinstance(fate, str):
                left_out[fate] += 1
            else:
                cases[number, box.label].append(fate)
    return _boxes(index, file.name, cases, left_out)


def _fate(box: Finding, index: Index, original: SampleFile, table: Boxes) -> Finding | str:
    """Return the box in its square, or why it is not used."""
    if box.label not in index.classes:
        return UNKNOWN
    width, height = original["width_px"], original["height_px"]
    if table.side_px is not None:
        if width != height:
            return CUT
        box = scaled(box, width / table.side_px, width / table.side_px)
    size_px = index.image_size_px
    return clipped(in_square(box, width, height, size_px, index.fit), size_px) or OUTSIDE


def _match(names: Collection[str], index: Index, file: Path) -> dict[str, int]:
    """Find the sample whose path ends with each name, ignoring suffixes."""
    paths = [sample.path for sample in index.samples]
    ends, matches = path_ends(paths, names), dict[str, int]()
    for name in names:
        numbers = ends.get(name, [])
        if len(numbers) > 1:
            raise CxrdistError(
                f"{file}: {name} may be {paths[numbers[0]]} or {paths[numbers[1]]}; write the "
                "images' folders as well"
            )
        if numbers:
            matches[name] = numbers[0]
    if not matches:
        example = next(iter(names), "nothing")
        raise CxrdistError(
            f"--boxes {file}: has no image of the shards; expected names such as {paths[0]}, found "
            f"such as {example}"
        )
    return matches


def _elsewhere(index: Index, number: int) -> str:
    return f"of images in {index.samples[number].split or 'no split'}"


def _boxes(
    index: Index, origin: str, cases: Mapping[Case, Sequence[Finding]], left_out: Mapping[str, int]
) -> Outlines:
    size_px = index.image_size_px

    def read(case: Case) -> NDArray[np.bool_]:
        return inside(cases[case], size_px, size_px)

    shapes = {case: len(cases[case]) for case in sorted(cases)}
    return Outlines("boxes", origin, shapes, left_out, read)


def masks_of_shards(index: Index, masks: Masks, numbers: Collection[int]) -> Outlines:
    """Return the masks, as `open_masks` gives them, that were packed with some samples."""
    size_px = index.image_size_px

    def read(case: Case) -> NDArray[np.bool_]:
        return unpack_masks(masks[[case[0]]], size_px)[0].astype(bool)

    with_mask = [number for number in numbers if index.samples[number].mask_sha256]
    return _masks(index, OF_SHARDS, with_mask, Counter(), read)


def masks_of_files(index: Index, originals: Mapping[int, SampleFile], masks: Path) -> Outlines:
    """Match masks with samples as `cxrdist pack` does with images; each is read on demand.

    Index and originals are those of `boxes_of_table`; masks are a folder of pictures or a table of
    run lengths.

    Raises:
        CxrdistError: there are no masks, or none fits.
    """
    places, notes = masks_of_samples(index, masks)
    left_out = Counter(_elsewhere(index, i) for i in places if i not in originals)

    def read(case: Case) -> NDArray[np.bool_]:
        original = originals[case[0]]
        shown = original["width_px"], original["height_px"]
        return mask_square(places[case[0]], shown, index.image_size_px, index.fit) > 0

    outlines = _masks(index, masks.name, [i for i in places if i in originals], left_out, read)
    return replace(outlines, notes=notes)


def _masks(
    index: Index,
    origin: str,
    numbers: Sequence[int],
    left_out: Mapping[str, int],
    read: Callable[[Case], NDArray[np.bool_]],
) -> Outlines:
    """Return the masks as outlines, with a case for each label of an image."""
    shapes: dict[Case, int] = {}
    without = 0
    for number in sorted(numbers):
        labels = labels_of(index.samples[number].label)
        shapes |= {(number, label): 1 for label in labels}
        without += not labels
    if without:
        left_out = {**left_out, UNLABELLED: without}
    return Outlines("masks", origin, shapes, left_out, read)
