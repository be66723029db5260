"""DICOM: read grey pixels for display, and of all tags only patient, view, sex and age.

Messages never contain the value of a tag: in a damaged file it may be a person's name.

Refused: several frames, colour (also grey stored as RGB or YBR), modalities other than projections,
1-bit, 32-bit and float pixels, transfer syntaxes that are neither in `NATIVE` nor in `DECODERS`
(deflated, video, progressive JPEG, JPEG XL ...), and palettes. Ignored: overlays and annotations
(bits of overlays in pixel cells are removed), shutters, presentation states, a Presentation LUT
Sequence, all but the first VOI LUT and window, SmallestImagePixelValue, LargestImagePixelValue,
PatientOrientation and SeriesDescription. For view codes the English meaning is read, not the code.
"""

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments
from pydicom.filereader import read_dataset, read_preamble
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrdist.data.codestream import is_cut_off, precision
from cxrdist.data.depth import white_of
from cxrdist.data.elements import RefusedError, items, numbers, octets, text, whole
from cxrdist.data.patients import sex_of, stated_age
from cxrdist.data.pictures import MOST_PIXELS, Picture
from cxrdist.data.presentation import Cells, present
from cxrdist.data.views import UNKNOWN, view_of
from cxrdist.errors import CxrdistError

# Projections, and what secondary captures and converters write.
MODALITIES = ("CR", "DX", "RG", "OT", "SC", "")
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
# Functions of the imagecodecs library: maintained decoders with permissive licences that decode
# into an array of the expected size. GDCM's ends the whole process on some input.
DECODERS = {
    RLELossless: "dicomrle_decode",
    JPEGBaseline8Bit: "jpeg_decode",
    JPEGExtended12Bit: "jpeg_decode",
    JPEGLossless: "jpeg_decode",
    JPEGLosslessSV1: "jpeg_decode",
    JPEGLSLossless: "jpegls_decode",
    JPEGLSNearLossless: "jpegls_decode",
    JPEG2000Lossless: "jpeg2k_decode",
    JPEG2000: "jpeg2k_decode",
}
# Tags with the distance of rows and columns, in the patient's plane before the detector's
# (PS3.3, 10.7.1.3 and C.8.11.4).
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
MOST_VIEW_CHARACTERS = 64  # of a long string (PS3.5, section 6.2, LO)
SQUARE = 0.01  # sides of a pixel that differ less count as equal: spacings are rounded
MOST_STRETCH = 10  # ratio of a pixel's sides; files with more are damaged
SEVERAL_FRAMES = "it has several frames; expected one radiograph"
CUT_OFF = "its pixel data is cut off; it is damaged, export it again"
# pydicom would print malformed values in warnings. `elements` judges those in use.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings would print tags


