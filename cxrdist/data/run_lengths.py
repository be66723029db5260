"""Run lengths: tables of masks as CheXmask has them (Gaggion et al. 2024, PhysioNet).

A row has the name of an image, and for each lung pairs of a first pixel, counted from 1 along the
rows of the image, and a number of pixels. A table can have several GB, so only positions of rows
are kept in memory. Not read: the heart, the landmarks, compressed tables.
"""

import csv
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.pictures import MOST_PIXELS
from cxrdist.data.tables import float_of, plain
from cxrdist.errors import CxrdistError

# The image's name in the tables of ChestX-ray8, CheXpert, MIMIC-CXR-JPG, PadChest and VinDr-CXR.
NAMES = ("imageindex", "path", "dicomid", "imageid")
LUNGS = ("leftlung", "rightlung")
SIZE = ("height", "width")
# CheXmask's authors advise to use masks with a mean Dice coefficient of at least 0.7, as predicted
# by reverse classification accuracy (its README, Quality Threshold). In most rows of PadChest's
# table mean and maximum are swapped, so the smaller of the two is used.
QUALITY, LEAST_QUALITY = ("dicercamean", "dicercamax"), 0.7
MOST_ROW_BYTES = 4 << 20  # three organs of a 4000 px image have 0.2 MB
COMPRESSED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class RunsRow(NamedTuple):
    """A row of a table of run lengths."""

    where: str
    """File and row, for messages."""
    name: str
    """Name of the image."""
    first_byte: int
    """Position of the row in the file."""
    num_bytes: int
    quality: float
    """Predicted Dice coefficient, 0 to 1; NaN if the table lacks it."""


def list_runs(file: Path) -> Iterator[RunsRow]:
    """Yield the rows of a table of run lengths, reading one at a time.

    Raises:
        CxrdistError: it cannot be read, is compressed, or is not a table of run lengths.
    """
    try:
        with file.open("rb") as content:
            _refuse_compressed(file, content.read(8))
            content.seek(0)
            header = _next_row(content, f"{file} row 1")
            columns = _columns(file, header)
            key = next(columns[name] for name in NAMES if name in columns)
            number, first = 1, len(header)
            while row := _next_row(content, f"{file} row {number + 1}"):
                number += 1
                where = f"{file} row {number}"
                if row.strip():
                    cells = _cells(row, where, len(columns))
                    qualities = (cells[columns[name]] for name in QUALITY if name in columns)
                    quality = min((_quality(cell, where) for cell in qualities), default=math.nan)
                    yield RunsRow(where, cells[key].strip(), first, len(row), quality)
                first += len(row)
    except OSError as error:
        raise CxrdistError(f"{file}: cannot be read ({error.strerror or error})") from error


def read_runs(file: Path, first_byte: int, num_bytes: int) -> NDArray[np.uint8]:
    """Read the lungs of a row of a table: uint8 [H, W], 255 in either lung, else 0.

    Raises:
        CxrdistError: it cannot be read, or the run lengths do not fit the size.
    """
    try:
        with file.open("rb") as content:
            # `MaskPlace` has only the position of the row, so the header is read for each mask.
            columns = _columns(file, _next_row(content, f"{file} row 1"))
            content.seek(first_byte)
            row = content.read(num_bytes)
    except OSError as error:
        raise CxrdistError(f"{file}: cannot be read ({error.strerror or error})") from error
    where = f"{file} (the row from byte {first_byte} on)"
    cells = _cells(row, where, len(columns))
    height, width = (_side(cells[columns[name]], where) for name in SIZE)
    if height * width > MOST_PIXELS:
        raise CxrdistError(f"{where}: {width} x {height} px, expected at most {MOST_PIXELS} pixels")
    pixels = np.zeros(height * width, np.uint8)
    for name in LUNGS:
        starts, ends = _runs(cells[columns[name]], len(pixels), where)
        for start, end in zip(starts, ends, strict=True):
            pixels[start:end] = 255
    return pixels.reshape(height, width)


