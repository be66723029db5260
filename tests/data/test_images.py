import numpy as np
import pytest
from PIL import Image

from cxrdist.data.images import decode_png, encode_png, read_square
from cxrdist.errors import CxrdistError


def smooth(width: int = 96, height: int = 96) -> np.ndarray:
    """A picture whose four corners differ, uint8 [height, width]."""
    y, x = np.mgrid[0:height, 0:width]
    return (200 * x / width + 50 * y / height).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_every_mode_gives_the_same_grey_square(tmp_path, mode, suffix):
    """The same picture in any mode of the wild comes out as the same grey values."""
    pixels = smooth()
    if suffix == "jpg" and mode not in ("L", "RGB"):
        pytest.skip("JPEG has no such mode")
    if mode == "I;16":
        image = Image.fromarray(pixels.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    file = tmp_path / f"image.{suffix}"
    image.save(file, **({"quality": 95} if suffix == "jpg" else {}))
    square = read_square(file, 48, "crop")
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR))
    assert square.shape == (48, 48)
    assert square.dtype == np.uint8
    assert np.abs(square.astype(int) - expected).max() <= 2


def test_twelve_bit_images_are_not_black(tmp_path):
    """16-bit files are scaled by the depth that they use: 4095 of a 12-bit detector is white."""
    pixels = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    square = read_square(tmp_path / "image.png", 64, "stretch")
    assert square.min() == 0
    assert square.max() == 255


def test_transparent_is_black(tmp_path):
    """Where an image is transparent nothing was exposed."""
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.save(tmp_path / "image.png")
    assert read_square(tmp_path / "image.png", 16, "crop").max() == 0


def test_a_transparent_grey_level_is_black(tmp_path):
    """A grey PNG can declare one level as transparent (tRNS; ISO 15948, section 11.3.2)."""
    image = Image.fromarray(np.repeat([[255, 90]], 16, axis=0).repeat(8, axis=1).astype(np.uint8))
    image.save(tmp_path / "image.png", transparency=255)
    square = read_square(tmp_path / "image.png", 16, "crop")
    assert np.unique(square).tolist() == [0, 90]


def test_an_exif_turn_is_applied(tmp_path):
    """A JPEG that says it lies on its side is put upright."""
    image = Image.fromarray(smooth())
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 270 degrees to see it upright
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    square = read_square(tmp_path / "turned.jpg", 96, "crop")
    assert np.abs(square.astype(int) - np.asarray(upright)).max() <= 3


def test_fits_crop_pad_and_stretch(tmp_path):
    """Crop keeps the centre, pad the whole on black, stretch the whole."""
    pixels = np.full((40, 80), 200, np.uint8)
    pixels[:, :20] = pixels[:, 60:] = 100
    Image.fromarray(pixels).save(tmp_path / "image.png")
    crop, pad, stretch = (
        read_square(tmp_path / "image.png", 40, fit) for fit in ("crop", "pad", "stretch")
    )
    assert (crop == 200).all()
    assert (pad[:10] == 0).all()
    assert (pad[30:] == 0).all()
    assert pad[20, 5] == 100
    assert (stretch[:, :9] == 100).all()
    assert (stretch[:, 12:28] == 200).all()


def test_shrinking_is_anti_aliased(tmp_path):
    """A fine chequerboard becomes grey, not a pattern of its own."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "image.png")
    square = read_square(tmp_path / "image.png", 32, "crop")
    assert np.abs(square.astype(int) - 127).max() <= 3


def test_png_is_lossless():
    """What is packed is what was made."""
    pixels = np.random.default_rng(0).integers(0, 256, (17, 17), dtype=np.uint8)
    assert np.array_equal(decode_png(encode_png(pixels)), pixels)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "bomb"])
def test_unreadable_files_are_named(tmp_path, damage):
    """What is no image, or only half of one, is an error with the file's name."""
    file = tmp_path / "bad.png"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    if damage == "cut":
        image.save(file)
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "text":
        file.write_text("this is no image")
    elif damage == "empty":
        file.touch()
    else:
        Image.new("1", (12_000, 12_000)).save(file)
    with pytest.raises(CxrdistError, match=r"bad\.png: is not a readable (PNG|image) \("):
        read_square(file, 32, "crop")
