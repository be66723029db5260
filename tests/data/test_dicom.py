import json
import re
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicoms import NAME, SYNTAXES, write_dicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_voi_lut, apply_windowing
from pydicom.uid import DeflatedExplicitVRLittleEndian
from support import run_command

from cxrdist.data.dicom import read_dicom
from cxrdist.data.images import decode
from cxrdist.data.phantom import write_phantoms
from cxrdist.errors import CxrdistError

REAL = Path(__file__).parents[3] / "shared" / "data" / "originals"


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> list[np.ndarray]:
    """Grey images: real ones where they are, else synthetic ones; with sides that are odd."""
    folder = tmp_path_factory.mktemp("phantoms")
    if not REAL.is_dir():
        write_phantoms(folder, 2, image_size_px=256)
    files = sorted((REAL if REAL.is_dir() else folder).glob("*/*.[pj][np]g"))[::7][:4]
    images = [Image.open(file).convert("L") for file in files]
    for image in images:
        image.thumbnail((301, 399))
    return [np.asarray(image) for image in images]


def pixels_of(file: Path) -> np.ndarray:
    return read_dicom(file.read_bytes(), file).pixels


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_dicom_is_equal_to_the_image_it_was_made_of(xrays, tmp_path, syntax, bits, photometric):
    """In every transfer syntax, to one grey level; by lossy JPEG to a few."""
    if {"jpeg": 8, "jpeg 12 bit": 12}.get(syntax, bits) != bits:
        pytest.skip("baseline JPEG has 8 bits, extended JPEG 12")
    for number, image in enumerate(xrays):
        seen = 255 - image if photometric == "MONOCHROME1" else image
        values = np.rint(seen / 255 * (2**bits - 1)).astype(np.uint16)
        file = tmp_path / f"{number}.dcm"
        write_dicom(file, values, bits, syntax, PhotometricInterpretation=photometric)
        difference = np.abs(pixels_of(file).astype(int) - image)
        if syntax in ("jpeg", "jpeg 12 bit"):
            assert difference.mean() < 1
            assert difference.max() < 10
        else:
            assert difference.max() <= 1


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_rescale_and_windows_are_pydicoms(tmp_path, function, signed):
    """The first of several windows, after the rescale, for stored values with and without sign."""
    values = np.arange(-2048, 2048) if signed else np.arange(4096)
    values = values.reshape(64, 64)
    tags = {
        "RescaleSlope": 1.5,
        "RescaleIntercept": -300,
        "WindowCenter": [700, 900],
        "WindowWidth": [1200, 50],
        "VOILUTFunction": function,
    }
    file = write_dicom(tmp_path / "x.dcm", values, 12, **tags)
    dataset = pydicom.dcmread(file)
    windowed = apply_windowing(values * 1.5 - 300, dataset)
    low = -300 - 2048 * 1.5 * signed  # pydicom gives the window the range of the stored values
    expected = (windowed - low) / (4095 * 1.5) * 255
    assert np.abs(pixels_of(file) - expected).max() <= 1


def test_a_voi_lut_is_pydicoms_and_goes_before_a_window(tmp_path):
    """A table of 10 bits from the value 100 on."""
    table = Dataset()
    table.LUTDescriptor = [256, 100, 10]
    table.LUTData = np.rint(1023 * (np.arange(256) / 255) ** 2).astype("<u2").tobytes()
    values = np.arange(400).reshape(20, 20)
    tags = {"VOILUTSequence": [table], "WindowCenter": 1, "WindowWidth": 5}
    file = write_dicom(tmp_path / "x.dcm", values, 12, **tags)
    expected = apply_voi_lut(values, pydicom.dcmread(file)) / 1023 * 255
    assert np.abs(pixels_of(file) - expected).max() <= 1


def test_padding_is_black_also_where_black_is_white(tmp_path):
    """Of a MONOCHROME1 image the padding 0 would be white."""
    values = np.array([[0, 0, 100], [0, 200, 255]])
    tags = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 0}
    file = write_dicom(tmp_path / "x.dcm", values, 8, **tags)
    assert pixels_of(file).tolist() == [[0, 0, 155], [0, 55, 0]]


