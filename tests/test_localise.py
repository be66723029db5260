"""Where a network looks, against planted truth: phantoms with a word in one class."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import contents, run_ranks

from cxrdist.cli import main
from cxrdist.config import (
    Augmentation,
    LocaliseConfig,
    Network,
    PackConfig,
    ReportConfig,
    Stage,
    TrainConfig,
)
from cxrdist.data.index import read_index
from cxrdist.data.outlines import boxes_of_table
from cxrdist.data.pack import pack
from cxrdist.data.phantom import COVID, PATIENT_PATTERN, write_phantoms
from cxrdist.data.records import SPLITS
from cxrdist.explain.heatmap import OUTLINE
from cxrdist.localise import NAMES, SEEN, likeliest_other, localise, outlined, summary
from cxrdist.report.html import report
from cxrdist.train.loop import train

SIZE_PX = 48
BLOCKS = ("stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The word on each COVID-19 image and no opacities, its boxes, and a network that reads it."""
    folder = tmp_path_factory.mktemp("localise")
    write_phantoms(folder / "images", 40, SIZE_PX, opacities=False, word_share=1.0)
    with (
        open(folder / "images" / "opacities.csv", newline="") as file,
        open(folder / "boxes.csv", "w", newline="") as out,
    ):
        writer = csv.writer(out)
        writer.writerow(["image", "label", "x", "y", "width", "height"])
        for row in csv.DictReader(file):
            box = [SIZE_PX * float(row[name]) for name in ("x", "y", "width", "height")]
            writer.writerow([row["path"], COVID, *box])
    settings = {"size": SIZE_PX, "split": "0.5/0.2/0.3", "patient_pattern": PATIENT_PATTERN}
    pack(PackConfig("folder", folder / "images", folder / "shards", workers=1, **settings))
    train(
        TrainConfig(
            folder / "shards",
            folder / "run",
            {"all": Stage(dict.fromkeys(BLOCKS, 3e-3), epochs=15, patience=15, schedule="cosine")},
            init="none",
            global_batch_size=10,
            optimizer="adamw",
            augmentation=Augmentation(degrees=3, shift_x=0.02, shift_y=0.02, flip=False),
            network=Network(8, (2, 2, 2, 2), 0.0),
            cache=folder / "cache",
        )
    )
    return folder


def run_on(folder, **options):
    settings = {"boxes": folder / "boxes.csv", "cache": folder / "cache"}
    localise(LocaliseConfig(folder / "run", folder / "shards", **{**settings, **options}))
    return json.loads((folder / "run" / "test" / "localisation.json").read_text())


@pytest.fixture(scope="module")
def found(trained):
    return run_on(trained)


def methods(found, name="all"):
    (group,) = (group for group in found["groups"] if group["name"] == name)
    return {row["method"]: row for row in group["methods"]}


def test_relevance_finds_what_was_planted_better_than_priors(found):
    """LRP beats the centre prior and chance with intervals apart; chance is 1 and the area."""
    rows = methods(found)
    for method in ("lrp", "contrast"):
        least = rows[method]["times_chance_interval"][0]
        assert least > rows["centre"]["times_chance_interval"][1]
        assert least > 1
        assert rows[method]["times_chance_gain_interval"][0] > 0
        assert rows[method]["pointing_interval"][0] > rows["chance"]["pointing_interval"][1]
    assert rows["chance"]["pointing"] == pytest.approx(found["groups"][0]["area"])
    assert rows["chance"]["times_chance"] == pytest.approx(1)


def test_all_maps_are_of_the_same_images(found, trained):
    """All words of test, and the marked share is chosen on val, the mean outline made of train."""
    samples = read_index(trained / "shards").samples
    number = {
        split: sum(s.split == split and s.label == COVID for s in samples) for split in SPLITS
    }
    whole, covid = found["groups"]
    assert whole["images"] == whole["shapes"] == covid["cases"] == number["test"]
    assert (found["val_cases"], found["train_cases"]) == (number["val"], number["train"])
    assert f"chosen on {number['val']} outlines of val" in summary(found)
    # Without a choice val may have any number of outlines: it is scored, or the set is another one.
    assert "takes 10 outlines of val that are not scored here" in summary({**found, "val_cases": 0})
    assert list(methods(found)) == list(NAMES)
    assert found["left_out"] == {}


def test_ranks_do_not_change_the_result(trained, found):
    """Two ranks write the same bytes as one process with as many threads."""
    place = trained / "run" / "test"
    result, pictures = (place / "localisation.json").read_bytes(), contents(place / "localisation")
    done = run_ranks(
        2,
        *("-m", "cxrdist", "localise", "--run", trained / "run", "--shards", trained / "shards"),
        *("--boxes", trained / "boxes.csv", "--cache", trained / "cache"),
        threads=torch.get_num_threads(),
    )
    assert done.returncode == 0, done.stderr
    assert (place / "localisation.json").read_bytes() == result
    assert contents(place / "localisation") == pictures


