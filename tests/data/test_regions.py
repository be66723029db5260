"""Regions of a square, by their areas and places."""

import numpy as np
import pytest

from cxrdist.data.regions import border, corners, read_regions, thorax
from cxrdist.errors import CxrdistError


def test_the_border_is_the_outer_tenth():
    """Of 100 px ten on each side; what is left is 80 x 80."""
    found = border(100)
    assert not found[10:90, 10:90].any()
    assert (~found).sum() == 80 * 80


def test_the_corners_are_four_squares():
    """Of 100 px 20 x 20 each."""
    found = corners(100)
    assert found.sum() == 4 * 20 * 20
    for part in (found, found[::-1], found[:, ::-1], found[::-1, ::-1]):
        assert part[:20, :20].all()


def test_the_thorax_is_an_ellipse():
    """Its area is pi a b; it is as wide as it is said to be, and no corner is in it."""
    found = thorax(400)
    np.testing.assert_allclose(found.mean(), np.pi * 0.49 * 0.48, atol=1e-3)
    assert found.any(axis=0).sum() == pytest.approx(2 * 0.49 * 400, abs=2)
    assert not (found & corners(400)[:, ::-1])[:40, :40].any()


@pytest.mark.parametrize("text", ["lungs", "", "text,text", "border,,thorax"])
def test_unknown_regions_are_refused(text):
    """The line names what there is."""
    with pytest.raises(CxrdistError, match="expected some of masks, text, border, thorax"):
        read_regions(text)


def test_regions_are_read_in_one_order():
    """However they are written."""
    assert read_regions("border, masks") == ("masks", "border")