def test_old_dicoms_without_a_preamble_are_read_by_their_suffix(tmp_path):
    """A bare data set of implicit VR."""
    values = np.arange(64).reshape(8, 8)
    file = write_dicom(tmp_path / "new.dcm", values, syntax="implicit")
    dataset = pydicom.dcmread(file)
    bare = Dataset()
    bare.update(dataset)
    bare.save_as(tmp_path / "old.dcm", implicit_vr=True, little_endian=True)
    assert (tmp_path / "old.dcm").read_bytes()[128:132] != b"DICM"
    assert np.array_equal(pixels_of(tmp_path / "old.dcm"), values)
    assert decode(tmp_path / "old.dcm", 8, "crop").view == "PA"


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 3}, "several frames"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing"),
        ({"Modality": "CT"}, "not radiography"),
        ({"Rows": 0}, "rows and columns"),
        ({"Rows": 60_000, "Columns": 60_000}, "rows and columns"),
        ({"Rows": 4000}, "cut off"),
        ({"BitsStored": 12}, "bits are unusual"),
        ({"BitsAllocated": 32}, "bits are unusual"),
        ({"HighBit": 5}, "not within the allocated bits"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "no width"),
        ({"WindowCenter": 1, "WindowWidth": 2, "VOILUTFunction": "X"}, "an unknown function"),
        ({"RescaleSlope": "nan", "RescaleIntercept": 0}, "not a number"),
        ({"PixelRepresentation": None}, "PixelRepresentation is missing"),
    ],
)
def test_what_is_no_radiograph_is_refused_with_its_name(tmp_path, tags, reason):
    """One line that names the file and what is wrong, and no tag of the patient."""
    file = write_dicom(tmp_path / "x.dcm", np.arange(64).reshape(8, 8), **tags)
    with pytest.raises(CxrdistError, match=rf"x\.dcm.*{reason}") as refused:
        decode(file, 8, "crop")
    assert "Muster" not in str(refused.value)


def test_a_deflated_dicom_is_refused_before_it_is_inflated(tmp_path):
    """The library inflates without a bound."""
    file = Path(pydicom.data.get_testdata_file("image_dfl.dcm"))
    with pytest.raises(CxrdistError, match="deflated; store it uncompressed"):
        decode(file, 8, "crop")


