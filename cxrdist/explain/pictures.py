"""Write heat maps as files, over the squares given to a network or over their originals."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.inputs import Input, Preparation, read_original
from cxrdist.explain.heatmap import overlay
from cxrdist.explain.maps import Map, encode, write_maps
from cxrdist.files import atomic_file, remove_made

LONGEST_NAME = 80
"""Most bytes of a class name in a file name; file systems allow 255 in total."""
_MADE = re.compile(r"[\w-]*[0-9a-f]{8}\.\w+\.\w+\.png")  # a key ends in digits of a hash


class Probability(NamedTuple):
    """The probability of a class."""

    name: str
    value: float
    is_calibrated: bool

    def __str__(self) -> str:
        calibrated = "calibrated" if self.is_calibrated else "not calibrated"
        return f"probability {self.value:.3f}, {calibrated}"


@dataclass(frozen=True)
class Explained:
    """An X-ray with the relevance of its square, and for DICOM results the probabilities."""

    item: Input
    maps: Map
    probabilities: Sequence[Probability] = ()
    """Of each class of the maps."""

    @property
    def file(self) -> Path:
        """Return the file of the X-ray."""
        return self.item.file


def draw(explained: Explained, directory: Path, how: Preparation) -> None:
    """Write heat maps over an original, then KEY.npz with the relevance of its square.

    Raises:
        CxrdistError: the file is not a readable X-ray, or the relevance is not finite.
    """
    key, classes, relevance, _ = explained.maps
    original = read_original(explained.item, how)
    write_pictures(directory, key, original, relevance, classes, how.fit)
    write_maps(directory, [(key, encode(explained.maps, half=False))])


def safe_name(name: str) -> str:
    """Return a version of a class name that is valid in file names.

    Invalid characters are replaced, and long names are cut. Such names get a hash, so that no two
    classes share a file.
    """
    safe = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "-", name)
    # `ignore` drops a character that was cut in two.
    safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore")
    if safe != name:
        safe += f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def picture_names(key: str, names: list[str]) -> list[str]:
    """Return the file names of a sample's pictures: the X-ray, then its heat maps."""
    return [f"{key}.png", *(f"{key}.{safe_name(name)}.png" for name in names)]


def write_pictures(
    directory: Path,
    key: str,
    image: NDArray[np.uint8],
    relevance: NDArray[np.float32],
    classes: list[str],
    fit: str | None = None,
) -> None:
    """Write the X-ray as KEY.png, and one heat map per class over it as KEY.CLASS.png.

    The image, uint8 [H, W], is the square given to the network or, with ``fit``, its original. The
    relevance, float32 [classes, S, S], is that of the square.
    """
    image = np.asarray(image)  # a row of the cache is a memory map
    xray, *names = picture_names(key, classes)
    save_picture(directory / xray, Image.fromarray(image))
    for name, values in zip(names, relevance, strict=True):
        save_picture(directory / name, overlay(image, values, fit=fit))


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG."""
    with atomic_file(path) as partial:
        picture.save(partial, "PNG")


def replace_pictures(document: Path, directory: Path, pictures: Mapping[str, Image.Image]) -> None:
    """Write the pictures of a document by file name, and remove those of an earlier one.

    The earlier document is removed first, and the caller writes the new one last, so that a killed
    command leaves no document beside the pictures of another. Files with other names stay.
    """
    document.unlink(missing_ok=True)
    remove_made(directory, _MADE, pictures)
    for name, picture in pictures.items():
        save_picture(directory / name, picture)
