import numpy as np
import pytest
from PIL import Image

from cxrdist.data.findings import Finding
from cxrdist.data.geometry import clipped, in_square
from cxrdist.data.images import decode
from cxrdist.data.masks import MaskPlace

SIZE_PX = 96
# As shown; the last two are drafted to a half and to a quarter when they are JPEGs.
SIZES = [(300, 200), (200, 300), (256, 256), (149, 503), (803, 601), (1001, 1333)]
BACK = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def cross(width, height) -> np.ndarray:
    """A white cross on black, uint8 [height, width], off the centre and thick in the square."""
    pixels = np.zeros((height, width), np.uint8)
    bar = max(width, height) // 12
    left, top = int(0.4 * width), int(0.55 * height)
    pixels[top : top + bar, int(0.2 * width) : int(0.9 * width)] = 255
    pixels[int(0.1 * height) : int(0.8 * height), left : left + bar] = 255
    return pixels


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels around it, bool."""
    wide = np.pad(mask, 1)
    height, width = mask.shape
    shifts = [wide[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(shifts)


def at_most_a_pixel_apart(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether each pixel of either mask is in the other one or beside it."""
    return bool(one.any()) and not (one & ~grown(other)).any() and not (other & ~grown(one)).any()


def write_turned(shown: np.ndarray, file, turn: int) -> None:
    """Store an image on its side, with the EXIF tag that turns it back."""
    image = Image.fromarray(shown)
    if turn in BACK:
        image = image.transpose(BACK[turn])
    exif = image.getexif()
    exif[0x0112] = turn
    image.save(file, exif=exif, **({"quality": 95} if file.suffix == ".jpg" else {}))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("suffix", "turn"), [("png", 1), ("jpg", 1), ("jpg", 6), ("png", 8)])
def test_a_mask_covers_what_is_drawn_into_its_image(tmp_path, fit, size, suffix, turn):
    """A cross in both is at most a pixel apart in the square; of 0 and 255 alone."""
    drawn = cross(*size)
    write_turned(drawn, tmp_path / f"image.{suffix}", turn)
    Image.fromarray(drawn > 0).save(tmp_path / "mask.png")
    place = MaskPlace(tmp_path / "mask.png")
    decoded = decode(tmp_path / f"image.{suffix}", SIZE_PX, fit, mask=place)
    assert (decoded.width_px, decoded.height_px) == size
    assert set(np.unique(decoded.mask)) == {0, 255}
    assert at_most_a_pixel_apart(decoded.mask > 0, decoded.pixels >= 128)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(513, 513), (515, 771), (1001, 521)])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_jpeg_that_is_decoded_at_a_fraction_is_not_shifted(tmp_path, fit, size, turn):
    """Decoded at an eighth, 513 px become 65, which would be 520: half a pixel of a square of 32.

    A ramp has the same levels as in a PNG, but for JPEG's own error: 8 levels are a pixel.
    """
    across = np.linspace(0, 127, size[0]) + np.linspace(0, 127, size[1])[:, None]
    ramp = np.round(across).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    write_turned(ramp, tmp_path / "ramp.jpg", turn)
    png, jpeg = (decode(tmp_path / f"ramp.{kind}", 32, fit).pixels for kind in ("png", "jpg"))
    assert np.abs(jpeg.astype(int) - png).max() <= 1


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(299, 299), (598, 403)])
def test_a_mask_of_another_size_is_scaled(tmp_path, fit, size):
    """As the masks of 256 px for images of 299 px of the COVID-19 Radiography Database."""
    drawn = Image.fromarray(cross(*size))
    drawn.save(tmp_path / "image.png")
    small = drawn.resize((256, round(256 * size[1] / size[0])), Image.Resampling.BOX)
    small.point(lambda grey: 255 * (grey > 127)).save(tmp_path / "mask.png")
    decoded = decode(tmp_path / "image.png", SIZE_PX, fit, mask=MaskPlace(tmp_path / "mask.png"))
    assert at_most_a_pixel_apart(decoded.mask > 0, decoded.pixels >= 128)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("suffix", "turn"), [("png", 1), ("jpg", 8)])
def test_a_box_of_a_finding_lies_around_what_is_drawn(tmp_path, fit, size, suffix, turn):
    """Each edge is at most a pixel from the white rectangle's in the square."""
    width, height = size
    left, top, right, bottom = (
        int(x) for x in (0.4 * width, 0.45 * height, 0.6 * width, 0.58 * height)
    )
    shown = np.zeros((height, width), np.uint8)
    shown[top:bottom, left:right] = 255
    write_turned(shown, tmp_path / f"image.{suffix}", turn)
    square = decode(tmp_path / f"image.{suffix}", SIZE_PX, fit).pixels >= 128
    rows, columns = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
    finding = Finding("Mass", left, top, right - left, bottom - top, "R1")
    box = in_square(finding, width, height, SIZE_PX, fit)
    edges = (box.x, box.y, box.x + box.width, box.y + box.height)
    seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert np.abs(np.subtract(edges, seen)).max() <= 1
    assert (box.label, box.reader) == ("Mass", "R1")


def test_a_box_is_cut_at_the_edge_of_the_square():
    """Of 300 x 200 px the crop has columns 50 to 250; what is outside is cut, or gone."""
    half = in_square(Finding("a", 40, 0, 20, 50), 300, 200, 100, "crop")
    assert clipped(half, 100) == Finding("a", 0, 0, 5, 25)
    assert clipped(in_square(Finding("a", 10, 20, 40, 30), 300, 200, 100, "crop"), 100) is None
    whole = in_square(Finding("a", 0, 0, 300, 200), 300, 200, 90, "pad")
    assert clipped(whole, 90) == Finding("a", 0, 15, 90, 60)
