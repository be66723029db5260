"""Images of the wild -> uint8 grey squares -> PNG."""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cxrdist.data.boxes import Box, cover, scaled
from cxrdist.errors import CxrdistError

FORMATS = ("PNG", "JPEG")
MOST_BYTES = 256 << 20  # of a file; the largest X-ray detectors give 40 MB uncompressed
MOST_PIXELS = 50_000_000  # of an image; the largest detectors have 25 million
DICOM_PREAMBLE = 128  # bytes before the mark (DICOM PS3.10, section 7.1)
DICOM_SUFFIXES = {".dcm", ".dicom", ".dic"}
MARKS = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
ORIENTATION = 0x0112  # EXIF tag; from 5 on the image is shown on its side


@dataclass(frozen=True)
class Decoded:
    """A raw image as a square, and what its file tells.

    Attributes:
        pixels: uint8 [S, S].
        width_px: of the original as it is shown.
        height_px: of the original as it is shown.
        patient: the DICOM's PatientID, or empty.
        view: the DICOM's ViewPosition, or empty.
        covered: uint8 [S, S], the square of the original with its boxes covered; None without.
    """

    pixels: NDArray[np.uint8]
    width_px: int
    height_px: int
    patient: str = ""
    view: str = ""
    covered: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Grey:
    """A raw image in grey, and what its file tells.

    Attributes:
        image: mode L; a JPEG may be smaller than its original.
        width_px: of the original as it is shown.
        height_px: of the original as it is shown.
        patient: the DICOM's PatientID, or empty.
        view: the DICOM's ViewPosition, or empty.
    """

    image: Image.Image
    width_px: int
    height_px: int
    patient: str = ""
    view: str = ""

    def scale(self) -> tuple[float, float]:
        """How wide and high the image is, of the original."""
        return self.image.width / self.width_px, self.image.height / self.height_px


def decode(
    file: Path, size_px: int, fit: str, boxes: Sequence[Box] = (), how: str = "black"
) -> Decoded:
    """Decode a PNG, JPEG or DICOM to a grey square, and to another one with boxes covered.

    The filter is anti-aliased. Boxes are covered in the original, before it becomes square.

    Args:
        file: the image, local or an fsspec path; a DICOM is known by its content.
        size_px: side of the square.
        fit: ``crop`` the centre, ``pad`` with black, or ``stretch``.
        boxes: of burned-in text, in px of the original.
        how: as in `cover`.

    Raises:
        CxrdistError: the file is no readable X-ray.
    """
    grey = read_grey(file, 2 * size_px)
    square = np.asarray(_square(grey.image, size_px, fit))
    covered = None
    if boxes:
        here = [scaled(box, *grey.scale()) for box in boxes]
        image = Image.fromarray(cover(np.asarray(grey.image), here, how))
        covered = np.asarray(_square(image, size_px, fit))
    return Decoded(square, grey.width_px, grey.height_px, grey.patient, grey.view, covered)


def read_grey(file: Path, least_px: int) -> Grey:
    """Read a PNG, JPEG or DICOM in grey.

    Colour becomes luma (ITU-R 601), transparency black, an EXIF turn is applied. 16-bit PNG values
    are scaled by the bit depth that they use (the smallest of 8, 10, 12, 14, 16 that holds the
    maximum), since 12-bit detectors are common.

    Args:
        file: the image, local or an fsspec path; a DICOM is known by its content.
        least_px: sides down to which a JPEG may be decoded smaller, and so faster.

    Raises:
        CxrdistError: the file is no readable X-ray.
    """
    data = _read(file)
    if is_dicom(data) or file.suffix.lower() in DICOM_SUFFIXES:
        from cxrdist.data.dicom import read_dicom  # pydicom costs most of a second

        dicom = read_dicom(data, file)
        height, width = dicom.pixels.shape
        return Grey(Image.fromarray(dicom.pixels), width, height, dicom.patient, dicom.view)
    try:
        return _read_picture(data, least_px)
    except UnidentifiedImageError:
        raise CxrdistError(f"{file}: no readable PNG, JPEG or DICOM (unknown format)") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CxrdistError(f"{file}: no readable PNG, JPEG or DICOM ({reason})") from error


def read_square(file: Path, size_px: int, fit: str) -> NDArray[np.uint8]:
    """The square alone of `decode`, uint8 [size_px, size_px]."""
    return decode(file, size_px, fit).pixels


def kind_of(head: bytes) -> str | None:
    """The kind of image that a file's first bytes begin, such as PNG or DICOM; None for no image."""
    if is_dicom(head):
        return "DICOM"
    return next((kind for mark, kind in MARKS.items() if head.startswith(mark)), None)


def is_dicom(data: bytes) -> bool:
    """Whether a file's beginning is a DICOM's."""
    return data[DICOM_PREAMBLE : DICOM_PREAMBLE + 4] == b"DICM"


def _read(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise CxrdistError(
                f"{file}: has {size >> 20} MiB, expected one X-ray of at most {MOST_BYTES >> 20}"
            )
        return file.read_bytes()
    except OSError as error:
        raise CxrdistError(f"{file}: cannot be read ({error.strerror or error})") from error


def _read_picture(data: bytes, least_px: int) -> Grey:
    """Read a PNG or JPEG."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels are no X-ray's")
            # A JPEG can be decoded at a fraction of its size, straight to grey: several times
            # faster, and still at least as fine as is asked for.
            image.draft("L", (least_px, least_px))
            if image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            return Grey(_grey(ImageOps.exif_transpose(image)), width, height)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a grey image, uint8 [H, W].

    Compression level 1: 4 times as fast as Pillow's default 6 and 15 % larger, so that encoding
    costs a sixth of decoding.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode what `encode_png` wrote, uint8 [H, W]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.asarray(image)


def _grey(image: Image.Image) -> Image.Image:
    if image.mode == "L":
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        depth = next((d for d in (8, 10, 12, 14, 16) if values.max() < 2**d), 16)
        return Image.fromarray(
            np.clip(values * (255 / (2**depth - 1)), 0, 255).round().astype("u1")
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return image.convert("L")


def _square(image: Image.Image, size_px: int, fit: str) -> Image.Image:
    size = (size_px, size_px)
    if fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.BILINEAR, color=0)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if fit == "crop" else None
    return image.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
