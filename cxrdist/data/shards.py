"""Shards: tars of samples that any WebDataset client can read."""

import hashlib
import io
import json
import os
import re
import stat
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.findings import LEAST_PX, MOST_FINDINGS, Finding
from cxrdist.data.index import MEND, PackedShard, ShardEntry
from cxrdist.data.labels import NOT_STATED
from cxrdist.data.pictures import MOST_PIXELS
from cxrdist.documents import Between, Real, Text, parse_json, typed
from cxrdist.errors import CxrdistError
from cxrdist.files import atomic_file, judging, sha256_of

AGAIN = "pack the shards again"
MOST_JSON_BYTES = 1 << 20  # of a KEY.json, which names a path and labels
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # and the header's length (ISO 15948, 5.2)
PNG_START = struct.Struct(">16sIIBBBBB")
# Columns of samples.csv that KEY.json repeats.
SHARED_COLUMNS = ("key", "label", "patient", "source", "path", "view", *NOT_STATED)
GREY = (8, 0, 0, 0, 0)  # bits, colour type, compression, filter, interlace (11.2.2)

Pixels = Annotated[int, Between(1, MOST_PIXELS)]
Boxes = Annotated[list[Finding], Between(0, MOST_FINDINGS)]

_File = io.BufferedReader | io.BufferedRandom


class SampleFile(TypedDict):
    """The content of KEY.json; the fields in `SHARED_COLUMNS` repeat columns of samples.csv."""

    key: Text
    label: Text
    patient: Text
    source: Text
    path: Text
    view: Text
    width_px: Pixels
    """Width of the original; height_px is its height."""
    height_px: Pixels
    sex: NotRequired[Text]
    age: NotRequired[Real | None]
    """In years."""
    uncertain: NotRequired[Text]
    missing: NotRequired[Text]
    assumed_absent: NotRequired[Text]
    boxes: NotRequired[Boxes]
    """Of findings, in px of the square."""


class _Span(NamedTuple):
    """Position of a member's content in its shard."""

    first: int
    num_bytes: int


def sample_key(path: str) -> str:
    """Return the key of a sample, which depends only on its path in the source.

    WebDataset cuts a name at its first dot, so a key has none; the hash distinguishes names that
    are equal once cleaned. A DICOM UID, all digits and dots, becomes ``image``.
    """
    name = Path(path).name
    # A suffix begins with a letter, so that the last number of a name such as v1.2 is not cut.
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", re.sub(r"\.[A-Za-z]\w*$", "", name))[:40].strip("-")
    if re.fullmatch(r"\d+(\.\d+)+(\.[A-Za-z]\w*)?", name) or not stem:
        stem = "image"
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}"


class _Spans(NamedTuple):
    """Positions of the members of a sample."""

    facts: _Span
    mask: _Span | None
    png: _Span


