"""Pictures: PNG, JPEG, TIFF and other formats of Pillow -> 8-bit grey.

Refused: several pages or frames, float, signed and 32-bit values, 12-bit JPEG, JPEG 2000 of fewer
than 8 bits or with deeper colours, a transparent one of 16-bit colours, TIFF planes without
compression that are not plain bytes, and more pixels than an X-ray has. Ignored: colour profiles,
gamma, resolution, a PNG's significant bits (sBIT), a TIFF's smallest and largest values, and the
lower 8 bits of 16-bit colours.
"""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from cxrdist.data.codestream import is_reordered, precision
from cxrdist.data.depth import HOT_PIXELS, count_words, grey_of, used_depth, white_of
from cxrdist.data.kinds import FORMATS, HEAD_BYTES, kind_of
from cxrdist.errors import CxrdistError

MOST_PIXELS = 50_000_000  # of an image; the largest detectors have 25 million
MOST_BYTES = 256 << 20  # of a file; the largest X-ray detectors give 40 MB uncompressed
ORIENTATION = 0x0112  # EXIF tag
TURNS = {  # by its value
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 3 and 4
PLANES, SEPARATE, BIT_ORDER = 284, 2, 266  # TIFF 6.0, section 8
SAMPLE_FORMAT, SIGNED = 339, 2  # TIFF 6.0, section 19
# What Pillow and the libraries below it raise on damaged files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, IndexError, struct.error, zlib.error),
    *(TypeError, OverflowError),  # by values of another type or size in the header of a TIFF
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
NEARLY_BLACK = 64  # 16-bit colours whose upper 8 bits stay below it use at most 14 bits


@dataclass(frozen=True)
class Picture:
    """An X-ray in grey, with the metadata of its file."""

    image: Image.Image
    """Mode L; of any size, or a square once it is decoded for a model or shards."""
    width_px: int
    """Of the original as it is shown, like `height_px`."""
    height_px: int
    reduced: int = 1
    """Each side of a pixel of the image in px of the original; the last pixels may stand for less,
    as a JPEG of 513 px that is decoded at an eighth has 65."""
    used_depth: int | None = None
    """Bits that the pixels use if the file does not declare its depth, else None."""
    patient: str = ""
    """The DICOM's PatientID, or empty."""
    view: str | None = ""
    """One of `VIEWS` from the DICOM's tags, empty without a tag, None if the tag is unknown."""
    sex: str = ""
    """M or F from the DICOM, else empty."""
    age: float | None = None
    """Age of the patient in years; None if unknown, NaN if the DICOM's is not a valid age."""
    covered: NDArray[np.uint8] | None = None
    """uint8 [H, W], the same with the burned-in text of its boxes covered; None without."""
    mask: NDArray[np.uint8] | None = None
    """uint8 [H, W], 255 where the image is lung, else 0; None without."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Grey levels, uint8 [H, W], read-only."""
        return np.asarray(self.image)

    def scale(self) -> tuple[float, float]:
        """Return by what x and y of the original become those of the image."""
        return 1 / self.reduced, 1 / self.reduced


def read_file(file: Path) -> bytes:
    """Read the file of an image.

    Raises:
        CxrdistError: it cannot be read, or is larger than an X-ray.
    """
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise CxrdistError(
                f"{file}: has {size >> 20} MiB, expected one X-ray of at most {MOST_BYTES >> 20}"
            )
        return file.read_bytes()
    except OSError as error:
        raise CxrdistError(f"{file}: cannot be read ({error.strerror or error})") from error


def read_picture(
    data: bytes, kind: str, file: Path, least_px: int, depth: int | None = None
) -> Picture:
    """Read a picture in grey: colour as luma (ITU-R 601), transparency black, EXIF rotation done.

    A JPEG may be decoded at a smaller, faster scale, but not below ``least_px``. ``depth`` is the
    bit depth of the source, for a file of more than 8 bits that does not declare one
    (`cxrdist.data.depth`); None stands for the bits that it uses.

    Raises:
        CxrdistError: it is damaged, or a variant that is not supported.
    """
    try:
        return _read(data, kind, least_px, depth)
    except (UnidentifiedImageError, TypeError, OverflowError, struct.error):  # before UNREADABLE
        declared = precision(data) if kind == "JPEG" else None
        reason = "its header is damaged, or of a variant that is not supported"
        if declared and declared[0] != 8:
            reason = f"it has {declared[0]} bits, expected 8; store it as 16-bit PNG or DICOM"
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.startswith("decoder error"):  # and a number
            reason = "its pixels are damaged, cut off or of a variant that is not supported"
    raise CxrdistError(f"{file}: is not a readable {kind} ({reason})")


def _read(data: bytes, kind: str, least_px: int, depth: int | None) -> Picture:
    if kind == "WEBP":
        _refuse_size(*_webp_size(data))  # Pillow allocates the pixels as soon as it opens a WebP
    with _no_warnings(), Image.open(io.BytesIO(data), formats=(kind,)) as image:
        _refuse_size(*image.size)
        if _has_several(image, data):
            raise ValueError("it has several pages or frames; store each in its own file")
        # Before `draft`, which changes the size of the image.
        size_px = _shown_size(image)
        # A JPEG can be decoded at a fraction of its size, directly to grey: several times
        # faster, and still not smaller than least_px. Not one to be turned, which would begin with
        # its incomplete pixels.
        drafted = image.draft("L", (least_px, least_px)) if _turn(image) is None else None
        reduced = round(size_px[0] / drafted[1][2]) if drafted else 1
        _refuse_misread(image, data)
        if image.mode[0] in "IF":  # I, I;16 and F, of more than 8 bits
            grey, used = _grey_of_deep(image, data, depth)
            return Picture(grey, *size_px, used_depth=used)
        if kind == "PNG" and image.mode == "L" and "transparency" in image.info:
            # Pillow scales grey levels of 2 and 4 bits to 8, but not the transparent one.
            image.info["transparency"] *= 255 // white_of(data[24])
        has_deep_colours = _has_deep_colours(image, data)  # before Pillow forgets the header
        if has_deep_colours and "transparency" in image.info:
            # Pillow compares its 16 bits with the upper 8 bits of the pixels.
            raise ValueError("one of its 16-bit colours is transparent; store it as 16-bit grey")
        grey = _grey(_upright(image))
        # Not by the brightest pixel, which may be a defect of the detector.
        bright = sum(grey.histogram()[NEARLY_BLACK:])
        if has_deep_colours and bright <= HOT_PIXELS * grey.width * grey.height:
            raise ValueError("its 16-bit colours use few bits; store it as 16-bit grey")
        return Picture(grey, *size_px, reduced)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Make an error of Pillow's warning of too many pixels; ignore others, which name no file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow itself only warns up to twice its limit.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _has_several(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether a file has several pages or frames; Pillow ignores those of PGM and PPM."""
    if image.format != "PPM":
        # An MPO is a JPEG with further pictures behind it, of which the first one counts.
        return getattr(image, "is_animated", False) and image.format != "MPO"
    bits = 1 if image.mode == "1" else 8 if _white_of_ppm(image) <= 0xFF else 16
    row_bytes = math.ceil(image.width * len(image.getbands()) * bits / 8)
    end = image.tile[0].offset + image.height * row_bytes
    return data[1:2] in b"456" and kind_of(data[end : end + HEAD_BYTES]) == "PPM"


def _refuse_misread(image: ImageFile.ImageFile, data: bytes) -> None:
    """Reject images whose samples Pillow reads wrongly.

    In JPEG 2000 it adds 1/2 to colours of more than 8 bits, so that white overflows to black,
    shifts fewer bits, so that white stays grey, ignores the order of colours, and makes signed
    samples unsigned; signed bytes of a TIFF it reads as unsigned. The separate planes of a TIFF
    without compression it reads as bytes whose 0 is black and whose bits are in the usual order.
    """
    tags, is_deep = _tiff_tags(image), image.mode[0] in "IF"
    bits, is_signed = 8, not is_deep and SIGNED in tags.get(SAMPLE_FORMAT, ())
    if image.format == "JPEG2000":
        bits, is_signed = precision(data) or (8, False)
        if is_reordered(data):
            raise ValueError("its colours are in another order; store it as PNG")
    if is_signed:
        raise ValueError("its values are signed; expected 0 and more")
    if bits != 8 and not is_deep:
        raise ValueError(f"it has {bits} bits, expected 8, or more in grey; store it as PNG")
    if tags.get(PLANES) == SEPARATE and image.tile[0].codec_name == "raw":
        is_plain = max(tags.get(BITS_PER_SAMPLE, (1,))) == 8 and tags.get(BIT_ORDER, 1) == 1
        if not is_plain or _is_inverted(image):
            raise ValueError(
                "its planes are of a variant that is not supported without compression; store it "
                "with tiffcp -c lzw"
            )


def picture_size(file: Path) -> tuple[int, int] | None:
    """Return width and height of a picture as it is shown, by its header; None if unreadable."""
    try:
        with file.open("rb") as content, _no_warnings():
            head = content.read(HEAD_BYTES)
            kind = kind_of(head)
            if kind not in FORMATS:
                return None
            if kind == "WEBP":
                _refuse_size(*_webp_size(head))
            with Image.open(content, formats=(kind,)) as image:
                return _shown_size(image)
    except UNREADABLE:
        return None


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of the image as it is shown."""
    width, height = image.size
    is_on_its_side = _turn(image) in [TURNS[value] for value in (5, 6, 7, 8)]
    return (height, width) if is_on_its_side else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    """Return the image as it is shown, in memory.

    Pillow's own function also writes the EXIF data anew, and fails where these are damaged.
    """
    turn = _turn(image)
    image.load()  # before its file is closed
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that EXIF data ask for; none of a TIFF, which Pillow turns itself."""
    return None if image.format == "TIFF" else TURNS.get(image.getexif().get(ORIENTATION, 1))


def _refuse_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels, expected at most {MOST_PIXELS}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP (RFC 9649, sections 2.5 to 2.7); 0 if it is damaged."""
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    sides = struct.unpack("<HH", head[6:10])
    return sides[0] & 0x3FFF, sides[1] & 0x3FFF


def _grey(image: Image.Image) -> Image.Image:
    """Convert an 8-bit image to mode L, with transparency on black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image)
    return image if image.mode == "L" else image.convert("L")  # convert copies


