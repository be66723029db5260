import csv
import io
import os
import re
import socket
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from support import make_images
from upath import UPath

from cxrdist.config import PackConfig
from cxrdist.data.found import find_images
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.errors import CxrdistError

PICTURES = {
    **{"1.png": "PNG", "2.PNG": "PNG", "3.jpg": "JPEG", "4.JPEG": "JPEG", "5.jpe": "JPEG"},
    **{"6.jfif": "JPEG", "7.tif": "TIFF", "8.tiff": "TIFF", "9.bmp": "BMP", "10.webp": "WEBP"},
    **{"11.gif": "GIF", "12.jp2": "JPEG2000", "13.pgm": "PPM", "14.dat": "PNG", "bare": "JPEG"},
    **{"x.png.bak": "PNG", "new\nline.png": "PNG", "next\x85line.png": "PNG"},
}
DICOMS = ("1.dcm", "IM0002.IMA", "IM3.dcm.1", "IMG.001", "1.2.840.10008.4", "IM5", "old")
HIDDEN = "hidden or system file"
LEFT_OUT = {
    **dict.fromkeys(("a/notes.txt", "a/labels.csv", "b/all.zip", "b/film.mp4"), "not an image"),
    **dict.fromkeys(("a/empty", "a/page", "b/report.pdf"), "not an image"),
    **dict.fromkeys(("a/.hidden.png", "a/._1.png", "a/.DS_Store", "a/Thumbs.db"), HIDDEN),
    **dict.fromkeys(("a/desktop.ini", "a/.ipynb_checkpoints/1.png", "__MACOSX/a/1.png"), HIDDEN),
    **dict.fromkeys(("b/@eaDir/1.jpg", ".git/objects/00/1"), HIDDEN),
    "stray.png": "beside the class folders",
    "DICOMDIR": "DICOMDIR",
    "b/fifo.png": "not a regular file",
    "b/socket": "not a regular file",
    "a/gone.png": "link to a missing file",
    "b/loop": "cannot be read (Too many levels of symbolic links)",
    "b/again": "folder that is read under another name",
    "b/up": "folder that is read under another name",
}
UNREADABLE = {"a/cut.jpg", "b/text.png"}


def picture(form: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_all_kinds(folder: Path, elsewhere: Path) -> set[str]:
    """Forty kinds of files and more; the paths of those that are images."""
    images = {f"a/{name}": picture(form, i) for i, (name, form) in enumerate(PICTURES.items())}
    images |= {f"b/{i}.png": picture("PNG", 100 + i) for i in range(6)}
    outside = {f"a/more/{i}.png": picture("PNG", 200 + i) for i in range(3)}
    nothing = {
        path: b"\0\1" * 100 if path.endswith("mp4") else picture("PNG", 300)
        for path, reason in LEFT_OUT.items()
        if reason in (HIDDEN, "not an image", "beside the class folders")
    }
    nothing |= {"a/empty": b"", "a/page": b"<!DOCTYPE html>404", "a/notes.txt": b"no image"}
    nothing |= {"a/labels.csv": b"path,label\n", "b/report.pdf": b"%PDF-1.7"}
    nothing |= {"a/cut.jpg": picture("JPEG", 400)[:300], "b/text.png": b"no image"}
    for path, data in (images | nothing).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    with zipfile.ZipFile(folder / "b" / "all.zip", "w") as archive:
        archive.writestr("1.png", images["a/1.png"])
    elsewhere.mkdir()
    for path, data in outside.items():
        (elsewhere / Path(path).name).write_bytes(data)
    (elsewhere / "file").write_bytes(picture("PNG", 500))
    (folder / "a" / "more").symlink_to(elsewhere)
    (folder / "a" / "linked.png").symlink_to(elsewhere / "file")
    (folder / "b" / "again").symlink_to(elsewhere)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "b" / "loop").symlink_to(folder / "b" / "loop")
    (folder / "a" / "gone.png").symlink_to(elsewhere / "gone")
    os.mkfifo(folder / "b" / "fifo.png")
    _bind(folder / "b" / "socket")
    _write_dicoms(folder)
    return {*images, *outside, "a/linked.png", "a/more/file", *(f"b/{name}" for name in DICOMS)}


