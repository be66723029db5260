"""Findings: boxes that a radiologist drew around signs of disease."""

from typing import Annotated, NamedTuple

from cxrdist.documents import Between, Text

MOST_PX = 100_000  # of an edge; more than any detector and any square has
LEAST_PX = 1e-6  # of a side
ROUNDING_PX = 1.0  # by which tables let a box reach out of its image
MOST_FINDINGS = 1000  # of an image; the readers of VinDr-CXR drew some dozens

Px = Annotated[float, Between(-MOST_PX, MOST_PX)]
PositivePx = Annotated[float, Between(LEAST_PX, MOST_PX)]


class Finding(NamedTuple):
    """A box around a finding, in px of the original as it is shown (after an EXIF turn).

    Edges lie between pixels: a box of x 0 and the image's width covers all columns. In a sample it
    is in px of the square.
    """

    label: Text
    x: Px
    """Left edge."""
    y: Px
    """Top edge."""
    width: PositivePx
    height: PositivePx
    reader: Text = ""
    """Who drew it, where several have; empty where nothing tells."""
