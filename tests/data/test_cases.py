"""The given cases of bent pixels, in pack and in predict, against the standard's arithmetic."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxrdist.config import PackConfig
from cxrdist.data.images import read_square
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack

CASES = Path(__file__).parents[3] / "shared" / "cases"
SIZE = 64
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the given cases are not here")
# The rows of each image are what it shows: value v of 12, 14 or 8 bits over its largest.
RAMP = np.arange(4096).reshape(64, 64)
EXPECTED = {
    **{
        name: RAMP / 4095
        for name in (
            "voi_lut_8bit_entries",
            "voi_lut_8bit_storage",
            "voi_lut_16bit_declared_12bit_used",
            "bits_stored_16_values_12bit",
            "j2k_14bit_stream_bits_stored_16",
            "j2k_8bit_in_16",
            "rescale_empty",
            "padding_empty",
            "modality_lut_12bit",
            # LINEAR, centre 2048 and width 4096: (v - 2047.5) / 4095 + 0.5.
            "two_windows_first_width_0",
        )
    },
    "window_decimal_comma": (RAMP - 2047) / 4095 + 0.5,
    "window_outside_values": 0 * RAMP,
}


def packed(directory: Path) -> dict[str, np.ndarray]:
    """The squares of a pack by the path of their original."""
    squares = {}
    for shard in directory.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))
                    png = tar.extractfile(member.name.removesuffix("json") + "png").read()
                    squares[about["path"]] = np.asarray(Image.open(io.BytesIO(png)))
    return squares


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, Path]:
    """All cases in one source, as a table, and its shards."""
    folder = tmp_path_factory.mktemp("cases")
    files = sorted(file for file in CASES.glob("*/*") if file.is_file())
    with open(folder / "table.csv", "w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("path", "label", "patient", "split"))
        for i, file in enumerate(files):
            (folder / file.name).write_bytes(file.read_bytes())
            split = ("train", "val", "test")[i // 2 % 3]
            writer.writerow((file.name, "ab"[i % 2], file.stem, split))
    config = PackConfig(
        *("csv", folder / "table.csv", folder / "out"),
        **{"size": SIZE, "fit": "stretch", "duplicates": "report", "workers": 2},
        anonymise=False,
    )
    pack(config)
    return folder, folder / "out"


@pytest.mark.parametrize("name", EXPECTED)
def test_dicom_cases_are_right_to_one_grey_level(shards, name):
    """As many px as the square has, so that nothing is resampled."""
    square = packed(shards[1])[f"{name}.dcm"]
    assert np.abs(square - np.rint(255 * EXPECTED[name])).max() <= 1


def test_padding_of_signed_pixels_is_black(shards):
    """63536 of VR US is -2000; the rest is a window from -2048 to 2047 that is turned."""
    square = packed(shards[1])["padding_us_signed_pixels_monochrome1.dcm"]
    values = np.fromfile(
        CASES / "dicom" / "padding_us_signed_pixels_monochrome1.dcm", "<i2", offset=8774 - 8192
    ).reshape(64, 64)
    expected = np.rint(255 * (1 - ((values + 0.5) / 4095 + 0.5)))
    expected[values == -2000] = 0
    assert (values == -2000).sum() > 100
    assert np.abs(square - expected).max() <= 1


@pytest.mark.parametrize("name", ["g12", "dark", "hot"])
def test_images_of_one_detector_have_one_scale(shards, name):
    """12 bits: neither the darkest image nor one hot pixel changes the scale of an image."""
    values = np.asarray(Image.open(CASES / "png" / f"{name}.png"))
    whole = read_square(CASES / "png" / f"{name}.png", 96, "pad", read_index(shards[1]).depth)
    expected = np.rint(255 * np.minimum(values / 4095, 1))
    assert np.abs(whole[16:80].astype(float) - expected).max() <= 1


def test_pack_and_predict_see_the_same_bytes(shards):
    """With the depth that index.json keeps, 12."""
    folder, out = shards
    index = read_index(out)
    squares = packed(out)
    assert index.depth == 12
    assert len(squares) == len(list(CASES.glob("*/*")))
    for path, square in squares.items():
        assert np.array_equal(square, read_square(folder / path, SIZE, "stretch", index.depth))


def test_the_constant_image_is_named(shards):
    """By the audit, of all cases that one alone."""
    found = json.loads((shards[1] / "audit.json").read_text())
    assert [(about["path"], about["kind"]) for about in found["flat"]] == [
        ("window_outside_values.dcm", "constant")
    ]