def _runs(cell: str, num_pixels: int, where: str) -> tuple[list[int], list[int]]:
    """Return the first pixel of each run, from 0 on, and the pixel after its last one."""
    try:
        numbers = np.array(cell.split(), np.int64)
    except (ValueError, OverflowError) as error:
        raise CxrdistError(f"{where}: its run lengths are not whole numbers") from error
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    if len(starts) != len(lengths):
        raise CxrdistError(f"{where}: its run lengths are not pairs of a start and a length")
    # Not starts + lengths <= num_pixels, whose sum may overflow.
    inside = (starts >= 0) & (lengths > 0) & (lengths <= num_pixels - starts)
    if not inside.all():
        raise CxrdistError(f"{where}: its run lengths exceed the {num_pixels} pixels of its size")
    if lengths.sum() > num_pixels:  # otherwise a row of 4 MB could fill each pixel a million times
        raise CxrdistError(f"{where}: its run lengths cover a pixel more than once")
    return starts.tolist(), (starts + lengths).tolist()


def _side(cell: str, where: str) -> int:
    side = float_of(cell)  # pandas writes 1024.0 where a cell of the column is empty
    if not (1 <= side <= MOST_PIXELS and side.is_integer()):
        raise CxrdistError(
            f"{where}: Height or Width is {cell!r:.40}, expected px (some of CheXmask's tables of "
            "preprocessed images lack them; take those of OriginalResolution)"
        )
    return int(side)


def _quality(cell: str, where: str) -> float:
    quality = float_of(cell)
    if not 0 <= quality <= 1:
        raise CxrdistError(f"{where}: Dice RCA is {cell!r:.40}, expected 0 to 1")
    return quality


def _refuse_compressed(file: Path, head: bytes) -> None:
    kind = next((kind for mark, kind in COMPRESSED.items() if head.startswith(mark)), None)
    if kind:
        raise CxrdistError(
            f"{file}: is compressed ({kind}), and its rows are read one by one in any order; "
            f"unpack it first{', such as by gunzip -k' if kind == 'gzip' else ''}"
        )


def _next_row(content: BinaryIO, where: str) -> bytes:
    """Return the bytes of a row, with the line breaks in its quotes; empty at the end."""
    lines, size, open_quote = [], 0, False
    while line := content.readline(MOST_ROW_BYTES):
        lines.append(line)
        size += len(line)
        # A quote inside of quotes is doubled (RFC 4180), which keeps the count even.
        open_quote ^= line.count(b'"') % 2 == 1
        if size >= MOST_ROW_BYTES:
            raise CxrdistError(f"{where}: has more than {MOST_ROW_BYTES} bytes, or an open quote")
        if not open_quote:
            break
    return b"".join(lines)


def _columns(file: Path, header: bytes) -> dict[str, int]:
    """Return the position of each column, by its plain name; that of pandas's index is empty."""
    names = [plain(name) for name in _cells(header, f"{file} row 1")]
    positions = {name: i for i, name in enumerate(names)}
    keys = [name for name in NAMES if name in positions]
    missing = [name for name in (*LUNGS, *SIZE) if name not in positions]
    if missing or len(keys) != 1 or len(positions) < len(names):
        raise CxrdistError(
            f"{file}: expected a table of run lengths with one column that names the image (Image "
            "Index, Path, dicom_id, ImageID or image_id), Left Lung, Right Lung, Height and Width, "
            f"each once; found {', '.join(names)[:200] or 'no header'}"
        )
    return positions


def _cells(row: bytes, where: str, count: int | None = None) -> list[str]:
    """Return the cells of a row; reject invalid CSV and another number of cells."""
    try:
        with _large_cells():
            text = io.StringIO(row.decode("utf-8-sig"), newline="")
            cells = next(csv.reader(text, strict=True), [])
    except (ValueError, csv.Error) as error:
        raise CxrdistError(
            f"{where}: is not a valid CSV row ({error}); download the table again"
        ) from error
    if count is not None and len(cells) != count:
        raise CxrdistError(
            f"{where}: has {len(cells)} cells, expected {count}; download the table again"
        )
    return cells


@contextmanager
def _large_cells() -> Iterator[None]:
    """Raise the csv module's limit of a cell to the length of a row."""
    # The limit is that of the whole process, and other tables rely on the default.
    before = csv.field_size_limit(MOST_ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
