"""What may be read of each image, by pixels counted by hand."""

import numpy as np

from cxrdist.data.boxes import Box
from cxrdist.data.foreground import foreground_of
from cxrdist.data.regions import border, thorax

SIZE_PX = 20


def masks_of(*lungs: np.ndarray) -> np.ndarray:
    """As `open_masks` gives them."""
    return np.stack([np.packbits(mask) for mask in lungs])


def lungs() -> np.ndarray:
    mask = np.zeros((SIZE_PX, SIZE_PX), bool)
    mask[4:16, 3:9] = True
    return mask


NOTHING = np.zeros((SIZE_PX, SIZE_PX), bool)


def test_outside_the_mask_is_background_and_without_a_mask_nothing_is():
    """A row of zeros, which an image without a mask has, leaves all of it to be read."""
    found = foreground_of(["masks"], SIZE_PX, masks_of(lungs(), NOTHING), {})
    squares = found[np.array([1, 0, 1])]
    assert squares.dtype == np.uint8
    np.testing.assert_array_equal(squares[1], np.where(lungs(), 255, 0))
    assert (squares[[0, 2]] == 255).all()
    assert found.has_background(np.array([1, 0])).tolist() == [False, True]


def test_a_mask_of_everything_leaves_no_background():
    """Of 21 px a row of masks has 441 bits and 7 more, which count for nothing."""
    masks = masks_of(*(np.full((21, 21), value) for value in (True, False)), np.eye(21, dtype=bool))
    foreground = foreground_of(["masks"], 21, masks, {})
    numbers = np.arange(3)
    assert [(square == 255).all() for square in foreground[numbers]] == [True, True, False]
    assert foreground.has_background(numbers).tolist() == [False, False, True]


def test_text_is_background_in_its_boxes_only():
    """Pixels partly inside count; images without text have no background."""
    found = foreground_of(["text"], SIZE_PX, None, {3: [Box(1.5, 2, 4, 3)]})
    squares = found[np.array([3, 4])]
    expected = np.full((SIZE_PX, SIZE_PX), 255)
    expected[2:5, 1:6] = 0
    np.testing.assert_array_equal(squares[0], expected)
    assert (squares[1] == 255).all()
    assert found.has_background(np.array([3, 4])).tolist() == [True, False]


def test_regions_add_up():
    """What may be read is what is in none of them."""
    boxes = {0: [Box(4, 5, 3, 3)]}
    regions = ("masks", "text", "border", "thorax")
    (square,) = foreground_of(regions, SIZE_PX, masks_of(lungs()), boxes)[np.array([0])]
    expected = lungs() & thorax(SIZE_PX) & ~border(SIZE_PX)
    expected[5:8, 4:7] = False
    np.testing.assert_array_equal(square == 255, expected)
    assert 0 < expected.sum() < lungs().sum()


def test_regions_that_a_stage_does_not_name_do_not_count():
    """Masks and boxes may be open for another stage; each image has a border."""
    boxes = {0: [Box(4, 5, 3, 3)]}
    found = foreground_of(["border"], SIZE_PX, masks_of(lungs()), boxes)
    np.testing.assert_array_equal(found[np.array([0])][0] == 0, border(SIZE_PX))
    assert found.has_background(np.array([0])).all()
