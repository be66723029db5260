"""Grey levels of generated DICOM files against the arithmetic of the standard."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicoms import write_dicom
from pydicom.dataset import Dataset

from cxrdist.data.dicom import read_dicom
from cxrdist.data.images import decode, read_grey
from cxrdist.errors import CxrdistError

pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
RAMP = np.arange(4096).reshape(64, 64)  # all values of 12 bits
SIGNED = RAMP - 2048
DEEP = np.arange(65536).reshape(256, 256)
CURVE = np.rint(4095 * (np.arange(4096) / 4095) ** 2).astype(int)


def shown(file: Path, depth: int | None = None) -> np.ndarray:
    return read_dicom(file.read_bytes(), file, depth).pixels


def lut(entries, first: int = 0, bits: int = 16, dtype: str = "<u2") -> list[Dataset]:
    item = Dataset()
    item.add_new(0x00283002, "US", [len(entries) & 0xFFFF, first & 0xFFFF, bits])
    item.add_new(0x00283006, "OW", np.asarray(entries).astype(dtype).tobytes())
    return [item]


def empty_lut() -> Dataset:
    item = Dataset()
    item.add_new(0x00283002, "US", None)
    return item


def without_entries() -> list[Dataset]:
    (item,) = lut(range(100))
    item.LUTData = None
    return [item]


def short_lut() -> list[Dataset]:
    (item,) = lut(range(100))
    item.LUTDescriptor = [300, 0, 16]
    return [item]


# Stored values, bits, tags, and the brightness that they mean, 0 to 1.
CASES = {
    "VOI LUT from the value 100 on, constant outside": (
        *(RAMP, 12, {"VOILUTSequence": lut(range(50, 1001), 100)}),
        (RAMP - 50).clip(50, 1000) / 1000,
    ),
    "VOI LUT of 65536 entries, which are told as 0": (
        *(DEEP, 16, {"VOILUTSequence": lut(np.arange(65536)[::-1])}),
        1 - DEEP / 65535,
    ),
    "VOI LUT of signed values, its first as an unsigned number": (
        *(SIGNED, 12, {"VOILUTSequence": lut(CURVE, -2048)}),
        CURVE.reshape(64, 64) / 4095,
    ),
    "VOI LUT whose input is signed by the rescale": (
        *(RAMP, 12, {"VOILUTSequence": lut(CURVE, -1024), "RescaleIntercept": -1024}),
        CURVE.reshape(64, 64) / 4095,
    ),
    "VOI LUT of unsigned values from 40000 on": (
        *(DEEP, 16, {"VOILUTSequence": lut(range(1001), 40000)}),
        (DEEP - 40000).clip(0, 1000) / 1000,
    ),
    "VOI LUT of 8 bits in words of MONOCHROME1": (
        *(RAMP, 12),
        {
            "VOILUTSequence": lut(np.arange(4096) >> 4, bits=8),
            "PhotometricInterpretation": "MONOCHROME1",
        },
        1 - (RAMP >> 4) / 255,
    ),
    "VOI LUT of bytes, an odd number of them": (
        *(RAMP, 12, {"VOILUTSequence": lut([*range(0, 255, 2), 255, 0], 0, 8, "u1")[:1]}),
        np.array([*range(0, 255, 2), 255, 0])[RAMP.clip(0, 129)[:]] / 255,
    ),
    "a first VOI LUT that is empty": (
        *(RAMP, 12, {"VOILUTSequence": [empty_lut(), *lut(CURVE)]}),
        CURVE.reshape(64, 64) / 4095,
    ),
    "a first VOI LUT without entries, and a window": (
        *(RAMP, 12, {"VOILUTSequence": without_entries(), "WindowCenter": 100, "WindowWidth": 51}),
        (RAMP - 99.5) / 50 + 0.5,
    ),
    "no VOI LUT in its sequence, and a window": (
        *(RAMP, 12, {"VOILUTSequence": [], "WindowCenter": 100, "WindowWidth": 51}),
        (RAMP - 99.5) / 50 + 0.5,
    ),
    "modality LUT and window": (
        *(RAMP, 12),
        {"ModalityLUTSequence": lut(CURVE, bits=12), "WindowCenter": 1000, "WindowWidth": 501},
        (CURVE.reshape(64, 64) - 999.5) / 500 + 0.5,
    ),
    "modality LUT of signed values and nothing else": (
        *(SIGNED, 12, {"ModalityLUTSequence": lut(CURVE, -2048)}),
        CURVE.reshape(64, 64) / 4095,
    ),
    "modality LUT and VOI LUT": (
        *(RAMP, 12),
        {"ModalityLUTSequence": lut(4095 - CURVE), "VOILUTSequence": lut(range(4096))},
        1 - CURVE.reshape(64, 64) / 4095,
    ),
    "a rescale downwards, an empty intercept": (
        *(RAMP, 12, {"RescaleSlope": -2, "RescaleIntercept": ""}),
        1 - RAMP / 4095,
    ),
    "rescale and window with commas": (
        *(RAMP, 12),
        {
            "RescaleSlope": "0,5",
            "RescaleIntercept": "-10,5",
            "WindowCenter": "500,5",
            "WindowWidth": "101,0",
        },
        (RAMP / 2 - 10.5 - 500) / 100 + 0.5,
    ),
    "a window of width 1 is a step above its centre less a half": (
        *(RAMP, 12, {"WindowCenter": 1000.5, "WindowWidth": 1}),
        RAMP > 1000,
    ),
    "LINEAR_EXACT": (
        *(RAMP, 12),
        {"WindowCenter": 1000, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
        (RAMP - 1000) / 0.5 + 0.5,
    ),
    "SIGMOID": (
        *(RAMP, 12, {"WindowCenter": 1000, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}),
        1 / (1 + np.exp(-4 * (RAMP - 1000) / 400)),
    ),
    "the third of three windows": (
        *(RAMP, 12, {"WindowCenter": ["x", 5, 1000], "WindowWidth": [10, 0.5, 201]}),
        (RAMP - 999.5) / 200 + 0.5,
    ),
    "an empty window": (*(RAMP, 12, {"WindowCenter": "", "WindowWidth": ""}), RAMP / 4095),
    "empty tags": (
        *(RAMP, 12),
        {"PresentationLUTShape": "", "PixelPaddingValue": [], "NumberOfFrames": ""}
        | {"VOILUTFunction": "", "PixelAspectRatio": "", "ImagerPixelSpacing": ""}
        | {"HighBit": [], "SamplesPerPixel": [], "Modality": ""},
        RAMP / 4095,
    ),
    "a number of frames of 0": (*(RAMP, 12, {"NumberOfFrames": 0}), RAMP / 4095),
    "INVERSE": (*(RAMP, 12, {"PresentationLUTShape": "INVERSE"}), 1 - RAMP / 4095),
    "IDENTITY": (*(RAMP, 12, {"PresentationLUTShape": "IDENTITY"}), RAMP / 4095),
    "INVERSE and MONOCHROME1, turned once": (
        *(RAMP, 12),
        {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"},
        1 - RAMP / 4095,
    ),
    "a range of padding": (
        *(RAMP, 12, {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}),
        RAMP / 4095 * (RAMP < 4000),
    ),
    "padding above the stored bits": (
        *(np.where(RAMP < 100, 65535, RAMP), 12, {"PixelPaddingValue": 65535}),
        RAMP / 4095 * (RAMP >= 100),
    ),
    "values above the stored bits": (
        *(np.where(RAMP < 100, RAMP + 5000, RAMP), 12, {}),
        np.where(RAMP < 100, 1, RAMP / 4095),
    ),
    "an overlay in the bits above": (
        *(RAMP | 1 << 13, 12, {"OverlayBitPosition": 13}),
        RAMP / 4095,
    ),
    "values in the high bits": (*(RAMP << 4, 12, {"HighBit": 15}), RAMP / 4095),
    "signed values in the high bits": (*(SIGNED << 4, 12, {"HighBit": 15}), RAMP / 4095),
    "signed values in the middle bits, their sign repeated above": (
        *(SIGNED << 2, 12, {"HighBit": 13}),
        RAMP / 4095,
    ),
    "signed values in the middle bits, nothing above": (
        *((SIGNED & 4095) << 2, 12, {"HighBit": 13, "PixelRepresentation": 1}),
        RAMP / 4095,
    ),
    "signed 16 bits of which 12 are used": (*(SIGNED, 16, {}), RAMP / 4095),
    "signed 16 bits that are not negative": (
        *(RAMP, 16, {"PixelRepresentation": 1}),
        RAMP / 4095,
    ),
    "16 bits of which 12 are used, turned": (
        *(RAMP, 16, {"PhotometricInterpretation": "MONOCHROME1"}),
        1 - RAMP / 4095,
    ),
    "16 bits of which 12 are used and padding 16": (
        *(np.where(RAMP < 100, 65535, RAMP), 16, {"PixelPaddingValue": 65535}),
        RAMP / 4095 * (RAMP >= 100),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_grey_levels_are_the_standards_arithmetic(tmp_path, name):
    """To one grey level."""
    values, bits, tags, brightness = CASES[name]
    tags = dict(tags)
    position = tags.pop("OverlayBitPosition", None)
    file = write_dicom(tmp_path / "x.dcm", values, bits, **tags)
    if position:
        dataset = pydicom.dcmread(file)
        dataset.add_new(0x60000102, "US", position)
        dataset.save_as(file)
    expected = np.rint(255 * np.clip(brightness, 0, 1))
    assert np.abs(shown(file) - expected).max() <= 1


@pytest.mark.parametrize("syntax", ["implicit", "big endian"])
def test_luts_and_padding_are_read_in_other_syntaxes(tmp_path, syntax):
    """Where a VR is not written, and where bytes have the other order."""
    order = ">" if syntax == "big endian" else "<"
    tags = {"VOILUTSequence": lut(CURVE, -2048, dtype=f"{order}u2"), "PixelPaddingValue": -2000}
    file = write_dicom(tmp_path / "x.dcm", SIGNED, 12, syntax, **tags)
    expected = np.rint(255 * CURVE.reshape(64, 64) / 4095)
    expected[SIGNED == -2000] = 0
    assert np.abs(shown(file) - expected).max() <= 1


@pytest.mark.parametrize("syntax", ["jpeg 2000", "jpeg-ls", "jpeg lossless"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_a_stream_tells_its_bits(tmp_path, syntax, bits):
    """Fewer than the 16 that the data set tells; JPEG-LS and lossless JPEG cannot be made of 10."""
    values = np.rint(RAMP / 4095 * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
    if syntax != "jpeg 2000" and bits != 8:
        pytest.skip("the encoder writes streams of 8 or 16 bits")
    tags = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15}
    file = write_dicom(tmp_path / "x.dcm", values, bits, syntax)
    dataset = pydicom.dcmread(file)
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file)
    assert np.abs(shown(file) - np.rint(255 * RAMP / 4095)).max() <= 1


def test_a_signed_stream_is_read(tmp_path):
    """Of 16 bits in 16, with a window around 0."""
    tags = {"WindowCenter": 0, "WindowWidth": 4096}
    file = write_dicom(tmp_path / "x.dcm", SIGNED.astype(np.int16), 16, "jpeg 2000", **tags)
    assert np.abs(shown(file) - np.rint(255 * RAMP / 4095)).max() <= 1


def test_the_depth_of_a_source_scales_what_does_not_tell_its_own(tmp_path):
    """16 bits without a window take it; with a window, or 12 bits stored, they do not."""
    plain = write_dicom(tmp_path / "a.dcm", RAMP // 4, 16)
    told = write_dicom(tmp_path / "b.dcm", RAMP // 4, 12)
    windowed = write_dicom(tmp_path / "c.dcm", RAMP, 16, WindowCenter=2048, WindowWidth=4096)
    assert shown(plain).max() == 255
    assert np.abs(shown(plain, 12) - np.rint(255 * (RAMP // 4) / 4095)).max() <= 1
    assert np.array_equal(shown(told, 14), shown(told))
    assert np.array_equal(shown(windowed, 14), shown(windowed))
    used = [read_grey(file, 1).used_depth for file in (plain, told, windowed)]
    assert used == [10, None, None]


@pytest.mark.parametrize(
    ("tags", "size"),
    [
        ({"PixelAspectRatio": [2, 1]}, (40, 60)),
        ({"PixelAspectRatio": [1, 2]}, (80, 30)),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (40, 60)),
        ({"PixelSpacing": [0.15, 0.15], "ImagerPixelSpacing": [0.2, 0.1]}, (40, 30)),
        ({"NominalScannedPixelSpacing": ["0,1", "0,2"]}, (80, 30)),
        ({"PixelSpacing": [0.1391, 0.139]}, (40, 30)),
        ({"PixelSpacing": ["nan", "nan"]}, (40, 30)),
    ],
)
def test_pixels_become_square(tmp_path, tags, size):
    """A pixel twice as high as wide takes two rows; the middle is where it was."""
    values = np.tile(np.arange(40) * 6, (30, 1))
    values[10:20] = 255
    file = write_dicom(tmp_path / "x.dcm", values, 8, **tags)
    grey = read_grey(file, 1)
    assert grey.image.size == (grey.width_px, grey.height_px) == size
    assert decode(file, 32, "crop").pixels.shape == (32, 32)
    bright = np.flatnonzero(np.asarray(grey.image)[:, 0] > 127)
    assert (bright[0], bright[-1] + 1) == (size[1] // 3, size[1] * 2 // 3)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelAspectRatio": [1, 1000]}, "more than 10 times"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"RescaleSlope": "one"}, "RescaleSlope is not a number"),
        ({"VOILUTSequence": short_lut()}, "look-up table has fewer entries"),
    ],
)
def test_what_cannot_be_shown_is_named(tmp_path, tags, reason):
    """Not as damaged."""
    file = write_dicom(tmp_path / "x.dcm", RAMP, 12, **tags)
    with pytest.raises(CxrdistError, match=rf"DICOM cannot be used \(.*{reason}"):
        read_grey(file, 1)
