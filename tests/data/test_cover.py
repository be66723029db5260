"""Burned-in text covered by a pack."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from support import contents, make_images

from cxrdist.config import CheckConfig, PackConfig, SourceConfig
from cxrdist.data.boxes import Box, inside, write_boxes
from cxrdist.data.check import check
from cxrdist.data.fingerprint import shrink
from cxrdist.data.images import decode_png
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.shards import read_shard
from cxrdist.data.sources import read_source
from cxrdist.data.squares import plan_parts, read_part
from cxrdist.errors import CxrdistError

SIZE_PX = 48
WORD = Box(10, 4, 12, 6, "R")  # in images of 56 x 48 px, so 4 px more to the left in the squares


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Images of two classes with a white word on most of class a, and the table of its boxes."""
    folder = tmp_path_factory.mktemp("source")
    images = make_images(folder / "images", {"a": 24, "b": 24}, SIZE_PX)
    boxes = {}
    for file in sorted((images / "a").glob("*_0.png")):
        pixels = np.array(Image.open(file))
        pixels[inside([WORD], *pixels.shape)] = 255
        Image.fromarray(pixels).save(file)
        boxes[f"a/{file.name}"] = [WORD]
    write_boxes(folder / "boxes.csv", boxes)
    return folder


def pack_source(source, out, **options):
    settings = {"size": SIZE_PX, "split": "0.5/0.2/0.3", "patient_pattern": r"^(\w+)_"}
    settings |= {"workers": 1, **options}
    pack(PackConfig("folder", source / "images", out, **settings))
    return out


def squares(shards):
    """Pixels of all samples by path."""
    index, found = read_index(shards), {}
    for shard in index.packed():
        for sample, (pixels, _) in zip(shard.samples, read_shard(shard), strict=True):
            found[sample.path] = pixels
    return found


@pytest.mark.parametrize("how", ["black", "fill"])
def test_only_the_chosen_split_is_covered(source, tmp_path, how):
    """Test images lose the word and nothing else; splits, order and the other shards stay."""
    plain = pack_source(source, tmp_path / "plain")
    boxes = source / "boxes.csv"
    covered = pack_source(
        source, tmp_path / "covered", text_boxes=boxes, cover=how, cover_split="test"
    )
    before, after = squares(plain), squares(covered)
    samples = [[s._replace(sha256="") for s in read_index(d).samples] for d in (plain, covered)]
    assert samples[0] == samples[1]
    with open(boxes) as file:
        with_text = {row["path"] for row in csv.DictReader(file)}
    word = inside([WORD._replace(x=WORD.x - 4)], SIZE_PX, SIZE_PX)
    touched = 0
    for sample in read_index(covered).samples:
        old, new = before[sample.path], after[sample.path]
        assert (old[~word] == new[~word]).all()
        if sample.split == "test" and sample.path in with_text:
            assert (old[word] == 255).all()
            assert (new[word] == 0).all() if how == "black" else new[word].max() < 255
            touched += 1
        else:
            assert (old == new).all()
    assert touched > 0
    old_bytes, new_bytes = contents(plain), contents(covered)
    for name in ("train-000000.tar", "val-000000.tar"):
        assert old_bytes[name] == new_bytes[name]
    about = {"how": how, "split": "test", "images": touched, "boxes": touched}
    assert read_index(covered).cover == about
    assert read_index(plain).cover is None
    assert "cover" not in json.loads((plain / "index.json").read_text())
    check(CheckConfig(covered))


def test_thumbnails_are_of_the_squares_beside_them(source, tmp_path):
    """Those that workers keep for the audit, plain and covered, are what their PNGs would give."""
    pack_source(source, tmp_path / "s", text_boxes=source / "boxes.csv", task=0, num_tasks=1)
    directory = tmp_path / ".s.partial" / "squares"
    (part,) = plan_parts(read_source(SourceConfig("folder", source / "images")).records)
    squares = read_part(directory, part, redo_bad=False)
    covered = [square.cover() for square in squares if square.covered_bytes]
    assert len(covered) == 12
    for square in [*squares, *covered]:
        pixels = decode_png(square.png(directory))
        np.testing.assert_array_equal(square.thumbnail(directory), shrink(pixels))
    assert all(
        square.png(directory) not in {s.png(directory) for s in squares} for square in covered
    )


def test_the_bytes_do_not_depend_on_workers_or_tasks(source, tmp_path, monkeypatch):
    """Covered shards of one worker, of two, and of two tasks and a merge are the same bytes."""
    monkeypatch.setattr("cxrdist.data.squares.PART_SIZE", 16)
    options = {"text_boxes": source / "boxes.csv", "cover_split": "all"}
    one = contents(pack_source(source, tmp_path / "one", **options))
    assert contents(pack_source(source, tmp_path / "two", workers=2, **options)) == one
    for task in (0, 1):
        pack_source(source, tmp_path / "tasks", task=task, num_tasks=2, **options)
    assert contents(pack_source(source, tmp_path / "tasks", merge=True, **options)) == one
    assert read_index(tmp_path / "one").cover["images"] == 12


def test_a_pack_of_other_boxes_is_another_pack(source, tmp_path, capsys):
    """The same boxes under another name are packed already; one box more is refused."""
    out = pack_source(source, tmp_path / "out", text_boxes=source / "boxes.csv")
    copy = tmp_path / "copy.csv"
    copy.write_text((source / "boxes.csv").read_text())
    pack_source(source, out, text_boxes=copy)
    assert "is packed already" in capsys.readouterr().out
    copy.write_text(copy.read_text() + "b/b000_0.png,1,1,5,5,,\n")
    with pytest.raises(CxrdistError, match="already exists"):
        pack_source(source, out, text_boxes=copy)


def test_options_that_would_be_ignored_are_refused(source, tmp_path):
    """Covering needs boxes, and boxes of this source."""
    with pytest.raises(CxrdistError, match="need --text-boxes"):
        pack_source(source, tmp_path / "out", cover="fill")
    write_boxes(tmp_path / "other.csv", {"else.png": [WORD]})
    with pytest.raises(CxrdistError, match="no image of the source"):
        pack_source(source, tmp_path / "out", text_boxes=tmp_path / "other.csv")
    assert not (tmp_path / "out").exists()


def test_strangers_among_the_boxes_are_counted(source, tmp_path, capsys):
    """A path that is no image of the source, such as a typing error, is said."""
    table = tmp_path / "boxes.csv"
    table.write_text((source / "boxes.csv").read_text() + "a/typo.png,1,1,5,5,,\n")
    pack_source(source, tmp_path / "out", text_boxes=table)
    said = capsys.readouterr().out
    assert "1 of its 13 images are not in the source, the first is a/typo.png" in said
    assert "burned-in text: 12 boxes in 12 images covered (black, all)" in said
