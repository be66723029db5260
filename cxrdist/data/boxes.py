"""Boxes of burned-in text: their CSV, which users may edit, and how they are covered."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.findings import Finding
from cxrdist.data.tables import read_table
from cxrdist.errors import CxrdistError
from cxrdist.files import write_table

COLUMNS = ("path", "x", "y", "width", "height", "text", "score")
NEEDED = COLUMNS[:5]
MOST_PX = 1_000_000  # for the position of an edge, or a side
MOST_SOLVED = 50_000  # unknowns of Laplace's equation that are solved at once, in half a second


class Box(NamedTuple):
    """A box around burned-in text, in px of the original as it is shown (after EXIF rotation).

    It covers the pixels of columns floor(x) to ceil(x + width) - 1, rows likewise.
    """

    x: float
    """Left edge."""
    y: float
    """Top edge."""
    width: float
    height: float
    text: str = ""
    """Recognised text, for information only."""
    score: float = 1.0
    """Certainty of the detector, 0 to 1; 1 if a person drew the box."""


def write_boxes(file: Path, boxes: Mapping[str, Sequence[Box]]) -> None:
    """Write boxes by path of the image, sorted, with the columns `COLUMNS`."""
    rows = [
        (path, *(f"{value:g}" for value in box[:4]), box.text, f"{box.score:.3f}")
        for path in sorted(boxes)
        for box in sorted(boxes[path])
    ]
    write_table(file, COLUMNS, rows)


def read_boxes(file: Path) -> dict[str, tuple[Box, ...]]:
    """Read boxes by path of the image; the columns text and score may be missing.

    Raises:
        CxrdistError: the file is missing, or a row is not a valid box.
    """
    table = read_table(file, NEEDED)
    positions = table.find_columns(COLUMNS)
    missing = [name for name in NEEDED if name not in positions]
    if missing:
        raise CxrdistError(
            f"{file}: has no column {missing[0]!r}, expected {', '.join(NEEDED)}; make one with "
            "cxrdist find-text"
        )
    for note in table.notes:
        print(f"{file}: {note}")
    boxes: dict[str, list[Box]] = {}
    for where, cells in table.rows():
        row = {name: cells[position] for name, position in positions.items()}
        boxes.setdefault(row["path"], []).append(box_of(row, where))
    return {path: tuple(group) for path, group in boxes.items()}


def box_of(row: Mapping[str, str], where: str) -> Box:
    """Read a box from the cells of a table row; ``where`` names file and row in messages.

    Raises:
        CxrdistError: it is not a valid box.
    """
    try:
        # Some spreadsheets write a decimal comma.
        texts = [*(row[name] for name in NEEDED[1:]), row.get("score") or "1"]
        x, y, width, height, score = (float(text.replace(",", ".")) for text in texts)
    except ValueError as error:
        raise CxrdistError(f"{where}: {error}; expected numbers of px") from error
    # NaN fails every comparison, so it is refused too.
    inside = all(-MOST_PX <= value <= MOST_PX for value in (x, y, width, height, score))
    if not inside or width <= 0 or height <= 0:
        raise CxrdistError(
            f"{where}: {width:g} x {height:g} px at {x:g}, {y:g} is not a valid box; correct or "
            "remove the row"
        )
    return Box(x, y, width, height, row.get("text", ""), score)


def inside(boxes: Sequence[Box | Finding], height_px: int, width_px: int) -> NDArray[np.bool_]:
    """Return the pixels in any box, bool [height_px, width_px]; pixels partly inside count."""
    mask = np.zeros((height_px, width_px), dtype=bool)
    for box in boxes:
        # Rounded: an edge between two pixels is 1e-15 beyond it after a change of scale.
        top, left = (max(0, math.floor(round(edge, 6))) for edge in (box.y, box.x))
        ends = box.y + box.height, box.x + box.width
        bottom, right = (math.ceil(round(edge, 6)) for edge in ends)
        # A box above or left of the image ends below 0, which a slice counts from the far side.
        mask[top : max(top, bottom), left : max(left, right)] = True
    return mask


def cover(pixels: NDArray[np.uint8], boxes: Sequence[Box], how: str) -> NDArray[np.uint8]:
    """Return a copy of an image, uint8 [H, W], in which the boxes are covered.

    They are ``black`` (Bassi & Attux 2020, section 2.2), or filled as `fill` does (``fill``).
    """
    mask = inside(boxes, *pixels.shape)
    return fill(pixels, mask) if how == "fill" else np.where(mask, np.uint8(0), pixels)


def fill(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Fill pixels of an image with the smoothest continuation of their surroundings.

    Each pixel in the mask, bool [H, W], becomes the mean of its neighbours above, below, left and
    right (Laplace's equation), so that no edge shows where something was. More than `MOST_SOLVED`
    pixels are filled at half the size. If all pixels are to be filled, the image becomes black.
    """
    filled = pixels.copy()
    if mask.all() or not mask.any():
        filled[mask] = 0
    elif mask.sum() > MOST_SOLVED:
        half = fill(*_halved(pixels, mask))
        height, width = half.shape
        guess = Image.fromarray(half).resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
        # `_halved` has padded odd sides, so the guess may be a pixel larger than the image.
        filled[mask] = np.asarray(guess)[: mask.shape[0], : mask.shape[1]][mask]
    else:
        filled[mask] = np.rint(_solve_laplace(pixels, mask))
    return filled


def _halved(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Halve an image to the means of the known pixels of each 2 x 2; none known stays masked."""
    odd = [(0, side % 2) for side in mask.shape]
    known = ~np.pad(mask, odd, mode="edge")
    values = np.pad(pixels, odd, mode="edge") * known.astype(np.uint16)
    blocks = (known.shape[0] // 2, 2, known.shape[1] // 2, 2)
    count = known.reshape(blocks).sum((1, 3))
    total = values.reshape(blocks).sum((1, 3))
    return np.rint(total / np.maximum(count, 1)).astype(np.uint8), count == 0


def _solve_laplace(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the values of the pixels in the mask, in the order of `numpy.nonzero`."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import spsolve

    y, x = np.nonzero(mask)
    unknown = np.full(mask.shape, -1)  # number of a masked pixel among the unknowns
    unknown[mask] = np.arange(len(y))
    degree, known = np.zeros(len(y)), np.zeros(len(y))
    pairs = []
    for down, right in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        rows, columns = y + down, x + right
        there = (rows >= 0) & (rows < mask.shape[0]) & (columns >= 0) & (columns < mask.shape[1])
        own, rows, columns = np.flatnonzero(there), rows[there], columns[there]
        # At the image's edge a pixel is the mean of those neighbours that exist.
        degree[own] += 1
        other = unknown[rows, columns]
        outer = other < 0
        known[own[outer]] += pixels[rows[outer], columns[outer]]
        pairs.append(np.stack([own[~outer], other[~outer]]))
    both = np.concatenate(pairs, axis=1)
    neighbours = coo_matrix((np.ones(both.shape[1]), both), shape=(len(y), len(y)))
    laplacian = (diags(degree) - neighbours).tocsc()
    # For symmetric matrices: a tenth faster than the default, with 20,000 and 50,000 unknowns.
    values: NDArray[np.float64] = spsolve(laplacian, known, permc_spec="MMD_AT_PLUS_A")
    return values
