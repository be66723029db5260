"""Shards of the lungs only, and the networks that are trained on them."""

import csv

import numpy as np
import pytest
from support import make_shards

from cxrdist.config import (
    Augmentation,
    EvaluateConfig,
    Network,
    PackConfig,
    PredictConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.shards import open_shard
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.predictions import evaluate
from cxrdist.predict import predict
from cxrdist.train.loop import train

OPTIONS = {"size": 32, "split": "0.5/0.2/0.3", "patient_pattern": r"^(\w+)_", "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 images, of which two of three have a mask, packed whole and as lungs only."""
    folder = tmp_path_factory.mktemp("lungs")
    make_shards(folder, {"a": 12, "b": 12}, masks=True)
    masks = {"masks": folder / "masks", "lungs_only": True}
    pack(PackConfig("folder", folder / "images", folder / "lungs", **OPTIONS, **masks))
    return folder


def squares(shards):
    """Pixels and mask of each sample by key."""
    found = {}
    for shard in read_index(shards).packed():
        with open_shard(shard) as opened:
            for place, sample in enumerate(shard.samples):
                found[sample.key] = opened.read(place)[0], opened.read_mask(place)
    return found


def test_nothing_but_the_lungs_is_packed(folder):
    """Inside the mask the pixels are those of the plain shards, outside they are 0."""
    whole, lungs = squares(folder / "shards"), squares(folder / "lungs")
    assert len(lungs) == 16
    for key, (pixels, mask) in lungs.items():
        np.testing.assert_array_equal(mask, whole[key][1])
        np.testing.assert_array_equal(pixels, np.where(mask > 0, whole[key][0], 0))
        assert whole[key][0][mask == 0].any()


def test_images_without_a_mask_are_left_out_by_name(folder):
    """8 of 24 have none; the index says of which kind the shards are."""
    with open(folder / "lungs" / "rejected.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert len(rows) == 8
    assert {reason for _, reason in rows} == {"has no mask"}
    assert {path for path, _ in rows}.isdisjoint(
        sample.path for sample in read_index(folder / "lungs").samples
    )
    assert read_index(folder / "lungs").lungs_only
    assert not read_index(folder / "shards").lungs_only


def test_a_class_without_masks_is_refused(folder, tmp_path):
    """Of which class an image is would follow from whether it is there."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a").symlink_to(folder / "masks" / "a")
    for masks, reason in ((None, "no image has a mask"), (folder / "masks" / "a", "no image of b")):
        given = PackConfig(
            "folder", folder / "images", tmp_path / "o", **OPTIONS, masks=masks, lungs_only=True
        )
        with pytest.raises(CxrdistError, match=f"^--lungs-only: {reason}"):
            pack(given)
    assert not (tmp_path / "o").exists()


def test_a_network_of_lungs_only_takes_no_whole_images(folder, tmp_path):
    """Evaluate refuses shards of the other kind, predict all images: it has no masks."""
    blocks = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")
    settings = {
        "stages": {"all": Stage(dict.fromkeys(blocks, 0.003), epochs=1, patience=1)},
        "init": "none",
        "global_batch_size": 6,
        "augmentation": Augmentation(degrees=0),
        "network": Network(4, (1, 1, 1, 1)),
        "cache": tmp_path / "cache",
    }
    run = tmp_path / "run"
    train(TrainConfig(folder / "lungs", run, **settings))
    evaluate(EvaluateConfig(run, folder / "lungs", cache=tmp_path / "cache"))
    with pytest.raises(CxrdistError, match=r"of whole images, .* of the lungs only; pack with --l"):
        evaluate(EvaluateConfig(run, folder / "shards", name="o", cache=tmp_path / "cache"))
    with pytest.raises(CxrdistError, match="trained on lungs only, but new images have no masks"):
        predict(PredictConfig(run, [folder / "images"], tmp_path / "p.csv"))
