"""DICOM files for the tests, made of grey images by pydicom and imagecodecs."""

from pathlib import Path

import imagecodecs
import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

NAME = "Muster^Erika"
UNCOMPRESSED = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
}
COMPRESSED = {
    "rle": RLELossless,
    "jpeg lossless": JPEGLosslessSV1,
    "jpeg-ls": JPEGLSLossless,
    "jpeg 2000": JPEG2000Lossless,
    "jpeg": JPEGBaseline8Bit,
    "jpeg 12 bit": JPEGExtended12Bit,
}
SYNTAXES = [*UNCOMPRESSED, *COMPRESSED]


def write_dicom(
    file: Path, values: np.ndarray, bits: int = 8, syntax: str = "explicit", **tags: object
) -> Path:
    """Write stored values [H, W] as a radiograph of a named patient.

    Args:
        file: to write.
        values: 0 .. 2 ** bits - 1, or signed.
        bits: that are stored.
        syntax: one of `SYNTAXES`.
        tags: further tags; None takes one away, an empty list or string stays as an empty one.
    """
    uid = generate_uid()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = UNCOMPRESSED.get(syntax, ExplicitVRLittleEndian)
    dataset = FileDataset(
        *(file, {}, b"\0" * 128, meta),
        is_implicit_VR=syntax == "implicit",
        is_little_endian=syntax != "big endian",
    )
    dataset.SOPClassUID, dataset.SOPInstanceUID = ComputedRadiographyImageStorage, uid
    dataset.PatientName, dataset.PatientID = NAME, "ID-4711"
    dataset.PatientBirthDate = "19640812"
    dataset.Modality, dataset.ViewPosition = "CR", "PA"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = values.shape
    dataset.BitsAllocated = 8 if bits <= 8 else 16
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(values.min() < 0)
    _set_tags(dataset, tags)
    order = ">" if syntax == "big endian" else "<"
    kind = "i" if values.min() < 0 else "u"
    values = values.astype(f"{order}{kind}{dataset.BitsAllocated // 8}")
    data = values.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
    if syntax in COMPRESSED:
        _compress(dataset, values, bits, syntax)
    dataset.save_as(file)
    return file


def _set_tags(dataset: Dataset, tags: dict[str, object]) -> None:
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        elif name[0].isupper() and dictionary_VR(name) in ("DS", "IS"):
            _set_text(dataset, name, value)
        else:
            setattr(dataset, name, value)


def _set_text(dataset: Dataset, name: str, value: object) -> None:
    """Set a number as it is written, since pydicom takes none that is written wrongly."""
    parts = value if isinstance(value, list) else [value]
    data = "\\".join(map(str, parts)).encode()
    data += b" " * (len(data) % 2)
    tag = Tag(name)
    dataset[tag] = RawDataElement(tag, dictionary_VR(name), len(data), data, 0, False, True)


def _compress(dataset: FileDataset, values: np.ndarray, bits: int, syntax: str) -> None:
    if syntax == "rle":
        dataset.compress(RLELossless)
        return
    if syntax == "jpeg-ls":
        data = imagecodecs.jpegls_encode(values)
    elif syntax == "jpeg 2000":
        data = imagecodecs.jpeg2k_encode(
            values, codecformat="j2k", reversible=True, bitspersample=bits
        )
    else:
        lossless = syntax == "jpeg lossless"
        level = None if lossless else 98
        data = imagecodecs.jpeg_encode(values, level, lossless=lossless, bitspersample=bits)
    dataset.PixelData = encapsulate([data])
    dataset["PixelData"].is_undefined_length = True
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = COMPRESSED[syntax]
