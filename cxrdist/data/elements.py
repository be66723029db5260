"""Elements of a DICOM data set as plain numbers and texts; an empty one counts as absent.

They are read from the bytes of the file: pydicom refuses malformed numbers, such as those with a
decimal comma, and guesses which values are signed.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag

from cxrdist.data.tables import float_of

BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "FL": "f4", "FD": "f8", "US or SS": "u2"}


class RefusedError(ValueError):
    """Why a DICOM cannot be used; its text never contains the value of a tag."""


def numbers(dataset: Dataset, keyword: str | int) -> list[float]:
    """Return the values of an element, NaN if not a number; a decimal comma counts as a point."""
    return [float_of(str(part).replace(",", ".")) for part in _parts(dataset, keyword)]


def number(dataset: Dataset, keyword: str, absent: float) -> float:
    """Return the first value of an element; refuse one that is not a finite number."""
    first = next(iter(numbers(dataset, keyword)), absent)
    if not math.isfinite(first):
        raise RefusedError(f"its {keyword} is not a number")
    return first


def whole(dataset: Dataset, keyword: str, absent: int | None = None) -> int:
    """Return the first value of an element as an integer; refuse an absent one without default."""
    if absent is None and not numbers(dataset, keyword):
        raise RefusedError(f"its {keyword} is missing")
    return int(number(dataset, keyword, absent or 0))


def text(dataset: Dataset, keyword: str | int) -> str:
    """Return the first value of an element, stripped, or an empty string."""
    return next((str(part).strip(" \0") for part in _parts(dataset, keyword)), "")


def shorts(dataset: Dataset, keyword: str | int) -> NDArray[np.int64]:
    """Return the values of an element as unsigned 16-bit numbers, whatever its VR says."""
    return np.array([int(value) & 0xFFFF for value in numbers(dataset, keyword)], np.int64)


def octets(dataset: Dataset, keyword: str | int) -> tuple[bytes, str]:
    """Return the bytes of an element, none if it is absent, and their order, ``<`` or ``>``."""
    # `dataset[keyword]` would convert the value, and replace the raw element.
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None)
    if not value:
        return b"", "<"
    if not isinstance(element, RawDataElement):
        raise RefusedError(f"its {keyword} is not of bytes")
    return value, "<" if element.is_little_endian else ">"


def items(dataset: Dataset, keyword: str | int) -> list[Dataset]:
    """Return the items of a sequence, none if it is absent or empty."""
    found = dataset[keyword].value if keyword in dataset else None
    return list(found) if isinstance(found, Items) else []


def _parts(dataset: Dataset, keyword: str | int) -> Sequence[object]:
    """Return the values of an element: texts, or numbers if it is binary."""
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None)
    if value is None:
        return []
    if not isinstance(element, RawDataElement):  # pydicom has converted it
        return value if isinstance(value, MultiValue) else [value] if value != "" else []
    # The file's VR may be missing (implicit VR), UN or wrong, so it only chooses among numbers:
    # it is used if it is binary, and the element is a number by the dictionary as well.
    known = dictionary_VR(Tag(keyword))
    kind = element.VR if element.VR in BINARY and known in (*BINARY, "DS", "IS") else known
    if kind in BINARY:
        code = np.dtype(f"{'<' if element.is_little_endian else '>'}{BINARY[kind]}")
        found: list[object] = np.frombuffer(value, code, len(value) // code.itemsize).tolist()
        return found
    # Latin-1 decodes any byte, and only ASCII texts are looked for.
    parts = [part.strip(" \0") for part in value.decode("latin-1").split("\\")]
    return parts if any(parts) else []
