"""Masks: the pixels of an image that are lung.

A mask is a picture of two levels, or a row of a table of run lengths. Refused: DICOM, pictures of
several organs, and X-rays.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.geometry import place, resample
from cxrdist.data.kinds import FORMATS, HEAD_BYTES, kind_of
from cxrdist.data.pictures import read_file, read_picture
from cxrdist.data.run_lengths import read_runs
from cxrdist.documents import Between, Share
from cxrdist.errors import CxrdistError

HALF = 128  # grey level from which a pixel counts as covered
# A mask that was smoothed or stored as JPEG has grey pixels at its outline. In an X-ray more than
# half of the pixels are grey.
SOFT, MOST_SOFT = (32, 224), 0.1
WHOLE_SIZE = 1 << 16  # px; larger than any JPEG, so that masks are decoded at full size


Count = Annotated[int, Between(0, 1 << 32)]


class MaskPlace(NamedTuple):
    """Where the mask of an image is."""

    file: Path
    """A picture, or a table of run lengths."""
    first_byte: int = 0
    """Position of the image's row in a table."""
    num_bytes: int = 0
    """Length of that row; 0 for a picture."""


class MasksEntry(TypedDict):
    """The masks of some images: their number, and the share of the square that they cover."""

    images: Count
    """Images with a mask."""
    least: Share
    median: Share
    most: Share
    empty: Count
    """Masks that cover nothing."""
    full: Count
    """Masks that cover everything."""


def describe_masks(shares: Sequence[float]) -> MasksEntry | None:
    """Summarise the shares of the squares that masks cover; None if there are no masks."""
    if not shares:
        return None
    least, median, most = (round(float(q), 4) for q in np.quantile(shares, (0, 0.5, 1)))
    return {
        "images": len(shares),
        "least": least,
        "median": median,
        "most": most,
        "empty": sum(share == 0 for share in shares),
        "full": sum(share == 1 for share in shares),
    }


def masks_line(masks: MasksEntry, num_images: int) -> str:
    """Return a line for the user on the masks of some images."""
    without = num_images - masks["images"]
    line = (
        f"masks: {masks['images']} images have one, {without} do not; they cover "
        f"{masks['least']:.0%} to {masks['most']:.0%} of the square, median {masks['median']:.0%}"
    )
    odd = {"cover nothing": masks["empty"], "cover everything": masks["full"]}
    return "; ".join([line, *(f"{number} {what}" for what, number in odd.items() if number)])


def read_mask(place: MaskPlace, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Read the mask of an image, uint8 [H, W] of 0 and 255.

    Its size may differ from that of the image as it is shown, its aspect ratio does not.

    Raises:
        CxrdistError: it cannot be read, is not a mask, or has another aspect ratio than the image.
    """
    if place.num_bytes:
        mask = read_runs(place.file, place.first_byte, place.num_bytes)
    else:
        mask = _two_levels(_read_grey(place.file), place.file)
    height, width = mask.shape
    # Each side of the smaller of the two may be rounded by a pixel.
    rounding = max(width + height, width_px + height_px)
    if abs(width * height_px - height * width_px) > rounding:
        raise CxrdistError(
            f"{place.file}: has {width} x {height} px, which is not the aspect ratio of the image "
            f"({width_px} x {height_px} px): it belongs to another image, or is rotated or cropped"
        )
    return mask


def mask_square(
    mask: MaskPlace, shown: tuple[int, int], size_px: int, fit: str
) -> NDArray[np.uint8]:
    """Read the mask of an image, and transform it into the square like its image.

    ``shown`` is width and height of the image, in px. A pixel of the result, uint8 [size, size], is
    255 if at least half of it is covered, else 0. Errors are those of `read_mask`.
    """
    whole = read_mask(mask, *shown)
    height, width = whole.shape
    here = place(*shown, size_px, fit).at_scale(width / shown[0], height / shown[1])
    return _halved(np.asarray(resample(Image.fromarray(whole), here, size_px)))


def _read_grey(file: Path) -> NDArray[np.uint8]:
    data = read_file(file)
    kind = kind_of(data[:HEAD_BYTES])
    if kind is None or kind not in FORMATS:
        raise CxrdistError(
            f"{file}: is not a readable mask; expected a picture ({', '.join(FORMATS)})"
        )
    return np.asarray(read_picture(data, kind, file, WHOLE_SIZE).image)


def _two_levels(grey: NDArray[np.uint8], file: Path) -> NDArray[np.uint8]:
    """Convert a picture to a mask: black and one other level, or black and white with soft edge."""
    pixels = np.bincount(grey.ravel(), minlength=256)
    levels = np.flatnonzero(pixels)
    # Any level: segmentation programs write 1 for the lungs, which looks black.
    if len(levels) == 1 or (len(levels) == 2 and levels[0] == 0):
        return np.where(grey > 0, np.uint8(255), np.uint8(0))
    soft = pixels[slice(*SOFT)].sum() / grey.size
    # The numbers of several organs, such as 1 to 3, stay below HALF.
    if levels[-1] < HALF or soft > MOST_SOFT:
        raise CxrdistError(
            f"{file}: has {len(levels)} grey levels, {soft:.0%} of its pixels between black and "
            "white; expected a mask of two levels"
        )
    return _halved(grey)


def _halved(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(grey >= HALF, np.uint8(255), np.uint8(0))
