import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cxrdist.errors import CxrdistError
from cxrdist.explain.heatmap import MAX_OPACITY, colour_limit, overlay, smooth


def block(value: float, size: int = 64) -> NDArray[np.float32]:
    """A map that is zero but for a square of ``value`` in its middle."""
    relevance = np.zeros((size, size), np.float32)
    relevance[24:40, 24:40] = value
    return relevance


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_map_of_zeros_gives_the_plain_image(level):
    """Nothing is tinted where there is no relevance, with any limit."""
    image = np.full((64, 64), level, np.uint8)
    for limit in (None, 1.0):
        picture = overlay(image, np.zeros((64, 64), np.float32), limit)
        assert picture.mode == "RGB"
        assert (np.asarray(picture) == level).all()


@pytest.mark.parametrize("level", [0, 128, 255])
def test_red_is_for_and_blue_is_against(level):
    """On black, grey and white, the colour shows the sign, and the rest stays grey."""
    image = np.full((64, 64), level, np.uint8)
    for sign, strong, weak in ((1, 0, 2), (-1, 2, 0)):
        picture = np.asarray(overlay(image, sign * block(1))).astype(int)
        assert picture[32, 32, strong] - picture[32, 32, weak] > 120
        assert abs(picture[32, 32] - level).max() > 90
        assert (picture[:16] == level).all()


def test_scale_is_symmetric_and_clipped():
    """Half the relevance has half the opacity, with either sign; the limit is the strongest."""
    image = np.zeros((64, 64), np.uint8)

    def colour(value: float) -> NDArray[np.float64]:
        return np.asarray(overlay(image, block(value), limit=2.0))[32, 32].astype(float)

    for sign in (1, -1):
        np.testing.assert_allclose(colour(sign), colour(2 * sign) / 2, atol=1)
        np.testing.assert_array_equal(colour(9 * sign), colour(2 * sign))
    np.testing.assert_allclose(colour(2), np.array([225, 15, 25]) * MAX_OPACITY, atol=1)


def test_a_few_pixels_do_not_dim_the_rest():
    """The default limit ignores an outlier, and takes the maximum of a nearly empty map."""
    relevance = block(1)
    assert colour_limit(relevance) == pytest.approx(1)
    relevance[2, 2] = 1000
    assert colour_limit(relevance) < 2
    lonely = np.zeros((64, 64), np.float32)
    lonely[32, 32] = 1
    assert colour_limit(lonely) == smooth(lonely).max() > 0
    assert colour_limit(np.zeros((64, 64), np.float32)) == 1


def test_grids_of_the_first_layers_disappear():
    """Uniform relevance behind a 7x7/2 convolution and a 3x3/2 pool is drawn uniform."""
    ones = torch.ones(1, 1, 7, 7)
    stride_2 = torch.nn.functional.conv_transpose2d(torch.ones(1, 1, 40, 40), ones, stride=2)
    every_fourth = torch.zeros(1, 1, 40, 40)
    every_fourth[:, :, ::2, ::2] = 1
    stride_4 = torch.nn.functional.conv_transpose2d(every_fourth, ones, stride=2)
    for grid in (stride_2, stride_4):
        raw = grid[0, 0, 16:64, 16:64].numpy()
        assert raw.max() / raw.min() > 1.7
        shown = smooth(raw)[2:-2, 2:-2]
        assert shown.max() / shown.min() == pytest.approx(1, abs=1e-12)


def test_smoothing_shifts_nothing():
    """A spot stays where it is and keeps its sum; a flat map stays the same up to the border."""
    spot = np.zeros((32, 32))
    spot[10, 20] = 3
    shown = smooth(spot)
    assert shown.sum() == pytest.approx(3)
    assert np.argwhere(shown > 0).mean(0).tolist() == [10, 20]
    np.testing.assert_allclose(smooth(spot.T), shown.T)
    np.testing.assert_allclose(smooth(np.full((32, 32), 0.7)), 0.7)


@pytest.mark.parametrize(
    ("relevance", "limit", "message"),
    [
        (np.zeros((64, 32)), None, "shape"),
        (np.full((64, 64), np.nan), None, "not finite"),
        (np.full((64, 64), np.inf), 1.0, "not finite"),
        (np.zeros((64, 64)), 0.0, "limit"),
        (np.zeros((64, 64)), -1.0, "limit"),
        (np.zeros((64, 64)), np.nan, "limit"),
    ],
)
def test_what_cannot_be_drawn_is_refused(relevance, limit, message):
    """Shapes that differ, values that are not finite and limits that are no scale are refused."""
    with pytest.raises(CxrdistError, match=message):
        overlay(np.zeros((64, 64), np.uint8), relevance, limit)
