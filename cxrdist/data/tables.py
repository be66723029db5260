"""Tables: CSV files in the encodings and with the separators of spreadsheets.

A table may be a gzip file. Refused: other text encodings, other separators, other compressed files,
workbooks.
"""

import codecs
import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cxrdist.errors import CxrdistError

MOST_BYTES = 1 << 30  # the largest public tables of X-rays (PadChest, MIMIC-CXR) have 0.2 GB
GZIP = b"\x1f\x8b"  # RFC 1952, section 2.3.1
CHUNK_BYTES = 1 << 20
# Not str.splitlines, which also cuts at U+0085, U+2028 and others that may be in a cell.
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
# UTF-32's byte order mark begins with UTF-16's, so it comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
SAVE = "save it as CSV UTF-8"


class Row(NamedTuple):
    """A row below the header."""

    where: str
    """File and number, for messages; counted as a spreadsheet does, the header is row 1."""
    cells: list[str]
    """One per column."""


@dataclass(frozen=True)
class Table:
    """The content of a CSV file."""

    file: Path
    columns: tuple[str, ...]
    """The header, without blanks around the names."""
    separator: str
    text: str
    """The whole file."""
    notes: tuple[str, ...]
    """What was assumed about it, a line each."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are not blank.

        Raises:
            CxrdistError: a row has more or fewer cells than the header, or a quote has no end.
        """
        number = 0
        reader = _reader(self.text, self.separator)
        try:
            for number, cells in enumerate(reader, start=1):
                if number > 1 and any(map(str.strip, cells)):
                    yield self._row(f"{self.file} row {number}", cells)
        except csv.Error as error:
            raise CxrdistError(
                f"{self.file} row {number + 1}: {error}; close its quotes and shorten its cells"
            ) from error

    def _row(self, where: str, cells: list[str]) -> Row:
        while len(cells) > len(self.columns) and not cells[-1].strip():
            cells.pop()  # spreadsheets export empty cells for columns that were once used
        if len(cells) != len(self.columns):
            fault = "more" if len(cells) > len(self.columns) else "fewer"
            raise CxrdistError(
                f"{where}: {fault} cells than columns ({len(cells)}, expected "
                f"{len(self.columns)}); quote cells that hold the separator"
            )
        return Row(where, cells)

    def cells(
        self, names: Mapping[str, Collection[str]] | Collection[str], needed: Collection[str] = ()
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield file and number of each row, and its cells by name, without blanks around them.

        Arguments are those of `find_columns`, errors those of `find_columns` and of `rows`.
        """
        positions = self.find_columns(names, needed)
        for where, row in self.rows():
            yield where, {name: row[position].strip() for name, position in positions.items()}

    def find_columns(
        self, names: Mapping[str, Collection[str]] | Collection[str], needed: Collection[str] = ()
    ) -> dict[str, int]:
        """Return the positions of the columns that exist, by letters and digits in any case.

        ``names`` are those of the columns, or have for each name the spellings that it may have;
        ``needed`` are those that the table of a public data set must have.

        Raises:
            CxrdistError: a name has two columns, or a needed one has none.
        """
        of_name = names if isinstance(names, Mapping) else {name: (name,) for name in names}
        positions: dict[str, int] = {}
        for name, spellings in of_name.items():
            known = {plain(spelling) for spelling in spellings}
            columns = [i for i, column in enumerate(self.columns) if plain(column) in known]
            if len(columns) > 1:
                both = " and ".join(repr(self.columns[i]) for i in columns)
                raise CxrdistError(
                    f"{self.file}: the columns {both} are both the {name}; remove or rename one"
                )
            if columns:
                positions[name] = columns[0]
        if lacking := [name for name in needed if name not in positions]:
            raise CxrdistError(f"{self.file}: has no column {lacking[0]!r}; fetch the table again")
        return positions


def read_table(file: Path, expected: Collection[str]) -> Table:
    """Read a CSV file, local or an fsspec path.

    The separator that yields most of the expected columns is used.

    Raises:
        CxrdistError: the file is missing, too large, or not a CSV text.
    """
    text, notes = read_text(file)
    headers = {separator: _header(text, separator) for separator in SEPARATORS}
    known = {plain(name) for name in expected}
    # Of equals max takes the first, so a header without any expected column has commas.
    separator = max(SEPARATORS, key=lambda s: sum(plain(name) in known for name in headers[s]))
    if separator != ",":
        notes = (*notes, f"the table is read with {SEPARATORS[separator]} between the cells")
    return Table(file, headers[separator], separator, text, notes)


def read_text(file: Path) -> tuple[str, tuple[str, ...]]:
    """Read a text file: UTF-8, UTF-16 and UTF-32 with byte order marks, otherwise Windows-1252.

    A gzip file is unpacked, whatever its name. A note says if the encoding was assumed.

    Raises:
        CxrdistError: the file is missing, too large, a damaged gzip file, or not a text.
    """
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise CxrdistError(f"{file}: has {size} bytes, expected a table of at most 1 GiB")
        if not file.is_file():  # reading a pipe may block, and a device has no end
            raise CxrdistError(f"{file}: cannot be read (not a regular file); expected a CSV")
        data = file.read_bytes()
    except OSError as error:
        raise CxrdistError(
            f"{file}: cannot be read ({error.strerror or error}); expected a CSV"
        ) from error
    if data.startswith(GZIP):
        data = _unpack(file, data)
    text, notes = _decode(file, data)
    # UTF-16 without a byte order mark decodes as another encoding, with NULs in the text.
    if "\0" in text:
        row = text.count("\n", 0, text.index("\0")) + 1
        raise CxrdistError(f"{file} row {row}: has a NUL, so it is not a text file; {SAVE}")
    return text, notes


def plain(name: str) -> str:
    """Return a column's name as letters and digits of one case: Patient.ID is patient_id."""
    return re.sub(r"[\W_]+", "", name).casefold()


def float_of(cell: str) -> float:
    """Return the number in a cell; NaN if it is not a number."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _unpack(file: Path, data: bytes) -> bytes:
    """Unpack a gzip file; its size is checked first, since 1 MiB can unpack to 1 GiB."""
    size = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            while chunk := packed.read(CHUNK_BYTES):
                size += len(chunk)
                if size > MOST_BYTES:
                    raise CxrdistError(f"{file}: unpacks to more than 1 GiB, expected a table")
            packed.seek(0)
            return packed.read()
    except (OSError, EOFError, zlib.error) as error:
        raise CxrdistError(f"{file}: is a damaged gzip file ({error}); fetch it again") from error


def _decode(file: Path, data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return the text, and a note on its assumed encoding if that is not UTF-8."""
    marked = next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), None)
    # Five bytes are undefined in Windows-1252, none in Latin-1.
    for encoding in [marked] if marked else ["utf-8", "windows-1252", "latin-1"]:
        try:
            text = data.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError:
            continue
        assumed = f"the table is read as {encoding}; {SAVE} if letters are wrong"
        return text, () if encoding == "utf-8" else (assumed,)
    raise CxrdistError(f"{file}: begins as {marked} but is not; {SAVE}")


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text with their ends; `io.StringIO` would copy it, 4 times as large."""
    return (line[0] for line in LINE.finditer(text))


def _reader(text: str, separator: str) -> Iterator[list[str]]:
    """Return the rows of a text; blanks after separators are skipped if the header has them.

    A quoted cell can be read after a blank only if blanks are skipped. In other tables a blank is
    part of its cell, since a file's name may begin with one.
    """
    skips = f"{separator} " in next(_lines(text), "")
    return csv.reader(_lines(text), delimiter=separator, skipinitialspace=skips, strict=True)


def _header(text: str, separator: str) -> tuple[str, ...]:
    """Return the column names; none if there is no row or its quotes do not fit the separator."""
    reader = _reader(text, separator)
    try:
        return tuple(name.strip() for name in next(reader, []))
    except csv.Error:
        return ()