@pytest.mark.parametrize("syntax", ["jpeg", "jpeg 12 bit", "jpeg lossless", "jpeg-ls"])
def test_a_stream_that_is_cut_off_is_refused(tmp_path, syntax):
    """At once; libjpeg would fill the lower half with grey, and CharLS take seconds or more."""
    bits = 12 if syntax == "jpeg 12 bit" else 8
    values = np.random.default_rng(0).integers(0, 1 << bits - 1, (128, 128))
    file = write_dicom(tmp_path / "x.dcm", values, bits, syntax)
    dataset = pydicom.dcmread(file)
    stream = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([stream[: len(stream) // 2]])
    dataset.save_as(file)
    start = time.process_time()
    with pytest.raises(CxrdistError, match="its pixel data is cut off; it is damaged"):
        decode(file, 8, "crop")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg lossless", "jpeg-ls", "jpeg 2000"])
@pytest.mark.parametrize("has_table", [False, True])
def test_two_frames_are_refused_also_if_no_tag_counts_them(tmp_path, syntax, has_table):
    """The first alone would be taken for the radiograph; fragments of one frame are one."""
    values = np.random.default_rng(0).integers(0, 4096, (64, 64))
    file = write_dicom(tmp_path / "x.dcm", values, 12, syntax)
    dataset = pydicom.dcmread(file)
    one = dataset.PixelData
    if syntax not in ("explicit", "rle"):
        stream = get_frame(one, 0, number_of_frames=1)
        dataset.PixelData = encapsulate([stream], 5, has_table)
        dataset.save_as(file)
        assert np.array_equal(pixels_of(file), np.rint(values / 4095 * 255))
    if syntax == "explicit":
        dataset.PixelData = one + one
    else:
        dataset.PixelData = encapsulate([get_frame(one, 0, number_of_frames=1)] * 2, 1, has_table)
    dataset.save_as(file)
    with pytest.raises(CxrdistError, match="it has several frames; expected one radiograph"):
        decode(file, 8, "crop")


def test_a_file_that_ends_within_its_stream_is_cut_off(tmp_path):
    """Its pixel data has no end, so that pydicom leaves it out."""
    file = write_dicom(tmp_path / "x.dcm", np.arange(4096).reshape(64, 64) % 256, 8, "jpeg-ls")
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CxrdistError, match="its pixel data is missing, cut off or not of integers"):
        decode(file, 8, "crop")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.55", "1.2.3"])
def test_other_compressions_are_refused_with_a_tool_that_undoes_them(tmp_path, syntax):
    """JPEG XL, which pydicom does not know, progressive JPEG, which dcmconv cannot undo, others."""
    file = write_dicom(tmp_path / "x.dcm", np.arange(64).reshape(8, 8))
    plain = b"UI\x14\x001.2.840.10008.1.2.1\0"
    length = len(syntax) + len(syntax) % 2
    other = b"UI" + length.to_bytes(2, "little") + syntax.encode().ljust(length, b"\0")
    file.write_bytes(file.read_bytes().replace(plain, other, 1))
    with pytest.raises(CxrdistError, match=r"transfer syntax is not supported; .* dcmdjpeg"):
        decode(file, 8, "crop")


@pytest.mark.parametrize("implicit", [False, True])
def test_a_deflated_dicom_is_told_by_its_file_meta_group_only(tmp_path, implicit):
    """Without a preamble and with implicit VRs too; elsewhere its UID is a text like any other."""
    values = np.arange(64).reshape(8, 8)
    noted = write_dicom(tmp_path / "x.dcm", values, ImageComments=DeflatedExplicitVRLittleEndian)
    assert DeflatedExplicitVRLittleEndian.encode() in noted.read_bytes()
    assert np.array_equal(pixels_of(noted), values)
    uid = DeflatedExplicitVRLittleEndian.encode()
    length = struct.pack("<I", len(uid)) if implicit else b"UI" + struct.pack("<H", len(uid))
    element = struct.pack("<HH", 2, 0x10) + length + uid
    for start in (b"", bytes(128) + b"DICM"):
        deflated = zlib.compress(bytes(999), wbits=-15)
        (tmp_path / "y.dcm").write_bytes(start + element + deflated)
        with pytest.raises(CxrdistError, match="deflated; store it uncompressed"):
            decode(tmp_path / "y.dcm", 8, "crop")


def test_pydicoms_own_files_are_read_or_refused(capsys):
    """None crashes, prints or takes long."""
    folder = Path(pydicom.data.__file__).parent
    files = sorted(file for file in folder.rglob("*.*") if file.is_file())
    read, reasons = 0, []
    for file in files:
        start = time.perf_counter()
        try:
            read += decode(file, 64, "crop").pixels.shape == (64, 64)
        except CxrdistError as error:
            reasons.append((file, str(error)))
        assert time.perf_counter() - start < 10
    assert len(files) > 100
    assert read > 10
    refusals = ("the DICOM cannot be used (", "is not a readable ")
    assert all(why.removeprefix(f"{file}: ").startswith(refusals) for file, why in reasons)
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_dicoms_is_packed_without_a_name(tmp_path):
    """Named by UIDs: keys are unique, a patient is in one split, and nothing tells who it is."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            values = random.integers(0, 4096, (40, 40))
            file = tmp_path / "in" / name / f"1.2.840.1.{i}"
            write_dicom(file, values, 12, PatientID=f"{name}-{i // 3}-4711", ViewPosition="AP")
    done = run_command(
        *("pack", "--source", "folder", "--input", tmp_path / "in", "--out", tmp_path / "out"),
        *("--size", 32, "--split", "0.5/0.25/0.25"),
    )
    assert done.returncode == 0, done.stderr
    assert "images of 8 patients, none in two splits" in done.stdout
    written = b"".join(file.read_bytes() for file in (tmp_path / "out").iterdir())
    for secret in (NAME, "Muster", "4711", "19640812"):
        assert secret not in done.stdout + done.stderr
        assert secret.encode() not in written
    keys = set()
    for shard in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))
                    keys.add(about["key"])
                    assert about["view"] == "AP"
                    assert about["width_px"] == 40
                    assert re.fullmatch(r"dicom-\d{6}", about["patient"])
    assert len(keys) == 24
    assert all("." not in key for key in keys)
