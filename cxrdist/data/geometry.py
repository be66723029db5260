"""Geometry: how pictures become squares; the same for pixels, masks and boxes."""

from typing import NamedTuple, TypeVar

from PIL import Image

from cxrdist.data.boxes import Box
from cxrdist.data.findings import LEAST_PX, Finding
from cxrdist.errors import CxrdistError

R = TypeVar("R", Box, Finding)  # edges lie between pixels


class Placement(NamedTuple):
    """The part of a picture that is drawn into a square, and where, in px; the rest is black."""

    part: tuple[float, float, float, float]
    """Left, top, right and bottom edge in the picture, px."""
    x: int
    """Left edge in the square."""
    y: int
    """Top edge in the square."""
    width: int
    height: int

    def at_scale(self, x: float, y: float) -> "Placement":
        """Return the placement of the same picture scaled to ``x`` and ``y`` times its sides."""
        left, top, right, bottom = self.part
        return self._replace(part=(left * x, top * y, right * x, bottom * y))


def place(width_px: int, height_px: int, size_px: int, fit: str) -> Placement:
    """Place a picture in a square: ``crop`` the centre, ``pad`` with black, or ``stretch``.

    Raises:
        CxrdistError: ``fit`` is another word.
    """
    if fit == "crop":
        side = min(width_px, height_px)
        left, top = (width_px - side) / 2, (height_px - side) / 2
        return Placement((left, top, left + side, top + side), 0, 0, size_px, size_px)
    whole = (0, 0, width_px, height_px)
    if fit == "stretch":
        return Placement(whole, 0, 0, size_px, size_px)
    if fit != "pad":
        raise CxrdistError(f"fit is {fit!r}: expected crop, pad or stretch")
    longer = max(width_px, height_px)
    # Whole pixels, as in Pillow's ImageOps.pad. At 224 px half a pixel is nine px of a 4000 px
    # original, so `in_square` scales boxes by the rounded sides too.
    width, height = (max(1, round(side / longer * size_px)) for side in (width_px, height_px))
    x, y = round((size_px - width) / 2), round((size_px - height) / 2)
    return Placement(whole, x, y, width, height)


def resample(
    image: Image.Image, placement: Placement, size_px: int, reducing_gap: float | None = None
) -> Image.Image:
    """Resample a picture of mode L into a square with an anti-aliased bilinear filter.

    A ``reducing_gap``, as in Pillow, is faster, with slightly different pixels.
    """
    size = (placement.width, placement.height)
    filled = image.resize(size, Image.Resampling.BILINEAR, placement.part, reducing_gap)
    if size == (size_px, size_px):
        return filled
    square = Image.new("L", (size_px, size_px))
    square.paste(filled, (placement.x, placement.y))
    return square


def scaled(box: R, x: float, y: float) -> R:
    """Return the box in a picture that is ``x`` times as wide and ``y`` times as high."""
    return box._replace(x=box.x * x, y=box.y * y, width=box.width * x, height=box.height * y)


def in_square(box: R, width_px: int, height_px: int, size_px: int, fit: str) -> R:
    """Return the box of an original, in its px, in px of its square; it may lie outside of it."""
    placement = place(width_px, height_px, size_px, fit)
    left, top, right, bottom = placement.part
    here = box._replace(x=box.x - left, y=box.y - top)
    there = scaled(here, placement.width / (right - left), placement.height / (bottom - top))
    return there._replace(x=there.x + placement.x, y=there.y + placement.y)


def clipped(box: R, size_px: int) -> R | None:
    """Return a box clipped to the square; None if it lies outside."""
    left, top = max(0.0, box.x), max(0.0, box.y)
    right, bottom = min(size_px, box.x + box.width), min(size_px, box.y + box.height)
    if min(right - left, bottom - top) < LEAST_PX:
        return None
    return box._replace(x=left, y=top, width=right - left, height=bottom - top)
