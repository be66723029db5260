"""What is told without a lung, on squares in which it is known where the class stands."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pytest
from mutations import mutate
from PIL import Image
from support import contents

from cxrdist import probe_background as probed
from cxrdist.config import PackConfig, ProbeBackgroundConfig
from cxrdist.data.index import read_index
from cxrdist.data.lungs import find_lungs
from cxrdist.data.pack import pack
from cxrdist.data.regions import thorax
from cxrdist.data.shards import open_shard
from cxrdist.errors import CxrdistError
from cxrdist.files import read_document
from cxrdist.probe_background import BackgroundFile, probe_background, variants_of

SIZE = 32
LUNG = np.s_[8:24, 8:24]


def draw(folder: Path, kind: str, patients: int = 32) -> Path:
    """Noise of two classes; in class b a corner (word) or the middle (lung) is brighter."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "masks" / name).mkdir(parents=True)
        for number in range(patients):
            pixels = random.integers(60, 120, (SIZE, SIZE), dtype=np.uint8)
            if name == "b":
                pixels[np.s_[0:6, 0:6] if kind == "word" else np.s_[12:18, 12:18]] += 80
            file = f"{name}/{name}{number:02d}.png"
            Image.fromarray(pixels).save(folder / "images" / file)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[LUNG] = 255
            Image.fromarray(mask).save(folder / "masks" / file)
    return folder


def shards_of(folder: Path, name: str = "shards", **options) -> Path:
    settings = {"size": SIZE, "split": "0.5/0.15/0.35", "patient_pattern": r"^(\w+)", "workers": 1}
    pack(PackConfig("folder", folder / "images", folder / name, **(settings | options)))
    return folder / name