def write_shard(path: Path, samples: Iterable[tuple[Mapping[str, object], bytes, bytes]]) -> None:
    """Write a shard atomically and reproducibly: the same samples give the same bytes.

    A sample has the content of its KEY.json (`SampleFile`), its square as a PNG, and its mask as a
    PNG of 0 and 255, empty without one.
    """
    with (
        atomic_file(path) as partial,
        # Other formats have extended headers, by which readers may disagree on a name or a size.
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for facts, png, mask in samples:
            content = json.dumps(facts, sort_keys=True, allow_nan=False).encode()
            # This order is part of the format (shards/README.md), and `OpenShard` relies on it.
            add_member(tar, f"{facts['key']}.json", content)
            if mask:
                add_member(tar, f"{facts['key']}.mask.png", mask)
            add_member(tar, f"{facts['key']}.png", png)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar reproducibly: the same content gives the same bytes."""
    member = tarfile.TarInfo(name)  # its defaults for time, owner and group are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def describe_shard(path: Path, num_samples: int) -> ShardEntry:
    """Return the index entry of a shard that was written."""
    return ShardEntry(path.name, num_samples, path.stat().st_size, sha256_of(path))


class OpenShard:
    """An open shard that matches the index and holds its samples and nothing else.

    Its layout is that of `write_shard`: KEY.json, KEY.mask.png if samples.csv lists a mask, and
    KEY.png of each sample in order, as regular files in an uncompressed ustar, then zeros. No other
    archive format begins with such a name, so no other reader can see other content in it.
    """

    def __init__(self, shard: PackedShard, file: _File) -> None:
        """Locate the samples, checking each size before anything is read.

        Raises:
            CxrdistError: the content differs from the index.
        """
        self._shard, self._file = shard, file
        side = shard.size_px
        # An uncompressed grey PNG has a byte per pixel and per row, plus its chunk headers.
        most_png_bytes = 2 * side * (side + 1) + 4096
        self._spans: list[_Spans] = []
        # `open_shard` has read the file to its end for the hash.
        file.seek(0)
        for sample in shard.samples:
            facts = self._next(f"{sample.key}.json", MOST_JSON_BYTES)
            mask = None
            if sample.mask_sha256:
                mask = self._next_square(f"{sample.key}.mask.png", most_png_bytes)
            png = self._next_square(f"{sample.key}.png", most_png_bytes)
            self._spans.append(_Spans(facts, mask, png))
        self._refuse_more()

    def read(self, number: int) -> tuple[NDArray[np.uint8], SampleFile]:
        """Decode the sample at a position: uint8 [size, size], and the content of KEY.json.

        Raises:
            CxrdistError: it differs from samples.csv.
        """
        sample, facts = self._shard.samples[number], self.describe(number)
        return self._square(sample.key, self._spans[number].png, sample.sha256), facts

    def read_mask(self, number: int) -> NDArray[np.uint8] | None:
        """Decode the mask of a sample: uint8 [size, size] of 0 and 255; None if it has none.

        Raises:
            CxrdistError: it differs from samples.csv.
        """
        sample, span = self._shard.samples[number], self._spans[number].mask
        if span is None:
            return None
        mask = self._square(f"{sample.key}.mask", span, sample.mask_sha256)
        if ((mask != 0) & (mask != 255)).any():
            raise self._wrong(f"{sample.key}.mask has values other than 0 and 255", AGAIN)
        return mask

    def _square(self, name: str, span: _Span, sha256: str) -> NDArray[np.uint8]:
        """Decode a member and compare it with its hash."""
        try:
            pixels = self._decode(self._content(span))
        except (OSError, SyntaxError, ValueError, LookupError, struct.error, zlib.error) as error:
            raise self._wrong(f"{name} is not a readable PNG ({error!r:.100})", AGAIN) from error
        if hashlib.sha256(pixels.tobytes()).hexdigest() != sha256:
            raise self._wrong(f"the pixels of {name} differ from samples.csv", AGAIN)
        return pixels

    def _decode(self, png: bytes) -> NDArray[np.uint8]:
        """Decode a PNG, uint8 [size, size]."""
        side = self._shard.size_px
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            # Once more: a malicious file may have a second header with another size.
            if (*image.size, image.mode) != (side, side, "L"):
                raise ValueError(f"{image.width} x {image.height} px of mode {image.mode}")
            return np.asarray(image)

    def describe(self, number: int) -> SampleFile:
        """Return the content of a sample's KEY.json.

        Raises:
            CxrdistError: it differs from samples.csv, lacks a valid size of the original, or has a
                box that leaves the square.
        """
        sample = self._shard.samples[number]
        with judging(f"{self._shard.file}: {sample.key}.json", AGAIN):
            facts = typed(parse_json(self._content(self._spans[number].facts)), SampleFile)
        given: dict[str, object] = {**facts}
        if not sample.view:  # shards of older versions have the view only in KEY.json
            given["view"] = ""
        for column in SHARED_COLUMNS:
            if given.get(column, "") != getattr(sample, column):
                raise self._wrong(f"the {column} of {sample.key} differs from samples.csv", AGAIN)
        side = self._shard.size_px
        if not all(_is_within(box, side) for box in facts.get("boxes", ())):
            raise self._wrong(f"a box of {sample.key} leaves the square of {side} px", AGAIN)
        return facts

    def _next(self, expected: str, most_bytes: int) -> _Span:
        """Read the header of the next member, and seek to the end of its content."""
        header = self._file.read(tarfile.BLOCKSIZE)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            instead = "the end" if not header.strip(b"\0") else "an invalid header"
            raise self._wrong(f"expected {expected}, found {instead}") from error
        if member.name != expected:
            raise self._wrong(f"expected {expected}, found {member.name!r:.120}")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise self._wrong(f"{expected} is not a regular file")
        if not 0 < member.size <= most_bytes:
            raise self._wrong(f"{expected} has {member.size} bytes, expected 1 to {most_bytes}")
        span = _Span(self._file.tell(), member.size)
        # A seek beyond the end of a file does not fail, so the end is compared.
        end = span.first + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if end > self._shard.entry.bytes:
            raise self._wrong(f"{expected} is longer than the shard")
        self._file.seek(end)
        return span

    def _next_square(self, name: str, most_bytes: int) -> _Span:
        """Read the header of a PNG member, and compare its declared size before it is decoded.

        A small PNG can declare a huge image. The PNG's header: ISO 15948, section 11.2.2.
        """
        png = self._next(name, most_bytes)
        side, after = self._shard.size_px, self._file.tell()
        start = self._content(_Span(png.first, min(png.num_bytes, PNG_START.size)))
        self._file.seek(after)
        declared = PNG_START.unpack(start) if len(start) == PNG_START.size else ()
        if declared[:1] != (PNG_SIGNATURE,):
            raise self._wrong(f"{name} is not a PNG")
        width, height, bits, colour, *_ = declared[1:]
        if declared[1:] != (side, side, *GREY):
            raise self._wrong(
                f"{name} has {width} x {height} px of {bits} bits and colour type {colour}, "
                f"expected {side} x {side} px of 8-bit grey"
            )
        return png

    def _refuse_more(self) -> None:
        """Check that only the zeros that fill a tar's last record follow the samples."""
        # A tar ends with two blocks of zeros and zeros up to a whole record (POSIX ustar), together
        # less than two records.
        tail = self._file.read(2 * tarfile.RECORDSIZE)
        if len(tail) >= 2 * tarfile.RECORDSIZE or tail.strip(b"\0"):
            raise self._wrong("holds more than the samples that samples.csv lists")
        if len(tail) < 2 * tarfile.BLOCKSIZE:
            raise self._wrong("the end of the tar is missing")

    def _content(self, span: _Span) -> bytes:
        self._file.seek(span.first)
        return self._file.read(span.num_bytes)

    def _wrong(self, problem: str, mend: str = MEND) -> CxrdistError:
        return CxrdistError(f"{self._shard.file}: {problem}; {mend}")


@contextmanager
def open_shard(shard: PackedShard) -> Iterator[OpenShard]:
    """Open a shard, and compare it with the index.

    The compared file stays open and is the one that is read later, even if its name is given to
    another file meanwhile. Links to shards on another disk are followed: only a regular file with
    the right content passes.

    Raises:
        CxrdistError: it is missing, cannot be read, or differs from the index.
    """
    path, entry = shard.file, shard.entry
    with _open(path, entry.bytes) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise CxrdistError(
                f"{path}: the shard has {size} bytes, the index says {entry.bytes}; {MEND}"
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise CxrdistError(
                f"{path}: the shard's content differs from the index (sha256); {MEND}"
            )
        yield OpenShard(shard, file)


def describe_samples(
    shards: Iterable[PackedShard], numbers: Container[int]
) -> Iterator[tuple[int, SampleFile]]:
    """Yield the numbers of some samples, ascending, with the content of their KEY.json.

    Shards that hold none of them are not opened.

    Raises:
        CxrdistError: a shard differs from the index.
    """
    for shard in shards:
        positions = [i for i in range(len(shard.samples)) if shard.first + i in numbers]
        if positions:
            with open_shard(shard) as opened:
                for position in positions:
                    yield shard.first + position, opened.describe(position)


def _open(path: Path, num_bytes: int) -> _File:
    """Open a local regular file, or a temporary copy of a remote one."""
    try:
        if not isinstance(path, Path):
            return _fetch(path, num_bytes)
        # Without O_NONBLOCK opening a pipe would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except FileNotFoundError as error:
        raise CxrdistError(f"{path}: the shard is missing; {MEND}") from error
    except OSError as error:
        raise CxrdistError(f"{path}: cannot be read ({error.strerror or error}); {MEND}") from error
    raise CxrdistError(f"{path}: is not a regular file; {MEND}")


def _fetch(path: Path, num_bytes: int) -> io.BufferedRandom:
    """Copy a file of an object store, stopping soon after its expected size."""
    copy = tempfile.TemporaryFile(prefix="cxrdist-")
    with path.open("rb") as content:
        # A block too many is enough to see that the size is wrong.
        while copy.tell() <= num_bytes and (block := content.read(1 << 22)):
            copy.write(block)
    copy.seek(0)
    return copy


def read_shard(shard: PackedShard) -> Iterator[tuple[NDArray[np.uint8], SampleFile]]:
    """Yield uint8 [size, size] and the content of KEY.json of each sample, as in samples.csv.

    Raises:
        CxrdistError: the shard differs from the index.
    """
    with open_shard(shard) as opened:
        for number in range(len(shard.samples)):
            yield opened.read(number)


def _is_within(box: Finding, side_px: int) -> bool:
    """Return whether a box lies in the square, up to rounding."""
    most = side_px + LEAST_PX
    return min(box.x, box.y) >= 0 and max(box.x + box.width, box.y + box.height) <= most