def _bind(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # a socket's own path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _write_dicoms(folder: Path) -> None:
    random = np.random.default_rng(9)
    for name in DICOMS:
        file = write_dicom(folder / "b" / name, random.integers(0, 256, (40, 40)))
    file.write_bytes(file.read_bytes()[132:])  # the last has neither preamble nor mark
    directory = write_dicom(folder / "DICOMDIR", np.zeros((8, 8), int))
    storage, media = b"1.2.840.10008.5.1.4.1.1.1\0", b"1.2.840.10008.1.3.10"
    directory.write_bytes(directory.read_bytes().replace(storage, media.ljust(len(storage), b"\0")))


def test_of_forty_kinds_of_files_each_is_packed_or_named(tmp_path, capsys):
    """Found = packed + left out, in numbers and by name; nothing is read twice or waited for."""
    images = write_all_kinds(tmp_path / "in", tmp_path / "elsewhere")
    assert len(images) + len(LEFT_OUT) + len(UNREADABLE) >= 60
    out = tmp_path / "out"
    pack(
        PackConfig(
            *("folder", tmp_path / "in", out),
            **{"size": 32, "split": "0.5/0.25/0.25", "workers": 1, "skip_bad": True},
            **{"anonymise": False, "duplicates": "report"},
        )
    )
    assert {sample.path for sample in read_index(out).samples} == images
    with open(out / "rejected.csv", newline="") as file:
        rejected = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected.keys() == LEFT_OUT.keys() | UNREADABLE
    assert {path: rejected[path] for path in LEFT_OUT} == LEFT_OUT
    table = dict(re.findall(r"^(.+?)  +(\d+)$", capsys.readouterr().out, re.M))
    assert int(table["found"]) == len(images) + len(rejected)
    assert int(table["packed"]) == len(images)
    reasons = [int(n) for name, n in table.items() if name.startswith("left out")]
    assert sum(reasons) == len(rejected)
    assert table["left out: unreadable"] == "2"


def test_copies_that_are_dropped_are_a_row_of_the_table(tmp_path, capsys):
    """What --duplicates drop leaves out is counted, and named in dropped.csv."""
    folder = make_images(tmp_path / "in", {"a": 12, "b": 12})
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "a000_0.png").read_bytes())
    options = {"size": 32, "split": "0.5/0.25/0.25", "workers": 1, "duplicates": "drop"}
    pack(PackConfig("folder", folder, tmp_path / "out", **options))
    said = capsys.readouterr().out
    assert re.search(r"left out: copy, in dropped.csv +1\n", said)
    assert "packed 24 images" in said


def test_a_name_that_is_not_utf8_is_one_line(tmp_path):
    """An image is refused by its escaped name; another file is left out by it."""
    folder = os.fsencode(tmp_path)
    with open(folder + b"/M\xfcller.txt", "wb") as file:
        file.write(b"text")
    assert find_images(tmp_path).left_out == ((r"M\xfcller.txt", "not an image"),)
    with open(folder + b"/M\xfcller.png", "wb") as file:
        file.write(b"image")
    with pytest.raises(CxrdistError, match=r"M\\xfcller\.png: the name is not UTF-8; rename it"):
        find_images(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    """Its images are unknown, and the folder stands for them."""
    tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o700)
    for parent in tmp_path.parents:
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        found = find_images(tmp_path)
    finally:
        os.seteuid(0)
    assert found.left_out == (("closed", "folder that cannot be read (Permission denied)"),)


def test_a_link_to_hidden_data_is_read(tmp_path):
    """A folder that is stored in a hidden one is read under the name of the link to it."""
    (tmp_path / ".store" / "x").mkdir(parents=True)
    (tmp_path / ".store" / "x" / "1.png").write_bytes(picture("PNG", 0))
    (tmp_path / "a").symlink_to(tmp_path / ".store" / "x")
    found = find_images(tmp_path)
    assert found.images == (tmp_path / "a" / "1.png",)
    assert found.left_out == ((".store/x", "folder that is read under another name"),)


def test_a_local_folder_is_packed_into_an_object_store_again(tmp_path):
    """The shards, or the tasks of an unfinished pack, are there already."""
    out = UPath("memory://found/out")
    out.mkdir(parents=True)
    (out / "index.json").write_text("{}")
    (tmp_path / "x.png").touch()
    assert find_images(tmp_path, [out]).images == (tmp_path / "x.png",)
