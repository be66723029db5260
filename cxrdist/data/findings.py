"""Findings: boxes that a radiologist drew around signs of disease."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A box around a finding, in px of the original as it is shown (after an EXIF turn).

    Edges lie between pixels: a box of x 0 and the image's width covers all columns.
    """

    label: str
    x: float
    """Left edge."""
    y: float
    """Top edge."""
    width: float
    height: float
    reader: str = ""
    """Who drew it, where several have; empty where nothing tells."""
