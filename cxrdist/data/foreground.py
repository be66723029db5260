"""The foreground: the pixels that a network may use; all others are background."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.boxes import inside
from cxrdist.data.cache import Masks, unpack_masks
from cxrdist.data.regions import Region, border, thorax
from cxrdist.data.square_boxes import SquareBoxes

FULL = 255


@dataclass(frozen=True)
class Foreground:
    """Foreground squares by sample number, computed on access.

    An image without background, such as one without a mask if only masks are used, is foreground
    everywhere. A mask that covers nothing or everything counts as none.
    """

    fixed: NDArray[np.uint8]
    """uint8 [S, S]: 0 for pixels that are background in all images, else 1."""
    masks: Masks | None
    """Masks of the lungs, as `open_masks` returns them; None if they are not used."""
    boxes: SquareBoxes
    """Boxes of text; empty if they are not used."""

    def __getitem__(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the foreground of some samples, uint8 [B, S, S], `FULL` or 0."""
        readable = np.repeat(self.fixed[None] * np.uint8(FULL), len(numbers), axis=0)
        if self.masks is not None:
            bits = unpack_masks(self.masks[numbers], len(self.fixed))
            bits[~bits.any(axis=(1, 2))] = 1
            readable *= bits
        for row, number in enumerate(numbers.tolist()):
            if number in self.boxes:
                readable[row][inside(self.boxes[number], *self.fixed.shape)] = 0
        return readable

    def has_background(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of some samples have any background, bool [N]."""
        if not self.fixed.all():
            return np.ones(len(numbers), dtype=bool)
        # `numpy.isin` finds nothing in a dict or a view of its keys.
        with_background = np.isin(numbers, list(self.boxes))
        if self.masks is not None:
            with_background |= has_mask(self.masks, numbers, len(self.fixed))
        return with_background


def foreground_of(
    regions: Collection[Region], size_px: int, masks: Masks | None, boxes: SquareBoxes
) -> Foreground:
    """Return the foreground that is left outside of some regions.

    Masks and boxes of text, of all samples, are required if the regions use them.
    """
    fixed = np.ones((size_px, size_px), np.uint8)
    if "border" in regions:
        fixed[border(size_px)] = 0
    if "thorax" in regions:
        fixed[~thorax(size_px)] = 0
    return Foreground(
        fixed, masks if "masks" in regions else None, boxes if "text" in regions else {}
    )


def has_mask(masks: Masks, numbers: NDArray[np.int64], size_px: int) -> NDArray[np.bool_]:
    """Return which of some samples have a mask that covers a part of the square, bool [N]."""
    covered = np.array([np.bitwise_count(masks[n]).sum() for n in numbers.tolist()], np.int64)
    return (covered > 0) & (covered < size_px**2)
