"""Boxes of the originals in the squares of the shards."""

import numpy as np
import pytest
from support import make_images

from cxrdist.config import PackConfig
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.square_boxes import boxes_in_squares
from cxrdist.errors import CxrdistError


@pytest.fixture
def shards(tmp_path):
    """Images of 56 x 48 px, cropped and scaled to 24 px."""
    images = make_images(tmp_path / "images", {"a": 6, "b": 6})
    settings = {"size": 24, "split": "0.5/0.2/0.3", "patient_pattern": r"^(\w+)_", "workers": 1}
    pack(PackConfig("folder", images, tmp_path / "shards", **settings))
    return tmp_path / "shards"


def test_boxes_reach_the_squares_of_cropped_images(shards, tmp_path):
    """The crop takes 4 px on the left and a scale of a half what is left; of these samples only."""
    index, boxes = read_index(shards), tmp_path / "boxes.csv"
    given = {sample.path: [Box(10, 6, 20, 8)] for sample in index.samples[::2]}
    given[index.samples[0].path] += [Box(0, 0, 3, 40)]  # of what the crop takes away
    write_boxes(boxes, given)
    numbers = np.arange(5)
    found = boxes_in_squares(index, numbers, boxes, "--boxes")
    assert sorted(found) == [0, 2, 4]
    for (box,) in found.values():
        assert box[:4] == pytest.approx((3, 3, 10, 4))


def test_a_table_of_other_images_is_refused(shards, tmp_path):
    """The line names the option that the user gave."""
    write_boxes(tmp_path / "boxes.csv", {"other.png": [Box(1, 1, 2, 2)]})
    with pytest.raises(
        CxrdistError, match=r"--text-boxes .*boxes\.csv: has no image of the shards"
    ):
        boxes_in_squares(read_index(shards), np.arange(3), tmp_path / "boxes.csv", "--text-boxes")
