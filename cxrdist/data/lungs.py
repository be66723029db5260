"""Lungs: the pixels of a sample's square that are lung, by its mask or by a fixed ellipse."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.derived import PackedSample
from cxrdist.data.index import Index
from cxrdist.data.labels import POSITIVE
from cxrdist.data.masked import masks_of_samples
from cxrdist.data.masks import MaskPlace, mask_square
from cxrdist.data.records import SPLITS
from cxrdist.data.regions import is_constant, thorax
from cxrdist.errors import CxrdistError

Kind = Literal["masks", "ellipse"]
"""masks: a mask per image. ellipse: `cxrdist.data.regions.thorax`, the same for all images."""


@dataclass(frozen=True)
class Lungs:
    """The lungs of all samples."""

    kind: Kind
    why: str
    """Where the masks come from, or why the ellipse is used."""
    index: Index
    places: Mapping[int, MaskPlace] = field(default_factory=dict)
    """Masks that are not in the shards, by sample number."""

    def of(self, packed: PackedSample) -> NDArray[np.bool_] | None:
        """Return which pixels of a sample are lung, bool [size, size]; None if not known.

        A mask that covers nothing or everything counts as none.

        Raises:
            CxrdistError: the mask of a sample cannot be used.
        """
        if self.kind == "ellipse":
            return thorax(self.index.image_size_px)
        mask = packed.mask
        # Not empty where masks are given: `masks_of_samples` raises if none matches.
        if self.places:
            known = self.places.get(packed.number)
            shown = packed.facts["width_px"], packed.facts["height_px"]
            size_px, fit = self.index.image_size_px, self.index.fit
            mask = None if known is None else mask_square(known, shown, size_px, fit)
        return None if mask is None or is_constant(mask) else mask > 0


def find_lungs(index: Index, masks: Path | None) -> Lungs:
    """Choose masks or the ellipse, the same for all samples.

    The ellipse is used if the shards have no masks, or only for some classes, as in a set where
    people outlined only diseased lungs: having a mask would then reveal the class.

    ``masks`` is a source of masks as for `with_masks`; if None, the shards' own masks are used.

    Raises:
        CxrdistError: ``masks`` match no sample, or only samples of some classes.
    """
    if masks is not None:
        places, _ = masks_of_samples(index, masks)
        if lost := lost_class(index, {*range(len(index.samples))} - {*places}):
            raise CxrdistError(
                f"--masks {masks}: {lost}, so that having a mask would reveal the class; give "
                "masks for all classes, or leave out --masks to use an ellipse"
            )
        return Lungs("masks", str(masks), index, places)
    # Recognised by their hashes, so that no mask is decoded here.
    empty, full = _constant_masks(index.image_size_px)
    without = {
        number
        for number, sample in enumerate(index.samples)
        if sample.mask_sha256 in ("", empty, full)
    }
    if len(without) == len(index.samples):
        return Lungs("ellipse", "the shards have no masks", index)
    if lost := lost_class(index, without):
        return Lungs("ellipse", f"of the masks in the shards, {lost}", index)
    return Lungs("masks", "the masks in the shards", index)


def lost_class(index: Index, left_out: Collection[int]) -> str | None:
    """Find a class of which a split loses all positives or all negatives with the left out.

    A clause for messages is returned; None if there is no such class.
    """
    targets = index.targets()
    splits = np.array([sample.split for sample in index.samples])
    kept = np.ones(len(splits), bool)
    kept[list(left_out)] = False
    for split in SPLITS:
        for column, name in enumerate(index.classes):
            positive, known = targets[:, column] == POSITIVE, targets[:, column] >= 0
            for what, images in (("with", positive), ("without", known & ~positive)):
                here = images & (splits == split)
                if here.any() and not (here & kept).any():
                    return f"none is of an image {what} {name} in {split}"
    return None


def count_left_out(index: Index, left_out: Collection[int]) -> dict[str, int]:
    """Count the left-out samples per class; a sample with several labels counts for each."""
    rows = index.targets()[sorted(left_out)] == POSITIVE
    return {name: int(number) for name, number in zip(index.classes, rows.sum(0), strict=True)}


def _constant_masks(size_px: int) -> tuple[str, str]:
    """Return the sha256 of a mask that covers nothing, and of one that covers everything."""
    empty, full = (bytes([value]) * size_px**2 for value in (0, 255))
    return hashlib.sha256(empty).hexdigest(), hashlib.sha256(full).hexdigest()
