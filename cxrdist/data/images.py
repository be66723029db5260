"""Images of the wild -> uint8 grey squares -> PNG."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cxrdist.errors import CxrdistError

FORMATS = ("PNG", "JPEG")


def read_square(file: Path, size_px: int, fit: str) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG to a grey square, uint8 [size_px, size_px].

    Colour becomes luma (ITU-R 601), transparency black, an EXIF turn is applied. 16-bit values are
    scaled by the bit depth that they use (the smallest of 8, 10, 12, 14, 16 that holds the
    maximum), since 12-bit detectors are common. The filter is anti-aliased.

    Args:
        file: the image.
        size_px: side of the square.
        fit: ``crop`` the centre, ``pad`` with black, or ``stretch``.

    Raises:
        CxrdistError: the file is no readable PNG or JPEG.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                # A JPEG can be decoded at a fraction of its size, straight to grey: several times
                # faster, and still at least twice as fine as the square.
                image.draft("L", (2 * size_px, 2 * size_px))
                grey = _grey(ImageOps.exif_transpose(image))
                return np.asarray(_square(grey, size_px, fit))
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
        raise CxrdistError(f"{file}: no readable PNG or JPEG ({reason})") from error


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
