"""Masks: which pixels of an image are lung."""

from pathlib import Path
from typing import NamedTuple


class MaskPlace(NamedTuple):
    """Where the mask of an image is.

    Attributes:
        file: a picture, or a table of run lengths.
        first_byte: of the image's row in a table.
        num_bytes: of that row; 0 for a picture.
    """

    file: Path
    first_byte: int = 0
    num_bytes: int = 0
