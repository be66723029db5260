"""Boxes and masks of the originals in the squares of samples, and what is left out."""

import numpy as np
import pytest
from PIL import Image
from support import make_shards

from cxrdist.data.index import read_index
from cxrdist.data.outlines import (
    OUTSIDE,
    STRANGE,
    UNKNOWN,
    boxes_of_table,
    masks_of_files,
)
from cxrdist.data.shards import describe_samples
from cxrdist.errors import CxrdistError

HEADER = "image,label,x,y,width,height\n"


def _originals(index):
    """The KEY.json of all samples."""
    return dict(describe_samples(index.packed(), range(len(index.samples))))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Shards at 32 px of originals of 56 x 48 px, the centre cropped, and their masks."""
    folder = tmp_path_factory.mktemp("outlines")
    index = read_index(make_shards(folder, {"a": 8, "b": 8}, masks=True))
    return folder, index, _originals(index)


def test_a_box_of_the_original_is_found_in_the_square(packed, tmp_path):
    """Cropping takes 4 px on each side of 56; 48 px become 32: x (16 - 4) * 2 / 3 = 8."""
    _, index, originals = packed
    sample = index.samples[0]
    (tmp_path / "b.csv").write_text(f"{HEADER}{sample.path},a,16,12,12,24\n")
    found = boxes_of_table(index, originals, tmp_path / "b.csv")
    expected = np.zeros((32, 32), bool)
    expected[8:24, 8:16] = True
    assert found.shapes == {(0, "a"): 1}
    np.testing.assert_array_equal(found.read((0, "a")), expected)


def test_what_is_not_used_is_counted(packed, tmp_path):
    """A box beside the crop, one of an unknown label, and one of a strange image."""
    _, index, originals = packed
    name = index.samples[0].path
    rows = [f"{name},a,0,0,3,9", f"{name},z,9,9,9,9", "no.png,a,9,9,9,9", f"{name},b,9,9,9,9"]
    (tmp_path / "b.csv").write_text(HEADER + "\n".join(rows))
    found = boxes_of_table(index, originals, tmp_path / "b.csv")
    assert found.left_out == {OUTSIDE: 1, UNKNOWN: 1, STRANGE: 1}
    assert found.shapes == {(0, "b"): 1}


def test_boxes_of_the_nih_are_scaled_from_their_squares(tmp_path):
    """In px of 1024; on a copy of 64 px a box of 512 px is half of the image."""
    folder = tmp_path / "images" / "Mass"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:08d}_000.png")
    from cxrdist.config import PackConfig
    from cxrdist.data.pack import pack

    other = tmp_path / "images" / "None"
    other.mkdir()
    for i in range(12, 24):
        pixels = random.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(other / f"{i:08d}_000.png")
    pack(PackConfig("folder", tmp_path / "images", tmp_path / "s", size=32, workers=1))
    index = read_index(tmp_path / "s")
    table = tmp_path / "BBox_List_2017.csv"
    table.write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000003_000.png,Mass,0,0,512,1024\n"
    )
    found = boxes_of_table(index, _originals(index), table)
    ((case, _),) = found.shapes.items()
    assert index.samples[case[0]].path == "Mass/00000003_000.png"
    expected = np.zeros((32, 32), bool)
    expected[:, :16] = True
    np.testing.assert_array_equal(found.read(case), expected)


def test_masks_of_files_are_those_that_pack_takes(packed):
    """The same pixels as in the shards, for the label of each image."""
    folder, index, originals = packed
    found = masks_of_files(index, originals, folder / "masks")
    held = {i for i, sample in enumerate(index.samples) if sample.mask_sha256}
    assert {number for number, _ in found.shapes} == held
    from cxrdist.data.shards import open_shard

    for shard in index.packed():
        with open_shard(shard) as opened:
            for i, sample in enumerate(shard.samples):
                if sample.mask_sha256:
                    mask = found.read((shard.first + i, sample.label))
                    np.testing.assert_array_equal(mask, opened.read_mask(i) > 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,label,x,y,width\n", "has no column 'height'"),
        (f"{HEADER}other.png,a,1,1,2,2\n", "has no image of the shards"),
        (f"{HEADER}x.png,a,1,1,0,2\n", "is not a valid box"),
    ],
)
def test_bad_tables_are_refused(packed, tmp_path, text, said):
    """Missing columns, images of another set, and boxes without a size."""
    _, index, originals = packed
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(CxrdistError, match=said):
        boxes_of_table(index, originals, tmp_path / "b.csv")
