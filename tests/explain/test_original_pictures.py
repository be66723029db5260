"""Pictures of relevance as files."""

import numpy as np
import pytest
from PIL import Image

from cxrdist.errors import CxrdistError
from cxrdist.explain.heatmap import overlay
from cxrdist.explain.pictures import picture_names, safe_name, write_pictures


def test_class_names_make_safe_file_names():
    """A slash leads to no other folder, a long name still fits, and no two classes share a file."""
    assert picture_names("key", ["Viral Pneumonia"]) == ["key.png", "key.Viral Pneumonia.png"]
    assert safe_name("../a/b").startswith("..-a-b-")
    assert "/" not in safe_name("../a/b")
    assert safe_name("a/b") != safe_name("a:b") != safe_name("a-b")
    long = picture_names("key", ["\u80ba" * 200 + end for end in "ab"])
    assert len({*long}) == 3
    assert max(len(name.encode()) for name in long) < 120


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1000, 333)])
def test_a_map_lies_over_the_original_where_its_square_was_taken(fit, size):
    """A spot of relevance is red around the pixel that it came from, by the geometry of the fit."""
    width, height = size
    side = {"crop": min(size), "pad": max(size)}.get(fit)
    relevance = np.zeros((64, 64), np.float32)
    relevance[32:36, 24:28] = 1  # its centre: 26 of 64 across, 34 of 64 down, the square's px
    picture = np.asarray(overlay(np.zeros((height, width), np.uint8), relevance, fit=fit))
    assert picture.shape == (height, width, 3)
    red = np.argwhere(picture[..., 0] > 80)
    across, down = (side / 64, side / 64) if side else (width / 64, height / 64)
    left, top = ((width - side) / 2, (height - side) / 2) if side else (0, 0)
    expected = (top + 34 * down, left + 26 * across)
    whole_px_of_the_square = max(across, down) / 2 if fit == "pad" else 0
    np.testing.assert_allclose(red.mean(0) + 0.5, expected, atol=1 + whole_px_of_the_square)
    extent = red.max(0) + 1 - red.min(0)
    np.testing.assert_allclose(extent, (8 * down, 8 * across), rtol=0.2)


def test_beside_a_cropped_square_the_original_stays_grey():
    """Relevance everywhere colours the centre square only, and pad colours all of the original."""
    original = np.full((100, 180), 90, np.uint8)
    relevance = np.ones((50, 50), np.float32)
    cropped = np.asarray(overlay(original, relevance, fit="crop")).astype(int)
    assert (cropped[:, :40] == 90).all()
    assert (cropped[:, 140:] == 90).all()
    assert (cropped[:, 40:140, 0] > 180).all()
    assert (np.asarray(overlay(original, relevance, fit="pad"))[..., 0] > 180).all()


def test_an_unknown_fit_is_refused():
    """The map would lie in the wrong place."""
    with pytest.raises(CxrdistError, match="fit is 'centre': expected crop, pad or stretch"):
        overlay(np.zeros((80, 60), np.uint8), np.ones((32, 32), np.float32), fit="centre")


def test_a_square_original_gives_the_picture_of_its_square():
    """The same size and colours: placing a map back changes nothing where nothing is to be done."""
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (64, 64), dtype=np.uint8)
    relevance = random.normal(size=(64, 64))
    for fit in ("crop", "pad", "stretch"):
        placed = np.asarray(overlay(image, relevance, fit=fit)).astype(int)
        assert abs(placed - np.asarray(overlay(image, relevance))).max() <= 1


def test_pictures_of_an_original_have_its_size(tmp_path):
    """KEY.png is the X-ray, KEY.CLASS.png the map over it."""
    original, relevance = np.zeros((40, 60), np.uint8), np.ones((2, 32, 32), np.float32)
    write_pictures(tmp_path, "k", original, relevance, ["a", "b c"], "pad")
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes == dict.fromkeys(("k.png", "k.a.png", "k.b c.png"), (60, 40))