def test_the_report_shows_it(trained, found):
    """The figures with their intervals, and each picture with a text of its own."""
    page = report(ReportConfig(trained / "run")).read_text(encoding="utf-8")
    section = re.search(r'<section aria-labelledby="localisation">.*?</section>', page, re.DOTALL)[
        0
    ]
    for row in methods(found).values():
        limits = row["times_chance_interval"]
        shown = f"{limits[0]:.3f} to {limits[1]:.3f}" if limits else "no interval"
        assert f"{row['times_chance']:.3f} ({shown})" in section
    assert section.count("data:image/jpeg") == section.count("alt=") == 3 * len(found["pictures"])
    assert len(found["pictures"]) == 8


def test_boxes_are_read_before_images_are_decoded(trained, tmp_path, capsys):
    """A file that is not there is refused at once."""
    command = ["localise", "--run", str(trained / "run"), "--shards", str(trained / "shards")]
    command += ["--cache", str(tmp_path / "cache"), "--boxes", str(tmp_path / "none.csv")]
    assert main(command) == 2
    assert "none.csv: cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_without_truth_on_the_split_it_is_one_line(trained, tmp_path, capsys):
    """The shards hold neither boxes nor masks, which takes no image; two options exclude others."""
    command = ["localise", "--run", str(trained / "run"), "--shards", str(trained / "shards")]
    command += ["--cache", str(tmp_path / "cache")]
    assert main(command) == 2
    assert "has no image with masks of the shards" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert main([*command, "--boxes", "b.csv", "--masks", "m"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_boxes_of_an_external_set_are_read_once(trained, tmp_path, monkeypatch):
    """Those of patients that the network was trained on are counted as left out."""
    settings = {"size": SIZE_PX, "split": "0.5/0.1/0.4", "patient_pattern": PATIENT_PATTERN}
    other = tmp_path / "other"
    pack(PackConfig("folder", trained / "images", other, workers=1, seed=1, **settings))
    own = read_index(trained / "shards").samples
    known = {sample.patient for sample in own if sample.split in ("train", "val")}
    boxed = [s for s in read_index(other).samples if s.split == "test" and s.label == COVID]
    seen = sum(sample.patient in known for sample in boxed)
    assert 0 < seen < len(boxed)
    calls = []

    def read(*arguments):
        calls.append(arguments)
        return boxes_of_table(*arguments)

    monkeypatch.setattr("cxrdist.localise.boxes_of_table", read)
    config = LocaliseConfig(
        trained / "run", other, boxes=trained / "boxes.csv", cache=trained / "cache"
    )
    localise(config)
    place = trained / "run" / "external" / "other" / "localisation.json"
    found = json.loads(place.read_text())
    assert found["left_out"].pop(SEEN) == seen
    assert found["groups"][0]["shapes"] == len(boxed) - seen
    assert sum(found["left_out"].values()) + len(boxed) == sum(s.label == COVID for s in own)
    assert len(calls) == 1


def test_masks_of_nothing_or_of_everything_are_left_out(trained, tmp_path):
    """In these any map would lie inside by 0 or by 1; the others cover a quarter of the square.

    They count neither for the mean of train nor for the ten of val that choose a share.
    """
    shutil.copytree(trained / "run", tmp_path / "run")
    part = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    part[:24, 24:] = 255
    constant = [part * 0, part * 0 + 255]
    masks = {"test": constant + [part] * 4, "train": constant * 3 + [part] * 3}
    masks["val"] = constant[1:] + [part] * 9
    for split, of_split in masks.items():
        samples = [s for s in read_index(trained / "shards").samples if s.split == split]
        for sample, mask in zip(samples, of_split, strict=False):
            file = (tmp_path / "masks" / sample.path).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(file)
    settings = {"masks": tmp_path / "masks", "cache": trained / "cache"}
    localise(LocaliseConfig(tmp_path / "run", trained / "shards", **settings))
    document = json.loads((tmp_path / "run" / "test" / "localisation.json").read_text())
    assert document["left_out"] == {"that cover nothing or everything": 2}
    whole = document["groups"][0]
    assert (whole["images"], whole["area"]) == (4, 0.25)
    assert (document["train_cases"], document["val_cases"]) == (3, 0)
    # The mean is the outline itself, of which smoothing moves a little outside.
    assert methods(document)["mean_outline"]["inside"] > 0.9


def test_the_likeliest_other_class_is_not_the_class_itself():
    """It is the second where the class is the likeliest, else the first; alone there is none."""
    logits = np.array([3.0, 1.0, 2.0])
    assert likeliest_other(logits, "a", "abc") == "c"
    assert likeliest_other(logits, "b", "abc") == "a"
    assert likeliest_other(logits[:1], "a", "a") is None


def test_the_outline_is_drawn_along_its_inner_edge():
    """Of 40 x 20 px in a picture of 100 px, which is shown three times as large."""
    outline = np.zeros((100, 100), bool)
    outline[40:60, 30:70] = True
    drawn = np.asarray(outlined(Image.new("RGB", (100, 100)), outline))
    expected = np.zeros((300, 300), bool)
    expected[120:180, 90:210] = True
    expected[121:179, 91:209] = False
    assert (drawn[expected] == OUTLINE).all()
    assert not drawn[~expected].any()
