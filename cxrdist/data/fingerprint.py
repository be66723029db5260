"""Fingerprints: what tells whether two X-rays are the same, and what an X-ray's rim betrays."""

import hashlib
from dataclasses import dataclass

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_SIDE = 16  # 256 bits; with 64, different X-rays are as near as altered copies
INNER = 0.94  # of the side: a copy may have lost 3 % of it on each
BORDER = 1 / 16  # of the side; of a 224 px square the outer 14 px
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
    cut = round((1 - INNER) / 2 * len(pixels))
    return Fingerprint(
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        phash=_phash(pixels),
        inner_phash=_phash(pixels[cut : len(pixels) - cut, cut : len(pixels) - cut]),
        statistics=_statistics(pixels),
    )


def _phash(pixels: NDArray[np.uint8]) -> bytes:
    return np.packbits(imagehash.phash(Image.fromarray(pixels), HASH_SIDE).hash).tobytes()


def _statistics(pixels: NDArray[np.uint8]) -> dict[str, float]:
    """What a network could tell a source by without looking at a lung."""
    width = max(1, round(len(pixels) * BORDER))
    histogram = np.bincount(pixels.ravel(), minlength=256) / pixels.size
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
