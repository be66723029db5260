"""A shard of anybody is read by one reader, which bounds what it reads."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support import make_shards, run_measured

from cxrdist.data.images import encode_png
from cxrdist.data.index import inspect_index, read_index
from cxrdist.data.shards import describe_shard, open_shard, read_shard, sample_key, write_shard
from cxrdist.errors import CxrdistError

SHARD = "train-000000.tar"
BOX = {"label": "a", "x": 1, "y": 1, "width": 3.5, "height": 2, "reader": ""}
READ_FIRST = """
import sys
from pathlib import Path
from cxrdist.data.index import read_index
from cxrdist.data.shards import read_shard
list(read_shard(read_index(Path(sys.argv[1])).packed()[0]))
"""


def _read_masks(shard):
    """The masks of all samples of a shard."""
    with open_shard(shard) as opened:
        return [opened.read_mask(number) for number in range(len(shard.samples))]


KEYS = {
    "a/a000_0.png": "a000_0-da366117f4",
    "patient 7/Scan (3).v2.jpeg": "Scan-3-v2-f8e636dd20",
    "1.2.840.10008.1": "image-08a65d6d4c",
    "x/1.2.840.1.png": "image-f16a715671",
    "x/Ä.png": "image-4a516a791f",
}
"""By path: the name without dots, or image, and the first digits that sha256sum prints of it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("whole"), {"a": 12, "b": 12}, shard_size=2)


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """Shards whose first sample of the first shard has a mask."""
    folder = tmp_path_factory.mktemp("masked")
    shards = make_shards(folder, {"a": 12, "b": 12}, shard_size=2, masks=True)
    assert read_index(shards).samples[0].mask_sha256
    return shards


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def read_members(shards: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shards / SHARD) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]


def trust(shards: Path) -> None:
    """Make the index agree with the shard, as an attacker would."""
    about = json.loads((shards / "index.json").read_text())
    entries = about["splits"]["train"]["shards"]
    entries[0] = asdict(describe_shard(shards / SHARD, entries[0]["samples"]))
    (shards / "index.json").write_text(json.dumps(about))


