import numpy as np
import pytest
from PIL import Image

from cxrdist.data.boxes import (
    MOST_SOLVED,
    Box,
    _solve_laplace,
    cover,
    fill,
    inside,
    read_boxes,
    write_boxes,
)
from cxrdist.data.geometry import in_square, scaled
from cxrdist.data.images import decode
from cxrdist.errors import CxrdistError


def smooth(height, width):
    """A grey ramp that no box is brighter than."""
    y, x = np.mgrid[:height, :width]
    return (40 + 50 * x / width + 50 * y / height).astype(np.uint8)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (256, 256)])
def test_a_box_lies_in_the_square_where_its_pixels_do(tmp_path, fit, size):
    """White written into a box of the original is white in the square's box, and only there."""
    width, height = size
    box = Box(width * 0.45, height * 0.4, 40, 30)
    pixels = smooth(height, width)
    pixels[inside([box], height, width)] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    square = decode(tmp_path / "image.png", 96, fit).pixels
    there = in_square(box, width, height, 96, fit)
    white = square > 200
    assert white.sum() == pytest.approx(there.width * there.height, rel=0.2)
    assert inside([there], 96, 96)[white].all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_text_is_covered_where_it_is_shown(tmp_path, suffix, turn):
    """A box covers the text of the image as a viewer shows it, also of a turned or large JPEG."""
    shown = smooth(1600, 1200)
    box = Box(300, 400, 240, 120, "R")
    shown[inside([box], *shown.shape)] = 255
    turned = Image.fromarray(shown)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    back[8] = Image.Transpose.ROTATE_270
    if turn in back:
        turned = turned.transpose(back[turn])
    exif = turned.getexif()
    exif[0x0112] = turn
    turned.save(tmp_path / f"image.{suffix}", exif=exif)
    decoded = decode(tmp_path / f"image.{suffix}", 200, "stretch", [box], "fill")
    assert (decoded.width_px, decoded.height_px) == (1200, 1600)
    assert decoded.pixels.max() > 230
    assert decoded.covered.max() < 150
    assert decode(tmp_path / f"image.{suffix}", 200, "stretch").covered is None


def test_only_the_boxes_are_changed():
    """Black is black in all pixels of the boxes, filling changes them alone, a copy is made."""
    pixels = np.random.default_rng(0).integers(1, 255, (60, 80), np.uint8)
    before = pixels.copy()
    boxes = [Box(5.5, 6.2, 20, 10), Box(20, 10, 30, 12), Box(70, 50, 40, 40), Box(-9, -9, 5, 5)]
    mask = inside(boxes, 60, 80)
    assert mask[6, 5]
    assert mask[16, 25]
    assert not mask[17, 6]
    for how in ("black", "fill"):
        covered = cover(pixels, boxes, how)
        assert (covered[~mask] == pixels[~mask]).all()
    assert (cover(pixels, boxes, "black")[mask] == 0).all()
    assert (pixels == before).all()


@pytest.mark.parametrize("end", range(5, 41, 5))
def test_a_scaled_box_that_ends_between_two_pixels_covers_none_beyond(end):
    """In whole numbers: scaled by 0.8, every fifth edge of 40 px lies between two of 32 px."""
    for start in range(end):
        box = scaled(Box(start, start, end - start, end - start), 0.8, 0.8)
        covered = np.flatnonzero(inside([box], 40, 40).any(axis=0))
        assert [covered[0], covered[-1]] == [4 * start // 5, 4 * end // 5 - 1]


def test_a_filling_leaves_no_edge():
    """A plane is continued exactly, from any side; values stay between those around."""
    y, x = np.mgrid[:40, :50]
    plane = (2 * x + 3 * y).astype(np.uint8)
    mask = inside([Box(10, 10, 12, 9), Box(18, 15, 12, 9)], 40, 50)
    written = np.where(mask, 255, plane).astype(np.uint8)
    assert (fill(written, mask) == plane).all()
    corner = inside([Box(0, 0, 8, 8)], 40, 50)
    filled = fill(np.where(corner, 255, plane).astype(np.uint8), corner)
    assert filled[corner].max() <= plane[:9, :9].max()
    assert (fill(plane, np.ones_like(mask)) == 0).all()


def test_a_large_filling_is_as_smooth():
    """A part that is too large to be solved at once is continued within two grey levels."""
    y, x = np.mgrid[:301, :403]
    ramp = (20 + x / 4 + y / 3).astype(np.uint8)
    mask = inside([Box(0, 30, 350, 201)], 301, 403)
    assert mask.sum() > MOST_SOLVED
    filled = fill(np.where(mask, 255, ramp).astype(np.uint8), mask)
    assert (filled[~mask] == ramp[~mask]).all()
    exact = np.rint(_solve_laplace(ramp, mask))
    assert np.abs(filled[mask] - exact).max() <= 2


def test_the_table_can_be_edited(tmp_path):
    """What is written is read; a spreadsheet's mark, other columns and missing ones do no harm.

    A box without a score was drawn by a person and is certain.
    """
    file = tmp_path / "boxes.csv"
    boxes = {"b/2.png": [Box(1, 2, 3, 4, 'a "b", c', 0.5)], "a.png": [Box(0, 0, 9.5, 1)]}
    write_boxes(file, boxes)
    assert "a.png,0,0,9.5,1,,1.000" in file.read_text().splitlines()
    assert read_boxes(file) == {path: tuple(found) for path, found in boxes.items()}
    file.write_text("\ufeffnote,path,height,width,y,x\nmine,a.png,4,3,2,1\n", encoding="utf-8")
    assert read_boxes(file) == {"a.png": (Box(1, 2, 3, 4),)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,x,y,width\na,1,2,3\n", "no column 'height'"),
        ("path,x,y,width,height\na,1,2,3,4\nb,1,2,x,4\n", "row 3: .*expected numbers"),
        ("path,x,y,width,height\na,1,2,,4\n", "row 2: .*expected numbers"),
        ("path,x,y,width,height\na,1,2,0,4\n", "row 2: 0 x 4 px at 1, 2 is not a valid box"),
        ("path,x,y,width,height\na,1,nan,3,4\n", "row 2: .* is not a valid box"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_table_is_named_with_its_row(tmp_path, text, said):
    """What is no box is refused with file and row."""
    if text is not None:
        (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(CxrdistError, match=f"boxes.csv.*{said}"):
        read_boxes(tmp_path / "boxes.csv")
