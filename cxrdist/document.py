"""Documents: JSON files that may come from anybody, read field by field with types and bounds."""

import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrdist.errors import CxrdistError


@dataclass(frozen=True)
class Document:
    """A JSON object of a file.

    Attributes:
        values: the object; fields that nobody asks for are left alone.
        where: the file, for messages.
        mend: what the user can do about a wrong file.
        prefix: where in the file the object is, such as ``splits.train.``.
    """

    values: dict[str, Any]
    where: str
    mend: str
    prefix: str = ""

    def whole(self, name: str, least: int, most: int) -> int:
        """A whole number within its bounds.

        Raises:
            CxrdistError: the field is missing, or is something else; so do all of these methods.
        """
        value = self._get(name)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most}")
        return value

    def reals(self, name: str) -> tuple[float, ...]:
        """One to three finite numbers: a value for each channel of an image."""
        values = self._get(name)
        if not isinstance(values, list) or not 1 <= len(values) <= 3:
            raise self._wrong(name, "a list of one to three numbers")
        if not all(type(v) in (int, float) and abs(v) < 1e9 and math.isfinite(v) for v in values):
            raise self._wrong(name, "finite numbers")
        return tuple(float(value) for value in values)

    def text(self, name: str, most: int = 1 << 16) -> str:
        """A text of at most so many characters, which UTF-8 can write."""
        value = self._get(name)
        if not _is_text(value, most):
            raise self._wrong(name, f"a text of at most {most} characters")
        return str(value)

    def word(self, name: str, expected: Sequence[str]) -> str:
        """One of a few known words."""
        value = self._get(name)
        if not isinstance(value, str) or value not in expected:
            raise self._wrong(name, " or ".join(expected))
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A list of short texts."""
        values = self._get(name)
        if not isinstance(values, list) or not 1 <= len(values) <= most:
            raise self._wrong(name, f"a list of 1 to {most} texts")
        if not all(_is_text(value, 255) for value in values):
            raise self._wrong(name, "texts of at most 255 characters")
        return list(values)

    def names(self, name: str, most: int) -> list[str]:
        """Distinct names of labels, each of them without ``|``, which stands between labels."""
        values = self.texts(name, most)
        if not all(value and "|" not in value for value in values):
            raise self._wrong(name, "names that are not empty and have no |")
        if len(set(values)) != len(values):
            raise self._wrong(name, "names that differ from each other")
        return values

    def object(self, name: str) -> "Document":
        """An object within this one."""
        return self._inner(name, self._get(name), name)

    def objects(self, name: str, most: int) -> list["Document"]:
        """A list of at most so many objects."""
        values = self._get(name)
        if not isinstance(values, list) or len(values) > most:
            raise self._wrong(name, f"a list of at most {most} objects")
        return [self._inner(name, value, f"{name}[{i}]") for i, value in enumerate(values)]

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def _inner(self, name: str, value: Any, place: str) -> "Document":
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Document(value, self.where, self.mend, f"{self.prefix}{place}.")

    def _get(self, name: str) -> Any:
        if name not in self.values:
            raise CxrdistError(f"{self.where}: {self.prefix}{name} is missing; {self.mend}")
        return self.values[name]

    def _wrong(self, name: str, expected: str) -> CxrdistError:
        value = reprlib.repr(self.values[name])  # long and deep values are cut
        return CxrdistError(
            f"{self.where}: {self.prefix}{name} is {value}, expected {expected}; {self.mend}"
        )


def _is_text(value: Any, most: int) -> bool:
    """Whether a value is a text that can be written again: JSON may hold half of a surrogate."""
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def parse_document(data: bytes, where: str, mend: str) -> Document:
    """Parse a JSON object.

    Raises:
        CxrdistError: it is something else.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise CxrdistError(f"{where}: no readable JSON ({reason!s:.100}); {mend}") from error
    if not isinstance(values, dict):
        raise CxrdistError(f"{where}: is no JSON object; {mend}")
    return Document(values, where, mend)


def read_bounded(path: Path, most_bytes: int, mend: str) -> bytes:
    """Read a small file, local or an fsspec path.

    Raises:
        CxrdistError: it is larger than any such file, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = bytes(file.read(most_bytes + 1))
    except OSError as error:
        reason = error.strerror or error
        raise CxrdistError(f"{path}: cannot be read ({reason}); {mend}") from error
    if len(data) > most_bytes:
        raise CxrdistError(f"{path}: is larger than {most_bytes >> 20} MiB; {mend}")
    return data
