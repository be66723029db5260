"""Findings: boxes that a radiologist drew around signs of disease."""

from typing import Annotated, NamedTuple

from cxrdist.documents import Between, Text

MOST_PX = 100_000  # for the position of an edge; more than any detector or square has
LEAST_PX = 1e-6  # for a side
ROUNDING_PX = 1.0  # by which boxes of tables may exceed their image
MOST_FINDINGS = 1000  # per image; the readers of VinDr-CXR drew some dozens

Px = Annotated[float, Between(-MOST_PX, MOST_PX)]
PositivePx = Annotated[float, Between(LEAST_PX, MOST_PX)]


class Finding(NamedTuple):
    """A box around a finding, in px of the original as it is shown (after EXIF rotation).

    Edges lie between pixels: a box with x 0 and the image's width covers all columns. In samples,
    boxes are in px of the square.
    """

    label: Text
    x: Px
    """Left edge."""
    y: Px
    """Top edge."""
    width: PositivePx
    height: PositivePx
    reader: Text = ""
    """Who drew it, if several people drew boxes; empty if unknown."""
