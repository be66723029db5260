from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from cxrdist.data.kinds import FORMATS, HEAD_BYTES, kind_of

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def head_of(file: Path) -> bytes:
    return file.read_bytes()[:HEAD_BYTES]


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_are_told_by_their_content(tmp_path, kind):
    """Whatever the name says."""
    Image.fromarray(RAMP).save(tmp_path / "x.bin", kind)
    assert kind_of(head_of(tmp_path / "x.bin")) == kind


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big endian"])
@pytest.mark.parametrize("first", [128, 132], ids=["file meta", "preamble"])
def test_dicoms_are_told_with_and_without_a_preamble(tmp_path, syntax, first):
    """By the mark, by the file meta information, or by the elements of a bare data set."""
    file = write_dicom(tmp_path / "x.bin", RAMP, syntax=syntax)
    data = file.read_bytes()
    assert kind_of(data[:HEAD_BYTES]) == "DICOM"
    assert kind_of(data[132:]) == "DICOM"
    bare = data[data.index(b"\x00\x08" if syntax == "big endian" else b"\x08\x00\x16\x00") :]
    assert kind_of(bare) == "DICOM"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"path,label\na.png,b\n",
        b"BM25 scores of 40 documents, and what they tell",
        b"P5 is a pentium",
        b"GIF files are listed below",
        b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ",
        b"\0\0\0\x01Bud1\0\0\x10\0",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        b"PK\x03\x04",
        b"%PDF-1.7",
        b"{}",
        b"\x1f\x8b\x08\0\0\0\0\0",
        b"\0" * 200,
        b"\x08\0" * 100,
    ],
)
def test_what_is_no_image_has_no_kind(content):
    """Texts, tables, archives, and what file managers leave."""
    assert kind_of(content) is None
