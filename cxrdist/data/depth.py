"""Bit depth: the stored value that is white, for files of more than 8 bits that do not declare it.

A 16-bit PNG, TIFF or PGM has the values of its detector, mostly 10 to 14 bits, and no field for
their depth; so does a DICOM with 16 of 16 bits stored and no window. All such images of a source
get one depth: a scale per image would make grey levels depend on the brightest pixel.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEPTHS = (8, 10, 12, 14, 16)  # of detectors and their converters
BLOCK_PIXELS = 1 << 20
HOT_PIXELS = 0.001  # share of an image that may exceed its depth: defects of the detector


def count_words(words: NDArray[Any]) -> NDArray[np.int64]:
    """Count the pixels per value, int64 [256 or 65536]; words are unsigned [H, W]."""
    counts = np.zeros(1 << 8 * words.itemsize, np.int64)
    rows = max(1, BLOCK_PIXELS // words.shape[1])  # bincount copies to int64, so count in blocks
    for start in range(0, len(words), rows):
        counts += np.bincount(words[start : start + rows].ravel(), minlength=len(counts))
    return counts


def used_depth(values: NDArray[np.integer], counts: NDArray[np.int64]) -> int:
    """Return the smallest of `DEPTHS` that at most `HOT_PIXELS` of an image exceed.

    ``counts`` are the pixels per value; both are int [N].
    """
    # A single hot pixel of 4096 would make a 12-bit image a 14-bit one, a quarter as bright.
    allowed = HOT_PIXELS * int(counts.sum())
    return next(d for d in DEPTHS if counts[values > white_of(d)].sum() <= allowed)


def white_of(depth: int) -> int:
    """Return the value that is white at a depth."""
    return (1 << depth) - 1


def grey_of(white: int) -> NDArray[np.uint8]:
    """Return the grey level of each 16-bit value, uint8 [65536]; 255 from white on."""
    return np.rint(255 * np.minimum(np.arange(1 << 16) / white, 1)).astype(np.uint8)


def source_depth(used: Iterable[int | None]) -> int | None:
    """Return the depth of a source: the largest number of bits that one of its images uses.

    None stands for an image that declares its depth, and is returned if all images do.
    """
    return max((depth for depth in used if depth is not None), default=None)


def describe_depth(depth: int, used: Iterable[int | None]) -> str:
    """Return a line for the summary of a pack: the depth, and the images per used bits."""
    counts = Counter(bits for bits in used if bits is not None)
    listed = ", ".join(f"{bits} bits: {counts[bits]}" for bits in sorted(counts))
    return (
        f"images of more than 8 bits that do not declare their depth are scaled by {depth} bits, "
        f"2 ** {depth} - 1 is white (images by the bits they use: {listed}); --depth sets another"
    )
