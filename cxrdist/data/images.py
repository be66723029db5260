"""Images in the wild -> uint8 grey squares -> PNG.

File kinds are recognised in `kinds`; pixel values are read in `pictures`, `dicom` and `depth`.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.boxes import Box, cover
from cxrdist.data.geometry import place, resample, scaled
from cxrdist.data.kinds import FORMATS, HEAD_BYTES, kind_of
from cxrdist.data.masks import MaskPlace, mask_square
from cxrdist.data.pictures import Picture, read_file, read_picture
from cxrdist.errors import CxrdistError

DICOM_SUFFIXES = {".dcm", ".dicom", ".dic"}


def decode(
    file: Path,
    size_px: int,
    fit: str,
    boxes: Sequence[Box] = (),
    how: str = "black",
    depth: int | None = None,
    mask: MaskPlace | None = None,
) -> Picture:
    """Decode an image to a grey square, with its boxes covered in a second one, and its mask.

    The filter is anti-aliased. Boxes of burned-in text, in px of the original, are covered as in
    `cover` before the image becomes square; they do not change the mask. ``fit`` is that of
    `place`, ``depth`` that of `read_grey`.

    Raises:
        CxrdistError: the file is not a readable X-ray, or its mask cannot be used.
    """
    # Twice the square, as in Pillow's `thumbnail`: nearly what the whole JPEG would give.
    grey = read_grey(file, 2 * size_px, depth)
    shown, covered = (grey.width_px, grey.height_px), None
    placement = place(*shown, size_px, fit).at_scale(*grey.scale())
    # Padded squares get no reducing gap, so that their bytes equal those of older shards.
    gap = None if fit == "pad" else 2.0
    if boxes:
        here = [scaled(box, *grey.scale()) for box in boxes]
        image = Image.fromarray(cover(grey.pixels, here, how))
        covered = np.asarray(resample(image, placement, size_px, gap))
    moved = None if mask is None else _mask_square(file, mask, shown, size_px, fit)
    square = resample(grey.image, placement, size_px, gap)
    return replace(grey, image=square, covered=covered, mask=moved)


def _mask_square(
    file: Path, place_of_mask: MaskPlace, shown: tuple[int, int], size_px: int, fit: str
) -> NDArray[np.uint8]:
    """Return the mask of an image as a square; errors name the image."""
    try:
        return mask_square(place_of_mask, shown, size_px, fit)
    except CxrdistError as error:
        # The mask's file name may identify a patient; the caller can anonymise the image's name.
        problem = str(error).removeprefix(f"{place_of_mask.file}: ")
        problem = problem.replace(str(place_of_mask.file), "the table of masks")
        raise CxrdistError(f"{file}: its mask: {problem}") from error


def read_grey(file: Path, least_px: int, depth: int | None = None) -> Picture:
    """Read an image of one of `FORMATS`, or a DICOM, in grey.

    The content of the file, local or an fsspec path, decides its kind. Arguments and grey levels
    are those of `read_picture`, and of `read_dicom` for a DICOM.

    Raises:
        CxrdistError: the file is not a readable X-ray.
    """
    data = read_file(file)
    kind = kind_of(data[:HEAD_BYTES])
    if _is_dicom(kind, file):
        from cxrdist.data.dicom import read_dicom  # importing pydicom takes most of a second

        return read_dicom(data, file, depth)
    if kind is None:
        raise CxrdistError(
            f"{file}: is not a readable image (unknown format); expected {', '.join(FORMATS)} or "
            "DICOM"
        )
    return read_picture(data, kind, file, least_px, depth)


def is_dicom(file: Path) -> bool:
    """Return whether `read_grey` would read a file as DICOM."""
    with file.open("rb") as content:
        return _is_dicom(kind_of(content.read(HEAD_BYTES)), file)


def _is_dicom(kind: str | None, file: Path) -> bool:
    # An old DICOM without a preamble may begin with an element that `kind_of` does not know.
    return kind == "DICOM" or (kind is None and file.suffix.lower() in DICOM_SUFFIXES)


def read_square(file: Path, size_px: int, fit: str, depth: int | None = None) -> NDArray[np.uint8]:
    """Return only the square of `decode`, uint8 [size_px, size_px]."""
    return decode(file, size_px, fit, depth=depth).pixels


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a grey image, uint8 [H, W].

    Compression level 1 is 4 times as fast as Pillow's default 6 and 15 % larger; encoding then
    costs a sixth of decoding.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode what `encode_png` wrote, uint8 [H, W]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image)
