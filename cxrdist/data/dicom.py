"""DICOM: grey pixels as they are meant to be seen, and of all tags only patient and view.

No tag's value stands in a message: a damaged file has a name where a number is expected.
"""

import io
import logging
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, apply_voi, get_decoder
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
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

from cxrdist.errors import CxrdistError

MOST_PIXELS = 50_000_000  # the largest detectors have 25 million
# Projections, and what secondary captures and converters write.
MODALITIES = ("CR", "DX", "RG", "OT", "SC", "")
# Functions of the imagecodecs library: maintained, permissive decoders that take the size which the
# caller expects. GDCM's ends the whole process on some input.
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
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings would print tags


@dataclass(frozen=True)
class Dicom:
    """What is taken from a DICOM.

    Attributes:
        pixels: uint8 [H, W], bright where the body absorbs.
        patient: PatientID, or empty.
        view: ViewPosition, or empty.
    """

    pixels: NDArray[np.uint8]
    patient: str
    view: str


class _RefusedError(ValueError):
    """Why a DICOM cannot be used, without a value of its tags."""


def read_dicom(data: bytes, file: Path) -> Dicom:
    """Read a radiograph as it is meant to be seen (DICOM PS3.4, section N.2).

    Stored values go through the modality LUT or rescale, then the first VOI LUT or window. Without
    these the full range of the stored bits is kept, since a stretch to the values of an image would
    make its brightness depend on a collimator or marker. MONOCHROME1 is inverted, padding is black.

    Args:
        data: the file's content.
        file: its name, for messages.

    Raises:
        CxrdistError: it is damaged, no radiograph, or its decoder is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would print tags
            return _read(data)
    except _RefusedError as refused:
        raise CxrdistError(f"{file}: no usable DICOM ({refused})") from None
    except Exception as error:
        # pydicom and its decoders raise errors of any kind on damaged files, with tags in them.
        raise CxrdistError(
            f"{file}: no readable DICOM ({type(error).__name__}); it is damaged, export it again"
        ) from None


def _read(data: bytes) -> Dicom:
    if DeflatedExplicitVRLittleEndian.encode() in data:
        # pydicom would inflate it without a bound.
        raise _RefusedError("it is deflated; store it uncompressed, such as by dcmconv +te")
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    _refuse_no_radiograph(dataset)
    table = _grey_levels(dataset)
    view = str(dataset.get("ViewPosition") or "")
    return Dicom(
        pixels=table[_stored_values(dataset)],
        patient=str(dataset.get("PatientID") or "").strip(),
        view=view if re.fullmatch(r"[A-Z]{1,16}", view) else "",
    )


def _refuse_no_radiograph(dataset: Dataset) -> None:
    if "PixelData" not in dataset:
        raise _RefusedError("it has no pixel data")
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise _RefusedError("it has several frames; expected one radiograph")
    if dataset.get("SamplesPerPixel", 1) != 1 or dataset.get("PhotometricInterpretation") not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        raise _RefusedError("it is in colour; expected MONOCHROME1 or MONOCHROME2")
    if str(dataset.get("Modality") or "") not in MODALITIES:
        raise _RefusedError("its modality is no radiography; expected CR, DX or RG")
    if not 1 <= int(dataset.Rows) * int(dataset.Columns) <= MOST_PIXELS:
        raise _RefusedError(f"its rows and columns are not 1 to {MOST_PIXELS} pixels")
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if allocated not in (8, 16) or not 1 < stored <= allocated:
        raise _RefusedError("its bits are not 2 to 16, in 8 or 16")
    if int(dataset.get("HighBit", stored - 1)) != stored - 1:
        raise _RefusedError("its values are not in the low bits")


def _stored_values(dataset: Dataset) -> NDArray[np.uint16]:
    """The stored bits of each pixel as places in a table, uint16 [H, W]."""
    syntax = dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax in DECODERS:
        values = _decompress(dataset, DECODERS[syntax])
    elif syntax.is_private or syntax.is_compressed:
        raise _RefusedError(f"its transfer syntax is not one of {len(DECODERS)} known ones")
    else:
        values, _ = get_decoder(syntax).as_array(dataset, raw=True)
    mask = (1 << int(dataset.BitsStored)) - 1
    places: NDArray[np.uint16] = values.reshape(dataset.Rows, dataset.Columns).astype(np.uint16)
    return places & np.uint16(mask)


def _decompress(dataset: Dataset, decoder: str) -> NDArray[np.integer]:
    """Decode into an array of the right size, so that a forged header takes no memory."""
    try:
        import imagecodecs
    except ImportError:
        raise _RefusedError(
            "it is compressed and the decoder is missing; pip install 'cxrdist[dicom]'"
        ) from None
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    shape = int(dataset.Rows), int(dataset.Columns)
    size = int(dataset.BitsAllocated) // 8
    if decoder == "dicomrle_decode":
        data = bytearray(shape[0] * shape[1] * size)
        dtype = np.dtype(f"<u{size}")
        return np.frombuffer(imagecodecs.dicomrle_decode(frame, dtype, out=data), dtype)
    signed = decoder == "jpeg2k_decode" and dataset.PixelRepresentation == 1
    values = np.zeros(shape, f"{'i' if signed else 'u'}{size}")
    getattr(imagecodecs, decoder)(frame, out=values)
    return values


def _grey_levels(dataset: Dataset) -> NDArray[np.uint8]:
    """The grey level of each value that can be stored, uint8 [2 ** bits stored]."""
    count = 1 << int(dataset.BitsStored)
    stored = np.arange(count)
    if dataset.PixelRepresentation == 1:
        stored = np.where(stored < count // 2, stored, stored - count)
    values = apply_modality_lut(stored, dataset).astype(np.float64)
    levels = _as_seen(values, dataset)
    if not np.isfinite(levels).all():
        raise _RefusedError("its rescale or window is no number")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        levels = 1 - levels
    if "PixelPaddingValue" in dataset:
        value = int(dataset.PixelPaddingValue)
        ends = sorted((value, int(dataset.get("PixelPaddingRangeLimit", value))))
        levels[(stored >= ends[0]) & (stored <= ends[1])] = 0
    return np.rint(255 * levels.clip(0, 1)).astype(np.uint8)


def _as_seen(values: NDArray[np.float64], dataset: Dataset) -> NDArray[np.float64]:
    """The first VOI LUT or window, or the full range of the values; float64 in 0..1."""
    if dataset.get("VOILUTSequence"):
        table = dataset.VOILUTSequence[0]
        bits = int(table.LUTDescriptor[2])
        return apply_voi(np.rint(values).astype(np.int64), dataset) / (2.0**bits - 1)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        center, width = (_first(dataset[name].value) for name in ("WindowCenter", "WindowWidth"))
        return _window(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))
    low, high = float(values.min()), float(values.max())
    return (values - low) / (high - low)


def _window(
    values: NDArray[np.float64], center: float, width: float, function: str
) -> NDArray[np.float64]:
    """DICOM PS3.3, section C.11.2.1.2 and C.11.2.1.3, with outputs 0..1."""
    if function == "LINEAR" and width >= 1:
        # A window of width 1 is a step; the formula would divide 0 by 0.
        return (values - (center - 0.5)) / max(width - 1, 1e-9) + 0.5
    if function == "LINEAR_EXACT" and width > 0:
        return (values - center) / width + 0.5
    if function == "SIGMOID" and width > 0:
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    raise _RefusedError("its window has no known function or no width")


def _first(value: Any) -> float:
    """The first of several windows."""
    number = float(value[0] if isinstance(value, MultiValue) else value)
    if not math.isfinite(number):
        raise _RefusedError("its window is no number")
    return number