def write_members(shards: Path, members: list[tuple[str, bytes]], form=tarfile.USTAR_FORMAT):
    """Write the shard anew, from some members."""
    with tarfile.open(shards / SHARD, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    trust(shards)


def png(width: int, height: int, colour: int = 0, bits: int = 8, data: bytes = b"x") -> bytes:
    """A PNG that declares a size and a kind, whatever it holds (ISO 15948)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + end

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def first_with(data: bytes):
    """Replace the first PNG."""
    return lambda members: [members[0], (members[1][0], data), *members[2:]]


def about_with(**fields):
    """Change the first KEY.json; a field that is ... goes."""

    def change(members):
        about = {**json.loads(members[0][1]), **fields}
        kept = {name: value for name, value in about.items() if value is not ...}
        return [(members[0][0], json.dumps(kept).encode()), *members[1:]]

    return change


CHANGES = {
    "a huge PNG": (first_with(png(60_000, 60_000)), "has 60000 x 60000 px"),
    "another size": (first_with(encode_png(np.zeros((31, 32), np.uint8))), "has 32 x 31 px"),
    "colour": (first_with(png(32, 32, colour=2)), "colour type 2, expected 32 x 32"),
    "16 bits": (first_with(png(32, 32, bits=16)), "of 16 bits"),
    "no PNG": (first_with(b"GIF89a" * 20), "is not a PNG"),
    "half a header": (first_with(png(32, 32)[:20]), "is not a PNG"),
    "no pixels": (first_with(png(32, 32)), "is not a readable PNG"),
    "a bomb": (
        first_with(png(32, 32, data=zlib.compress(bytes(10**6)))),
        "the pixels of .* differ",
    ),
    "a second header": (
        first_with(png(32, 32)[:33] + png(9000, 9000)[8:]),
        "is not a readable PNG .*9000 x 9000",
    ),
    "a long PNG": (first_with(bytes(10_000)), r"\.png has 10000 bytes, expected 1 to"),
    "an empty PNG": (first_with(b""), r"\.png has 0 bytes"),
    "a long JSON": (
        lambda m: [(m[0][0], b" " * (1 << 21)), *m[1:]],
        r"\.json has 2097152 bytes, expected 1 to 1048576",
    ),
    "deep JSON": (lambda m: [(m[0][0], b"[" * 10**5), *m[1:]], "nested too deep"),
    "no object": (lambda m: [(m[0][0], b"[1]"), *m[1:]], "is a list, expected an object"),
    "another key": (about_with(key="x"), "the key of"),
    "another label": (about_with(label="b|a"), "the label of"),
    "another uncertain label": (about_with(uncertain="b"), "the uncertain of"),
    "a missing label": (about_with(missing="b"), "the missing of"),
    "a wide original": (
        about_with(width_px=10**9),
        "width_px: is 1000000000, expected 1 to 50000000",
    ),
    "a text for a width": (about_with(width_px="10"), 'width_px: is "10", expected a whole number'),
    "no view": (about_with(view=...), "view: is missing"),
    "a box of no size": (about_with(boxes=[BOX | {"width": 0}]), r"boxes\[0\].width: is 0"),
    "a box far away": (about_with(boxes=[BOX | {"x": 1e9}]), r"boxes\[0\].x: is 1000000000"),
    "a box that leaves the square": (about_with(boxes=[BOX | {"x": 30}]), "a box of .* leaves the"),
    "many boxes": (about_with(boxes=[BOX] * 1001), "boxes: is a list, expected 0 to 1000 values"),
    "a member more": (lambda m: [*m, ("x.txt", b"x")], "holds more than the samples"),
    "a member between": (lambda m: [*m[:2], ("x.txt", b"x"), *m[2:]], "found 'x.txt'"),
    "a member less": (lambda m: m[:-1], r"expected .*\.png, found the end"),
    "another order": (lambda m: [*m[2:], *m[:2]], "expected .*json, found"),
    "swapped members": (lambda m: [m[1], m[0], *m[2:]], "expected .*json, found"),
    "a path": (lambda m: [("../" + m[0][0], m[0][1]), *m[1:]], r"found '\.\./"),
    "the same twice": (lambda m: [*m[:2], *m], "expected .*json, found"),
    "nothing": (lambda m: [], "found the end"),
}


@pytest.mark.parametrize("path", KEYS)
def test_a_key_has_the_images_name_unless_it_is_a_uid_or_nothing(path):
    """It depends on the path alone, so the keys of earlier packs are those of later ones."""
    assert sample_key(path) == KEYS[path]


def test_a_number_that_json_lacks_is_not_written(tmp_path):
    """Other readers refuse NaN, which Python's own would read; and no shard is left."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_shard(tmp_path / SHARD, [({"key": "a", "age": float("nan")}, b"", b"")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_members_are_those_of_the_samples(shards, change, message):
    """Though size and sha256 are right: one line with the shard and what is wrong."""
    write_members(shards, change(read_members(shards)))
    with pytest.raises(CxrdistError, match=rf"{SHARD}: .*{message}"):
        list(read_shard(read_index(shards).packed()[0]))


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_shard_without_the_end_of_a_tar_is_refused(shards, blocks):
    """A tar ends with at least two blocks of 512 zeros (POSIX.1-1988, ustar)."""
    with tarfile.open(shards / SHARD) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    content = (shards / SHARD).read_bytes()
    (shards / SHARD).write_bytes(content[: end + 2 * 512])
    trust(shards)
    assert list(read_shard(read_index(shards).packed()[0]))
    (shards / SHARD).write_bytes(content[: end + blocks * 512])
    trust(shards)
    with pytest.raises(CxrdistError, match=rf"{SHARD}: the end of the tar is missing"):
        list(read_shard(read_index(shards).packed()[0]))


def test_a_view_is_that_of_the_table(shards):
    """Older tables have none, and nothing to be compared."""
    shard = read_index(shards).packed()[0]
    assert list(read_shard(shard))
    shard.samples[0] = shard.samples[0]._replace(view="PA")
    with pytest.raises(CxrdistError, match=rf"{SHARD}: the view of .* differs from samples"):
        list(read_shard(shard))


def with_mask(data: bytes):
    """Replace the first mask, which is the second member."""
    return lambda members: [members[0], (members[1][0], data), *members[2:]]


MASK_CHANGES = {
    "no mask": (lambda m: [m[0], *m[2:]], r"expected .*\.mask\.png, found"),
    "a mask behind its image": (lambda m: [m[0], m[2], m[1], *m[3:]], r"expected .*\.mask\.png"),
    "a huge mask": (with_mask(png(60_000, 60_000)), r"\.mask\.png has 60000 x 60000 px"),
    "a coloured mask": (with_mask(png(32, 32, colour=2)), r"\.mask\.png has .* colour type 2"),
    "a long mask": (with_mask(bytes(10_000)), r"\.mask\.png has 10000 bytes, expected 1 to"),
    "no pixels": (with_mask(png(32, 32)), r"\.mask is not a readable PNG"),
    "another mask": (
        with_mask(encode_png(np.zeros((32, 32), np.uint8))),
        r"the pixels of .*\.mask differ",
    ),
}


@pytest.mark.parametrize(("change", "message"), MASK_CHANGES.values(), ids=MASK_CHANGES)
def test_masks_are_those_of_the_samples(masked, tmp_path, change, message):
    """A mask is read like its image: bounded before it is decoded, compared with its hash."""
    shards = Path(shutil.copytree(masked, tmp_path / "shards"))
    write_members(shards, change(read_members(shards)))
    with pytest.raises(CxrdistError, match=rf"{SHARD}: .*{message}"):
        _read_masks(read_index(shards).packed()[0])


def test_a_mask_of_other_values_is_refused_whatever_its_hash(masked, tmp_path):
    """An index that was made for it is no licence to read it."""
    shards = Path(shutil.copytree(masked, tmp_path / "shards"))
    grey = np.full((32, 32), 7, np.uint8)
    write_members(shards, with_mask(encode_png(grey))(read_members(shards)))
    shard = read_index(shards).packed()[0]
    digest = hashlib.sha256(grey.tobytes()).hexdigest()
    shard.samples[0] = shard.samples[0]._replace(mask_sha256=digest)
    with pytest.raises(CxrdistError, match=r"\.mask has values other than 0 and 255"):
        _read_masks(shard)


def test_a_mask_that_the_table_does_not_know_is_refused(masked, tmp_path):
    """samples.csv and index.json tell how many masks there are."""
    shards = Path(shutil.copytree(masked, tmp_path / "shards"))
    table, index = (shards / "samples.csv").read_text(), read_index(shards)
    digest = index.samples[0].mask_sha256
    (shards / "samples.csv").write_text(table.replace(digest, "", 1))
    assert any("has 15 masks, index.json says 16" in fault for fault in inspect_index(shards)[1])
    (shards / "samples.csv").write_text(table.replace(digest, "x", 1))
    with pytest.raises(CxrdistError, match=r"the mask_sha256 of .* is invalid"):
        inspect_index(shards)
    shard = index.packed()[0]
    shard.samples[0] = shard.samples[0]._replace(mask_sha256="")
    with pytest.raises(CxrdistError, match=r"expected .*\.png, found .*\.mask\.png"):
        _read_masks(shard)


def test_only_one_form_of_tar_is_read(shards):
    """No extended headers, which may name and size a member anew for some readers."""
    members = read_members(shards)
    key = members[0][0]
    with tarfile.open(shards / SHARD, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), {"path": name, "comment": "x"}
            tar.addfile(member, io.BytesIO(data))
    trust(shards)
    with pytest.raises(CxrdistError, match=f"expected {key}, found "):
        list(read_shard(read_index(shards).packed()[0]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"S", b"D"])
def test_a_member_is_a_regular_file(shards, kind):
    """No links, pipes, sparse files or directories."""
    members = read_members(shards)
    data = bytearray((shards / SHARD).read_bytes())
    member = tarfile.TarInfo(members[0][0])
    member.type, member.linkname, member.size = kind, "/etc/passwd", len(members[0][1])
    data[:512] = member.tobuf(tarfile.USTAR_FORMAT)[:512]
    (shards / SHARD).write_bytes(data)
    trust(shards)
    with pytest.raises(CxrdistError, match="is not a regular file"):
        list(read_shard(read_index(shards).packed()[0]))


def two_faced(tar: bytes) -> bytes:
    """A tar that is gzip to who looks for gzip.

    gzip keeps a field of any bytes in its header (RFC 1952, FEXTRA); its first ten bytes are the
    name of the tar's first member.
    """
    member = tarfile.TarInfo("x")
    member.size = 1024
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    extra = 512 + 1024 + len(tar) - 12
    header[:12] = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H", extra)
    checksum = 8 * ord(" ") + sum(header[:148]) + sum(header[156:])
    header[148:156] = b"%06o\0 " % checksum
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(bytes(256 << 20)) + deflate.flush()
    return bytes(header) + bytes(1024) + tar + body


def test_a_tar_with_two_faces_is_refused(shards):
    """To a reader that decompresses it is 256 MiB of zeros; here neither face is read."""
    data = two_faced((shards / SHARD).read_bytes())
    (shards / SHARD).write_bytes(data)
    trust(shards)
    with tarfile.open(shards / SHARD, "r:") as tar:
        assert len(tar.getmembers()) == 5
    with gzip.open(shards / SHARD) as content:
        assert content.read(100) == bytes(100)
    done = run_measured(READ_FIRST, shards)
    assert done.code == 1
    assert f"{SHARD}: expected " in done.stderr.splitlines()[-1]
    assert done.mib < 160


def test_what_was_checked_is_what_is_read(shards):
    """A shard that is exchanged after the check is still read as it was; sizes do not change."""
    shard = read_index(shards).packed()[0]
    with open_shard(shard) as opened:
        os.replace(shards / "train-000001.tar", shards / SHARD)
        for number, sample in enumerate(shard.samples):
            pixels, _ = opened.read(number)
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == sample.sha256
    with pytest.raises(CxrdistError, match=SHARD):
        list(read_shard(shard))


def test_a_link_to_a_shard_is_followed_and_other_files_are_not(shards, tmp_path):
    """People keep shards on other disks; a pipe is not waited for, a device is not read."""
    shard = read_index(shards).packed()[0]
    os.rename(shards / SHARD, tmp_path / "elsewhere.tar")
    (shards / SHARD).symlink_to(tmp_path / "elsewhere.tar")
    assert len(list(read_shard(shard))) == 2
    (tmp_path / "elsewhere.tar").unlink()
    with pytest.raises(CxrdistError, match=f"{SHARD}: the shard is missing"):
        list(read_shard(shard))
    for special in ("pipe", "/dev/zero", "."):
        (shards / SHARD).unlink()
        if special == "pipe":
            os.mkfifo(shards / SHARD)
        else:
            (shards / SHARD).symlink_to(special)
        with pytest.raises(CxrdistError, match=f"{SHARD}: is not a regular file"):
            list(read_shard(shard))
