import re

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image

from cxrdist.data.images import decode
from cxrdist.data.masks import MaskPlace, describe_masks, masks_line, read_mask
from cxrdist.errors import CxrdistError

DISC = np.hypot(*np.mgrid[-32:32, -40:40]) < 20  # bool [64, 80]


def read(file):
    return read_mask(MaskPlace(file), 80, 64)


def as_labels():
    """1 in the lungs, as segmentation programs write it; nearly black to the eye."""
    return Image.fromarray(DISC.astype(np.uint8))


def as_colour():
    """Red on transparent."""
    picture = np.zeros((64, 80, 4), np.uint8)
    picture[DISC] = (255, 0, 0, 255)
    return Image.fromarray(picture)


def as_deep():
    return Image.fromarray(DISC.astype(np.uint16) * 65535)


KINDS = {
    "mask.png": lambda: Image.fromarray(DISC),  # 1 bit
    "labels.png": as_labels,
    "colour.png": as_colour,
    "deep.png": as_deep,
    "mask.bmp": lambda: Image.fromarray(DISC.astype(np.uint8) * 255),
    "palette.gif": lambda: as_labels().convert("P"),
    "mask.tif": lambda: Image.fromarray(DISC.astype(np.uint8) * 255),
}


@pytest.mark.parametrize("name", KINDS)
def test_two_levels_of_any_picture_are_a_mask(tmp_path, name):
    """Black and anything else: exactly the pixels that were drawn."""
    picture = KINDS[name]()
    if name.endswith(".gif"):
        picture.putpalette([0, 0, 0, 90, 200, 30])
    picture.save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name), DISC * np.uint8(255))


def test_a_soft_edge_is_cut_at_half(tmp_path):
    """A JPEG, and a mask that was scaled with a filter: wrong at the outline at most."""
    grey = Image.fromarray(DISC.astype(np.uint8) * 255)
    grey.save(tmp_path / "mask.jpg", quality=90)
    large = grey.resize((160, 128), Image.Resampling.BILINEAR)
    large.resize((80, 64), Image.Resampling.BILINEAR).save(tmp_path / "soft.png")
    for name in ("mask.jpg", "soft.png"):
        mask = read(tmp_path / name)
        assert set(np.unique(mask)) == {0, 255}
        assert np.mean((mask > 0) != DISC) < 0.01


def test_a_mask_of_greys_is_one_from_half_of_white_on(tmp_path):
    """Half of white, 128 of 255, is covered; a picture that stays below it is too dark to tell."""
    grey = np.zeros((64, 80), np.uint8)
    grey[:8, :8], grey[8:16, :8] = 20, 128
    Image.fromarray(grey).save(tmp_path / "mask.png")
    assert np.array_equal(read(tmp_path / "mask.png"), (grey == 128) * np.uint8(255))
    grey[grey == 128] = 127
    Image.fromarray(grey).save(tmp_path / "mask.png")
    with pytest.raises(CxrdistError, match="has 3 grey levels"):
        read(tmp_path / "mask.png")


@pytest.mark.parametrize(("grey", "share"), [(0, 0.0), (255, 1.0)])
def test_masks_of_nothing_and_of_everything_are_masks(tmp_path, grey, share):
    """They are kept, and said."""
    Image.new("L", (80, 64), grey).save(tmp_path / "mask.png")
    assert np.mean(read(tmp_path / "mask.png") > 0) == share
    line = masks_line(describe_masks([0.2, share, 0.4]), 5)
    assert line.startswith("masks: 3 images have one, 2 do not; they cover ")
    assert line.endswith("; 1 cover everything" if share else "; 1 cover nothing")


def xray(folder):
    """The image itself, as --masks IMAGES would give it."""
    ramp = np.linspace(0, 255, 80 * 64).reshape(64, 80).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "mask.png")


def organs(folder):
    """1, 2 and 3 for the left lung, the right lung and the heart."""
    labels = DISC.astype(np.uint8)
    labels[:20], labels[40:] = 2, 3
    Image.fromarray(labels).save(folder / "mask.png")


def turned(folder):
    Image.fromarray(DISC.T).save(folder / "mask.png")


def cut(folder):
    Image.fromarray(DISC[:, :72]).save(folder / "mask.png")


def dicom(folder):
    write_dicom(folder / "mask.dcm", DISC.astype(np.uint16), 12)
    (folder / "mask.dcm").rename(folder / "mask.png")


def text(folder):
    (folder / "mask.png").write_text("no mask")


def damaged(folder):
    Image.fromarray(DISC).save(folder / "mask.png")
    data = (folder / "mask.png").read_bytes()
    (folder / "mask.png").write_bytes(data[:60])


def huge(folder):
    Image.new("1", (8000, 6400)).save(folder / "mask.png")


REFUSED = {
    "an X-ray": (xray, "grey levels, .* between black and white; expected a mask of two levels"),
    "several organs": (organs, "has 4 grey levels, .*; expected a mask of two levels"),
    "turned": (
        turned,
        r"has 64 x 80 px, which is not the aspect ratio of the image \(80 x 64 px\)",
    ),
    "cut": (cut, r"has 72 x 64 px, which is not the aspect ratio"),
    "DICOM": (dicom, "is not a readable mask; expected a picture"),
    "text": (text, "is not a readable mask; expected a picture"),
    "damaged": (damaged, "is not a readable PNG"),
    "huge": (huge, "8000 x 6400 pixels, expected at most"),
    "missing": (lambda folder: None, "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mask_of_the_image_is_refused(tmp_path, case):
    """One line that names the image, which may be a patient's, and not the mask's file."""
    make, problem = REFUSED[case]
    (tmp_path / "secret").mkdir()
    make(tmp_path / "secret")
    Image.new("L", (80, 64)).save(tmp_path / "image.png")
    place = MaskPlace(tmp_path / "secret" / "mask.png")
    with pytest.raises(CxrdistError, match=rf"image\.png: its mask: .*{problem}") as caught:
        decode(tmp_path / "image.png", 32, "crop", mask=place)
    assert not re.search(r"\n|secret", str(caught.value))


@pytest.mark.parametrize("size", [(79, 64), (81, 64), (161, 127), (40, 32), (27, 21)])
def test_a_size_that_was_rounded_is_of_the_same_shape(tmp_path, size):
    """A pixel more or less on either side is no other shape."""
    Image.fromarray(DISC).resize(size).save(tmp_path / "mask.png")
    assert read(tmp_path / "mask.png").shape == size[::-1]