def _has_deep_colours(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether Pillow dropped the lower 8 bits of 16-bit colours."""
    if image.format == "TIFF":
        return max(_tiff_tags(image).get(BITS_PER_SAMPLE, (1,))) == 16
    if image.format == "PPM":
        return _white_of_ppm(image) == 0xFFFF
    return image.format == "PNG" and data[24] == 16  # its depth in IHDR


def _grey_of_deep(
    image: ImageFile.ImageFile, data: bytes, depth: int | None
) -> tuple[Image.Image, int | None]:
    """Scale an image of more than 8 bits to mode L, upright; return it and its used depth."""
    white, used = _declared_white(image, data), None  # before Pillow forgets the header
    values = _values(_upright(image))
    if white is None:
        used = used_depth(np.arange(1 << 16), count_words(values))
        white = white_of(depth or used)
    levels = grey_of(white)
    if _is_inverted(image):
        levels = 255 - levels
    if isinstance(key := image.info.get("transparency"), int):
        levels[key] = 0
    return Image.fromarray(levels[values]), used


def _declared_white(image: ImageFile.ImageFile, data: bytes) -> int | None:
    """Return the value that the file declares as white; None if it only declares 16 bits."""
    if image.format == "TIFF":
        bits = max(_tiff_tags(image).get(BITS_PER_SAMPLE, (1,)))
        return white_of(bits) if bits < 16 else None
    if image.format == "JPEG2000":  # Pillow shifts the samples to the upper bits of 16
        bits = (precision(data) or (16, False))[0]
        return white_of(bits) << (16 - bits) if bits < 16 else None
    if image.format == "PPM":  # Pillow scales images with a smaller largest value to 65535
        return 0xFFFF if _white_of_ppm(image) < 0xFFFF else None
    return None


def _white_of_ppm(image: ImageFile.ImageFile) -> int:
    """Return the largest value that a PGM or PPM declares; 255 for one without (PBM)."""
    decoder = image.tile[0].args
    if isinstance(decoder, tuple):
        return int(decoder[1])
    return 0xFFFF if decoder == "I;16B" else 0xFF


def _values(image: Image.Image) -> NDArray[np.uint16]:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its values are signed, float or of 32 bits; expected 0 to 65535")
    return values.astype(np.uint16)


def _is_inverted(image: Image.Image) -> bool:
    """Return whether 0 is white; Pillow inverts only 8-bit TIFFs."""
    return bool(_tiff_tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF; none of other formats."""
    return image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
