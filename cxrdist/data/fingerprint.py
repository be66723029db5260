"""Fingerprints: what is kept of an X-ray to find it again, its statistics and its thumbnail.

The perceptual hash is the one of the imagehash library bit for bit, at a third of its cost: only
the frequencies that it keeps are computed.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_SIDE = 16  # 256 bits; with 64, different X-rays are as near as altered copies
# Rows of the discrete cosine transform of 64 values, those of the lowest frequencies.
FREQUENCIES = np.cos(
    np.pi * np.outer(np.arange(HASH_SIDE), np.arange(4 * HASH_SIDE) + 0.5) / (4 * HASH_SIDE)
)
INNER = 0.94  # of the side: a copy may have lost 3 % of it on each
BORDER = 1 / 16  # of the side; of a 224 px square the outer 14 px
THUMBNAIL_PX = 32
DARK, BRIGHT = 10, 245  # grey levels of what is all but black or white


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a square once its pixels are gone.

    Attributes:
        sha256: of the pixels.
        phash: 32 bytes; similar images differ in few bits.
        inner_phash: the same of the inside, to find copies that were cropped.
        statistics: brightness and border by name, grey levels 0..255 or fractions 0..1.
    """

    sha256: str
    phash: bytes
    inner_phash: bytes
    statistics: dict[str, float]


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """Take the fingerprint of a square, uint8 [S, S]."""
    image = Image.fromarray(pixels)
    cut = (1 - INNER) / 2 * len(pixels)
    return Fingerprint(
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        phash=_phash(image, (0, 0, image.width, image.height)),
        inner_phash=_phash(image, (cut, cut, image.width - cut, image.height - cut)),
        statistics=_statistics(pixels, image),
    )


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Make a thumbnail: uint8 [S, S] -> [THUMBNAIL_PX, THUMBNAIL_PX], means of its areas."""
    size = THUMBNAIL_PX, THUMBNAIL_PX
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _phash(image: Image.Image, box: tuple[float, float, float, float]) -> bytes:
    """The perceptual hash of a part: which of the lowest 16 of 64 frequencies are above average."""
    side = FREQUENCIES.shape[1]
    small = np.asarray(image.resize((side, side), Image.Resampling.BOX, box), np.float64)
    low = FREQUENCIES @ small @ FREQUENCIES.T
    return np.packbits(low > np.median(low)).tobytes()


def _statistics(pixels: NDArray[np.uint8], image: Image.Image) -> dict[str, float]:
    """Return what a network could tell a source by without looking at a lung."""
    width = max(1, round(len(pixels) * BORDER))
    histogram = np.array(image.histogram()) / pixels.size
    levels = np.arange(256)
    mean = float(histogram @ levels)
    sides = {
        "border_top": pixels[:width],
        "border_bottom": pixels[-width:],
        "border_left": pixels[:, :width],
        "border_right": pixels[:, -width:],
    }
    return {
        "mean": round(mean, 3),
        "spread": round(float(np.sqrt(histogram @ (levels - mean) ** 2)), 3),
        "dark": round(float(histogram[:DARK].sum()), 5),
        "bright": round(float(histogram[BRIGHT + 1 :].sum()), 5),
        **{name: round(float(side.mean()), 3) for name, side in sides.items()},
    }