def read_dicom(data: bytes, file: Path, depth: int | None = None) -> Picture:
    """Read a radiograph from a file's content as it would be displayed (`presentation`).

    ``depth`` is the bit depth of the source, for a file that does not declare one; None stands for
    the bits that the file uses.

    Raises:
        CxrdistError: it is damaged, not a radiograph, or its decoder is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would print tags
            return _read(data, depth)
    except RefusedError as refused:
        raise CxrdistError(f"{file}: the DICOM cannot be used ({refused})") from None
    except Exception as error:
        # pydicom and its decoders raise errors of any kind on damaged files, with values of tags.
        raise CxrdistError(
            f"{file}: is not a readable DICOM ({type(error).__name__}); it is damaged, export it "
            "again"
        ) from None


def _read(data: bytes, depth: int | None) -> Picture:
    if _is_deflated(data):
        # pydicom would inflate it without a limit, so that a small file could fill the memory.
        raise RefusedError("it is deflated; store it uncompressed, for example with dcmconv +te")
    # Without force it refuses files without a preamble (PS3.10, section 7.1), such as old ones.
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    _refuse_no_radiograph(dataset)
    width_px, height_px = _shown_size(dataset)
    pixels, used = present(dataset, _cells(dataset), depth)
    shown = Image.fromarray(pixels).resize((width_px, height_px), Image.Resampling.BILINEAR)
    return Picture(
        image=shown,
        width_px=width_px,
        height_px=height_px,
        patient=str(dataset.get("PatientID") or "").strip(),
        view=_view(dataset),
        used_depth=used,
        sex=sex_of(text(dataset, "PatientSex")),
        age=stated_age(text(dataset, "PatientAge")),
    )


def _is_deflated(data: bytes) -> bool:
    """Return whether pydicom would inflate a file, by its file meta group alone."""
    if DeflatedExplicitVRLittleEndian.encode() not in data:
        return False
    stream = io.BytesIO(data)
    read_preamble(stream, force=True)
    # The group is little endian with explicit VR in every file (PS3.10, section 7.1).
    meta = read_dataset(stream, False, True, stop_when=lambda tag, *_: tag.group != 2)
    syntax = meta.get("TransferSyntaxUID")
    return bool(syntax == DeflatedExplicitVRLittleEndian)


def _view(dataset: Dataset) -> str | None:
    """Return the view that ViewPosition names, else the meaning of the first view code."""
    codes = [text(item, "CodeMeaning") for item in items(dataset, "ViewCodeSequence")[:1]]
    texts = (text(dataset, "ViewPosition"), *codes)
    named = [view_of(each[:MOST_VIEW_CHARACTERS]) for each in texts]
    return next(filter(None, named), None if None in named else UNKNOWN)


def _refuse_no_radiograph(dataset: Dataset) -> None:
    if "PixelData" not in dataset:
        raise RefusedError("its pixel data is missing, cut off or not of integers")
    if whole(dataset, "NumberOfFrames", 1) > 1:
        raise RefusedError(SEVERAL_FRAMES)
    photometric = text(dataset, "PhotometricInterpretation")
    if not photometric:
        raise RefusedError("its PhotometricInterpretation is missing")
    is_grey = photometric in ("MONOCHROME1", "MONOCHROME2")
    if whole(dataset, "SamplesPerPixel", 1) != 1 or not is_grey:
        raise RefusedError("it is in colour; expected MONOCHROME1 or MONOCHROME2")
    if text(dataset, "Modality") not in MODALITIES:
        raise RefusedError("its modality is not radiography; expected CR, DX or RG")
    if not 1 <= whole(dataset, "Rows") * whole(dataset, "Columns") <= MOST_PIXELS:
        raise RefusedError(f"its rows and columns are not 1 to {MOST_PIXELS} pixels")
    allocated, stored = whole(dataset, "BitsAllocated"), whole(dataset, "BitsStored")
    if allocated not in (8, 16) or not 1 < stored <= allocated:
        raise RefusedError("its bits are unusual; expected 2 to 16 stored in 8 or 16 allocated")
    if not stored <= whole(dataset, "HighBit", stored - 1) + 1 <= allocated:
        raise RefusedError("its HighBit is not within the allocated bits")
    if whole(dataset, "PixelRepresentation") not in (0, 1):
        raise RefusedError("its PixelRepresentation is not 0 or 1")


def _shown_size(dataset: Dataset) -> tuple[int, int]:
    """Return width and height with square pixels; the side with the larger pixels is stretched.

    PixelAspectRatio is used only without distances of rows and columns (PS3.3, C.7.6.3.1.7).
    """
    width, height = whole(dataset, "Columns"), whole(dataset, "Rows")
    ratio = 1.0
    for keyword in (*SPACINGS, "PixelAspectRatio"):
        sides = numbers(dataset, keyword)
        if len(sides) == 2 and all(0 < side < np.inf for side in sides):
            ratio = sides[0] / sides[1]  # of a pixel's height to its width
            break
    if abs(ratio - 1) <= SQUARE:
        return width, height
    if not 1 / MOST_STRETCH <= ratio <= MOST_STRETCH:
        raise RefusedError(f"one side of its pixels is more than {MOST_STRETCH} times the other")
    size_px = (width, round(height * ratio)) if ratio > 1 else (round(width / ratio), height)
    if size_px[0] * size_px[1] > MOST_PIXELS:
        raise RefusedError(f"with square pixels it has more than {MOST_PIXELS} of them")
    return size_px


def _cells(dataset: Dataset) -> Cells:
    """Return the pixel cells as they are stored or decompressed."""
    # A file without a header has the default transfer syntax (PS3.5, section 10.1).
    syntax = dataset.file_meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian
    bits = whole(dataset, "BitsStored")
    shift = whole(dataset, "HighBit", bits - 1) + 1 - bits
    if syntax in DECODERS:
        words, precise = _decompress(dataset, DECODERS[syntax])
        # Decoders return samples in the low bits. A stream of more bits holds whole cells.
        if precise <= bits:
            bits, shift = precise, 0
    elif syntax not in NATIVE:
        raise RefusedError(
            "its transfer syntax is not supported; store it uncompressed, for example with "
            "dcmdjpeg if it is a JPEG"
        )
    else:
        words = _native(dataset)
    return Cells(words, bits, shift, whole(dataset, "PixelRepresentation") == 1)


def _native(dataset: Dataset) -> NDArray[Any]:
    """Return uncompressed pixel cells (PS3.5, annex A.1 to A.3)."""
    shape = whole(dataset, "Rows"), whole(dataset, "Columns")
    size = whole(dataset, "BitsAllocated") // 8
    data, order = octets(dataset, "PixelData")
    if len(data) < shape[0] * shape[1] * size:
        raise RefusedError(CUT_OFF)
    # NumberOfFrames may be missing. A little more is padding.
    if len(data) >= 2 * shape[0] * shape[1] * size:
        raise RefusedError(SEVERAL_FRAMES)
    # OW counts words of 16 bits: in big endian the two 8-bit cells of each have swapped places.
    if size == 1 and order == ">" and dataset.get_item("PixelData").VR == "OW":
        data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
    words = np.frombuffer(data, f"{order}u{size}", shape[0] * shape[1])
    return words.reshape(shape).astype(f"u{size}")


def _frame(data: bytes) -> bytes:
    """Return the stream of encapsulated pixel data: its fragments without their offset table."""
    _, *fragments = generate_fragments(data)
    # NumberOfFrames may be missing, and the table empty (PS3.5, A.4), but each frame has a head.
    if sum(fragment[:4] == fragments[0][:4] for fragment in fragments) > 1:
        raise RefusedError(SEVERAL_FRAMES)
    return b"".join(fragments)


def _decompress(dataset: Dataset, decoder: str) -> tuple[NDArray[Any], int]:
    """Return uint8 or uint16 [H, W], and the bits per sample of the stream.

    An array of the expected size is decoded into, so that a forged header cannot fill the memory.
    """
    try:
        import imagecodecs
    except ImportError:
        raise RefusedError(
            "it is compressed and the decoder is not installed; pip install 'cxrdist[dicom]'"
        ) from None
    frame = _frame(dataset.PixelData)
    if is_cut_off(frame):
        raise RefusedError(CUT_OFF)
    shape = whole(dataset, "Rows"), whole(dataset, "Columns")
    size = whole(dataset, "BitsAllocated") // 8
    if decoder == "dicomrle_decode":
        data = bytearray(shape[0] * shape[1] * size)
        dtype = np.dtype(f"<u{size}")
        samples = np.frombuffer(imagecodecs.dicomrle_decode(frame, dtype, out=data), dtype)
        return samples.reshape(shape), 8 * size
    # Of the stream, since tags may say more: 14 of 16 bits (pydicom#2012), 8 in 16 allocated.
    bits, signed = precision(frame) or (8 * size, False)
    width = 1 if bits <= 8 else 2
    values = np.zeros(shape, f"{'i' if signed else 'u'}{width}")
    getattr(imagecodecs, decoder)(frame, out=values)
    # Without the sign, which PixelRepresentation decides: streams may differ (pydicom#1149).
    return values.view(f"u{width}") & np.array(white_of(bits), f"u{width}"), bits