def shorten(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(probed, "EPOCHS", (12, 12))
    patched.setattr(probed, "BATCH_SIZE", 6)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Trainings of few epochs, enough for a corner that is brighter."""
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("word"), "word")
    shards_of(folder)
    return folder


def probe(folder: Path, out: str = "out", **options) -> BackgroundFile:
    config = {"shards": folder / "shards", "cache": folder / "cache", **options}
    probe_background(ProbeBackgroundConfig(out=folder / out, **config))
    return read_document(folder / out / "background.json", BackgroundFile)


@pytest.fixture(scope="module")
def found(word):
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        return probe(word, masks=word / "masks")


def test_a_word_in_the_corner_tells_the_class_without_a_lung(found):
    """With the lungs black as well as with them, and not at all from the lungs alone."""
    of = found["variants"]
    assert of["images"]["auroc"] > 0.9
    assert of["no_lungs"]["auroc"] > 0.9
    low, high = of["lungs"]["auroc_interval"]
    assert low <= 0.5 <= high
    assert of["lungs"]["difference"]["interval"][1] < 0
    shown = [f"{of[name]['auroc']:.2f}" for name in ("no_lungs", "shuffled", "images")]
    assert re.findall(r"\b[01]\.\d\d\b", found["says"][0]) == shown
    classes = {name: scores["auroc"] for name, scores in of["no_lungs"]["classes"].items()}
    most = max(classes, key=classes.get)
    whole = of["images"]["classes"][most]["auroc"]
    assert (
        f"highest for {most}: {classes[most]:.2f}, from the whole images {whole:.2f}"
        in (found["says"][1])
    )


def test_the_document_says_what_was_masked_and_that_outlines_count(found, word):
    """The middle 16 of 32 px are a quarter of the square; all images have a mask."""
    region = found["region"]
    assert (region["kind"], region["share"], region["left_out"]) == ("masks", 0.25, 0)
    assert region["why"] == str(word / "masks")
    assert probed.OUTLINE in found["says"]
    assert found["totals"]["test"] == {"images": 22, "patients": 22}


def test_the_estimate_is_that_of_ong_ly(found):
    """P_Source - P_DABIS + 0.5, the interval turned with the sign of the difference."""
    of, estimate = found["variants"], found["estimate"]
    expected = min(1, of["images"]["auroc"] - of["shuffled"]["auroc"] + 0.5)
    assert estimate["auroc"] == pytest.approx(expected, abs=2e-6)
    low, high = of["shuffled"]["difference"]["interval"]
    assert estimate["interval"] == pytest.approx([0.5 - high, min(1, 0.5 - low)])


def test_the_terminal_shows_the_document(found):
    """A row for each training: means, the difference from the images, accuracy, and each class."""
    lines = probed.summary(found).splitlines()
    for name, title in probed.VARIANTS.items():
        of = found["variants"][name]
        own = [scores["auroc"] for scores in of["classes"].values()]
        change = [] if name == "images" else [of["difference"]["difference"]]
        number = next(i for i, line in enumerate(lines) if line.startswith(title))
        values, limits = (re.findall(r"-?\d\.\d{3}", line) for line in lines[number : number + 2])
        assert values == [f"{value:.3f}" for value in (of["auroc"], *change, of["accuracy"], *own)]
        assert limits[:2] == [f"{end:.3f}" for end in of["auroc_interval"]]
    assert any(line.startswith("test: 22 images of 22 patients, over which") for line in lines)
    assert lines[-len(found["says"]) :] == found["says"]


def test_a_killed_probe_resumes_with_the_same_bytes(found, word):
    """Killed before the last training: what is trained stays, and the figures are the same."""
    before = contents(word / "out")
    (word / "out" / ".shards.node.1.partial").mkdir()
    shutil.rmtree(word / "out" / "runs" / "shuffled")
    (word / "out" / "background.json").unlink()
    kept = word / "out" / "runs" / "no_lungs" / "model" / "model.safetensors"
    changed = kept.stat().st_mtime_ns
    assert probe(word, masks=word / "masks") == found
    assert kept.stat().st_mtime_ns == changed
    assert not (word / "out" / ".shards.node.1.partial").exists()
    for name in ("background.json", "predictions.csv", "model.safetensors"):
        assert contents(word / "out")[name] == before[name]


def test_another_probe_in_the_same_directory_is_refused(found, word):
    """Other masks, another seed or other shards: one line that names the option."""
    for options, problem in (
        ({}, r"the --masks was .*masks, is None"),
        ({"masks": word / "masks", "seed": 1}, "the --seed was 0, is 1"),
    ):
        with pytest.raises(CxrdistError, match=f"^--out .*{problem}"):
            probe(word, **options)


def test_masks_that_were_changed_are_another_probe(found, word):
    """The lungs of the earlier command would otherwise stay in the figures without a word."""
    mask = next((word / "masks").glob("*/*.png"))
    before = mask.read_bytes()
    try:
        Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255).save(mask)
        with pytest.raises(CxrdistError, match=r"^--out .*the content of --masks was"):
            probe(word, masks=word / "masks")
    finally:
        mask.write_bytes(before)
    assert probe(word, masks=word / "masks") == found


def test_masks_of_one_class_only_give_way_to_the_ellipse(word, tmp_path):
    """In shards; given with --masks they are refused: that one is there tells the class."""
    (tmp_path / "b").symlink_to(word / "masks" / "b")
    shards_of(word, "outlined", masks=tmp_path)
    index = read_index(word / "outlined")
    lungs = find_lungs(index, None)
    assert lungs.kind == "ellipse"
    assert lungs.why == "of the masks in the shards, none is of an image with a in train"
    with pytest.raises(CxrdistError, match=r"^--masks .*none is of an image with a in train"):
        probe(word, "other", masks=tmp_path)
    assert not list((word / "other").glob("shards*"))


def test_masks_are_moved_as_the_images_were(word):
    """Masks of the originals, placed by their sizes, equal those that pack has moved."""
    shards_of(word, "masked", masks=word / "masks", fit="pad")
    index = read_index(word / "masked")
    own, given = find_lungs(index, None), find_lungs(index, word / "masks")
    assert (own.kind, own.why, given.why) == (
        "masks",
        "the masks in the shards",
        str(word / "masks"),
    )
    for shard in index.packed():
        with open_shard(shard) as opened:
            for place in range(len(shard.samples)):
                pixels, about = opened.read(place)
                packed = probed.PackedSample(
                    shard.first + place, pixels, opened.read_mask(place), about
                )
                np.testing.assert_array_equal(own.of(packed), given.of(packed))


def test_images_without_a_usable_mask_are_left_out_of_all_four(word, tmp_path, capsys):
    """One lacks its mask, one has a mask that covers nothing: both are counted by class."""
    shutil.copytree(word / "masks", tmp_path / "masks")
    train = [s.path for s in read_index(word / "shards").samples if s.split == "train"]
    first, second = (next(path for path in train if path.startswith(name)) for name in ("a", "b"))
    (tmp_path / "masks" / first).unlink()
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(tmp_path / "masks" / second)
    index = read_index(word / "shards")
    (tmp_path / "made").mkdir()
    lungs = find_lungs(index, tmp_path / "masks")
    region = probed._derive(index, lungs, tmp_path / "made", 0)
    assert (region["left_out"], region["left_out_classes"]) == (2, {"a": 1, "b": 1})
    for name in probed.VARIANTS:
        kept = {sample.path for sample in read_index(tmp_path / "made" / name).samples}
        assert kept == {sample.path for sample in index.samples} - {first, second}


def test_the_four_squares_are_what_they_are_called():
    """Black before the square becomes smaller; shuffled afterwards, and by the key."""
    random = np.random.default_rng(1)
    pixels, lung = random.integers(1, 256, (8, 8), dtype=np.uint8), np.zeros((8, 8), bool)
    lung[2:6, 2:5] = True
    whole, without, alone, shuffled = variants_of(pixels, lung, 4, "0 k")
    means = pixels.reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(whole - means).max() <= 1.5  # rounded twice, across and down
    np.testing.assert_array_equal(without[1:3, 1], 0)
    kept = np.where(lung, 0, pixels).reshape(4, 2, 4, 2).mean((1, 3))
    assert np.abs(without - kept).max() <= 1.5
    assert not alone[0].any()
    assert np.abs(alone + kept - means).max() <= 1.5
    np.testing.assert_array_equal(np.sort(shuffled, None), np.sort(whole, None))
    assert (shuffled != whole).any()
    again, other = (variants_of(pixels, lung, 4, key)[3] for key in ("0 k", "1 k"))
    np.testing.assert_array_equal(shuffled, again)
    assert (shuffled != other).any()


def test_each_image_is_shuffled_in_its_own_way(word, tmp_path, monkeypatch):
    """By the seed and its key: a place that is the same in all images could be learnt."""
    keys = []

    def shuffle(pixels, lung, size_px, key):
        keys.append(key)
        return variants_of(pixels, lung, size_px, key)

    monkeypatch.setattr(probed, "variants_of", shuffle)
    index = read_index(word / "shards")
    probed._derive(index, find_lungs(index, None), tmp_path, 5)
    assert keys == [f"5 {sample.key}" for sample in index.samples]


def test_the_ellipse_is_the_same_for_all_images(word):
    """Without masks, and it says so."""
    index = read_index(word / "shards")
    lungs = find_lungs(index, None)
    assert (lungs.kind, lungs.why) == ("ellipse", "the shards have no masks")
    with open_shard(index.packed()[0]) as opened:
        packed = probed.PackedSample(0, *opened.read(0)[:1], None, opened.describe(0))
    np.testing.assert_array_equal(lungs.of(packed), thorax(SIZE))


def test_shards_without_a_split_are_refused(word):
    """The probe needs all three."""
    shards_of(word, "training", split="0.8/0.2/0")
    with pytest.raises(CxrdistError, match=r"^--shards .*have no images in test"):
        probe(word, "none", shards=word / "training")


def test_few_images_are_too_few_to_say(found):
    """11 test images of each class are enough for the limit of 10, of 12 they would not be."""
    of = json.loads(json.dumps(found))
    assert all(scores["too_few"] is None for scores in of["variants"]["images"]["classes"].values())
    of["variants"]["images"]["classes"]["a"]["too_few"] = "9 positives"
    assert any(line.startswith("Fewer than 10 test images") for line in probed._says(of))


def test_a_damaged_list_of_what_was_made_is_read_or_refused(found, word, tmp_path):
    """DIR/shards/probe.json and background.json, damaged 100 times each: one line, nothing else."""
    random = Random(0)
    for file, kind in (
        (word / "out" / "shards" / "probe.json", probed.Begun),
        (word / "out" / "background.json", BackgroundFile),
    ):
        data = file.read_bytes()
        for _ in range(100):
            (tmp_path / "damaged.json").write_bytes(mutate(file.name, data, random))
            with suppress(CxrdistError):
                content = read_document(tmp_path / "damaged.json", kind)
                assert content["format"] == json.loads(data)["format"]


def test_labels_that_are_not_known_count_in_no_score(tmp_path, monkeypatch):
    """Of two labels; one is uncertain on every fourth image, one is on too few images to say."""
    monkeypatch.setattr(probed, "EPOCHS", (1, 1))
    draw(tmp_path, "word", patients=12)
    rows = ["path,Opacity,Rare,patient"]
    for number, file in enumerate(sorted((tmp_path / "images").glob("*/*.png"))):
        opacity = "U" if number % 4 == 0 else int(file.parent.name == "b")
        rows.append(f"{file.relative_to(tmp_path)},{opacity},{int(number % 6 < 3)},p{number}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    settings = {"size": SIZE, "split": "0.4/0.2/0.4", "workers": 1}
    pack(PackConfig("csv", tmp_path / "table.csv", tmp_path / "shards", **settings))
    found = probe(tmp_path)
    targets = read_index(tmp_path / "shards").targets()
    test = targets[read_index(tmp_path / "shards").numbers("test")]
    assert (found["task"], found["region"]["kind"]) == ("multilabel", "ellipse")
    for column, name in enumerate(("Opacity", "Rare")):
        scores = found["variants"]["no_lungs"]["classes"][name]
        assert scores["positives"] == (test[:, column] == 1).sum()
        assert scores["too_few"]
    assert found["variants"]["images"]["accuracy"] is None
    means = found["variants"]["no_lungs"]
    assert (means["auroc"], means["difference"]["difference"]) == (None, None)
    assert (test < 0).any()
    assert found["says"] == [
        "Fewer than 10 test images with or without Opacity, Rare: too few to say."
    ]
