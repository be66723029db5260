import csv
import hashlib
import io
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image
from support import contents, make_images, make_masks, make_shards

from cxrdist.config import PackConfig
from cxrdist.data import pack as packing
from cxrdist.data.findings import Finding
from cxrdist.data.images import read_square
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.shards import read_shard
from cxrdist.errors import CxrdistError
from cxrdist.files import write_table

COUNTS = {"a": 12, "b c": 12}


def test_shards_are_read_by_webdataset_sample_for_sample(tmp_path):
    """Any WebDataset client sees exactly the samples of samples.csv, with the source's pixels."""
    shards = make_shards(tmp_path, COUNTS, shard_size=5, masks=True)
    index = read_index(shards)
    urls = [str(shards / shard.name) for shard in index.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in index.samples]
    for sample, expected in zip(found, index.samples, strict=True):
        pixels = Image.open(io.BytesIO(sample["png"]))
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == expected.sha256
        original = read_square(tmp_path / "images" / expected.path, 32, "crop")
        assert pixels.tobytes() == original.tobytes()
        assert json.loads(sample["json"])["label"] == expected.label
        assert ("mask.png" in sample) == bool(expected.mask_sha256)
        if expected.mask_sha256:
            mask = Image.open(io.BytesIO(sample["mask.png"])).tobytes()
            assert hashlib.sha256(mask).hexdigest() == expected.mask_sha256
            assert set(mask) == {0, 255}
    assert len(found) == 24
    assert sum("mask.png" in sample for sample in found) == 16


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
    """One and two processes, now and later, write the same bytes, masks too."""
    source = make_images(tmp_path / "images", COUNTS)
    masks = make_masks(source, tmp_path / "masks")
    for name, workers in (("one", 1), ("two", 2), ("again", 2)):
        pack(
            PackConfig(
                *("folder", source, tmp_path / name),
                **{"size": 32, "split": "0.5/0.25/0.25", "workers": workers, "shard_size": 5},
                masks=masks,
            )
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")


def test_the_index_counts_what_is_there(tmp_path):
    """index.json, samples.csv and the shards agree in number, size, hash and class."""
    shards = make_shards(tmp_path, COUNTS, shard_size=5)
    about = json.loads((shards / "index.json").read_text())
    with open(shards / "samples.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(split["samples"] for split in about["splits"].values()) == len(rows) == 24
    for split, said in about["splits"].items():
        labels = [row["label"] for row in rows if row["split"] == split]
        assert said["classes"] == {name: labels.count(name) for name in COUNTS}
        for shard in said["shards"]:
            data = (shards / shard["name"]).read_bytes()
            assert shard["bytes"] == len(data)
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
    patients = {(row["patient"], row["split"]) for row in rows}
    assert len(patients) == len({patient for patient, _ in patients})


def pack_with_findings(folder, monkeypatch, findings):
    """Pack images of which the first has some boxes."""
    read_source = packing.read_source

    def with_findings(config, besides, *rest):
        source = read_source(config, besides, *rest)
        first, *others = source.records
        return replace(source, records=[replace(first, findings=findings), *others])

    monkeypatch.setattr(packing, "read_source", with_findings)
    return make_shards(folder, COUNTS)


def test_boxes_of_findings_are_packed_in_px_of_the_square(tmp_path, monkeypatch, capsys):
    """Images have 56 x 48 px, so the crop begins at column 4 and is scaled by 2/3."""
    here = (Finding("Mass", 4, 0, 24, 12, "R1"), Finding("Mass", 28, 0, 24, 24, "R2"))
    boxes = (*here, Finding("Nodule", 1, 1, 3, 9))
    shards = pack_with_findings(tmp_path, monkeypatch, boxes)
    said = capsys.readouterr().out
    assert "findings: 3 boxes in 1 image; left out, outside of the square: 1" in said
    abouts = [about for shard in read_index(shards).packed() for _, about in read_shard(shard)]
    (there,) = [about["boxes"] for about in abouts if "boxes" in about]
    assert there == [Finding("Mass", 0, 0, 16, 8, "R1"), Finding("Mass", 16, 0, 16, 16, "R2")]


@pytest.mark.parametrize(
    ("box", "number"), [((0, 0, -1, 5), 1), ((float("nan"), 0, 5, 5), 1), ((0, 0, 5, 5), 1001)]
)
def test_boxes_that_no_reader_would_take_are_refused(tmp_path, monkeypatch, box, number):
    """By the name of the image."""
    with pytest.raises(CxrdistError, match=r"a000_0\.png: .*box"):
        pack_with_findings(tmp_path, monkeypatch, (Finding("Mass", *box),) * number)
    assert not (tmp_path / "shards").exists()


def test_skipped_images_are_listed(tmp_path, capsys):
    """With --skip-bad the rest is packed and the bad one is in rejected.csv with the reason."""
    source = make_images(tmp_path / "images", COUNTS)
    (source / "a" / "a000_0.png").write_text("no image")
    out = tmp_path / "out"
    pack(PackConfig("folder", source, out, size=32, split="0.5/0.25/0.25", skip_bad=True))
    with open(out / "rejected.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["a/a000_0.png"]
    assert "is not a readable image" in rows[0]["reason"]
    assert len(read_index(out).samples) == 23
    assert re.search(r"left out: unreadable +1\n", capsys.readouterr().out)


def test_names_with_dots_keep_their_own_keys(tmp_path):
    """WebDataset cuts names at the first dot; images that differ behind it stay two samples."""
    source = make_images(tmp_path / "images", COUNTS)
    pixels = (source / "a" / "a000_0.png").read_bytes()
    for uid in ("1.2.840.1", "1.2.840.2"):
        (source / "a" / f"{uid}.png").write_bytes(pixels)
    pack(PackConfig("folder", source, tmp_path / "out", size=32, split="0.5/0.25/0.25"))
    index = read_index(tmp_path / "out")
    found = webdataset.WebDataset(
        [str(tmp_path / "out" / s.name) for s in index.shards], shardshuffle=False
    )
    assert sorted(s["__key__"] for s in found) == sorted({s.key for s in index.samples})
    assert len(index.samples) == 26


def test_an_existing_directory_is_not_touched(tmp_path):
    """Packing into a directory that has something in it is refused."""
    source = make_images(tmp_path / "images", COUNTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CxrdistError, match="already exists"):
        pack(PackConfig("folder", source, tmp_path / "out", split="0.5/0.25/0.25"))


def test_images_written_after_the_shards_are_told(tmp_path, capsys):
    """The same command packs nothing, but says which image may have other content by now."""
    source, out = make_images(tmp_path / "images", COUNTS), tmp_path / "out"
    config = PackConfig("folder", source, out, split="0.5/0.25/0.25")
    pack(config)
    capsys.readouterr()
    pack(config)
    assert "newer" not in capsys.readouterr().out
    changed = sorted(source.glob("*/*.png"))[3]
    later = (out / "index.json").stat().st_mtime + 1
    os.utime(changed, (later, later))
    pack(config)
    assert f"newer than these shards: 1 image, such as {changed};" in capsys.readouterr().out


@pytest.mark.parametrize("out", [".", "images"])
def test_out_must_not_hold_the_images(tmp_path, out):
    """Nobody is told to remove them, or that there are none."""
    source = make_images(tmp_path / "images", COUNTS)
    with pytest.raises(CxrdistError, match=r"--out .*: holds --input .*images; name another one"):
        pack(PackConfig("folder", source, (tmp_path / out).resolve(), split="0.5/0.25/0.25"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_refused_before_an_image_is_decoded(tmp_path, exists):
    """The shards appear by a rename, and a directory cannot be renamed to a link."""
    source = make_images(tmp_path / "images", COUNTS)
    if exists:
        (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    with pytest.raises(CxrdistError, match=f"--out {tmp_path / 'out'}: is a link; name the dir"):
        pack(PackConfig("folder", source, tmp_path / "out", split="0.5/0.25/0.25"))
    assert not (tmp_path / ".out.partial").exists()


def test_a_table_of_one_label_is_packed_with_its_audit(tmp_path):
    """Pneumonia or nothing, 20 images of each: the AUROC of the only label is in audit.json."""
    source = make_images(tmp_path / "images", {"yes": 20, "no": 20})
    files = sorted(source.glob("*/*.png"))
    rows = [f"{f.relative_to(source)},{'pneumonia' * (f.parent.name == 'yes')}" for f in files]
    (source / "images.csv").write_text("\n".join(["path,labels", *rows]))
    pack(PackConfig("csv", source / "images.csv", tmp_path / "out", size=32, workers=1))
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["not_made"] == {}
    assert found["shortcut"]["auroc"]["pneumonia"]["value"] > 0.9


def test_two_images_are_packed_for_evaluation(tmp_path, capsys):
    """Too few for any audit by patients, which is told and ends nothing."""
    source = make_images(tmp_path / "images", {"a": 1, "b": 1})
    pack(PackConfig("folder", source, tmp_path / "out", size=32, split="0/0/1", workers=1))
    assert "audit: shortcut not made: there are fewer than 5 patients" in capsys.readouterr().out
    index = read_index(tmp_path / "out")
    assert index.split == "0/0/1"
    assert [sample.split for sample in index.samples] == ["test", "test"]


def test_equal_images_that_tie_all_patients_together_are_told_by_name(tmp_path):
    """30 black images are one group; with --duplicates report they are packed as they are."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(15):
            Image.new("L", (40, 40)).save(tmp_path / "images" / name / f"{name}{i}.png")
    config = PackConfig("folder", tmp_path / "images", tmp_path / "out", size=32, workers=1)
    with pytest.raises(CxrdistError, match="30 of 30 images belong to patients that are joined"):
        pack(config)
    pack(replace(config, duplicates="report"))
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["duplicates"]["exact"] == 29
    assert "those of the same image count as one" in found["not_made"]["shortcut"]


def test_each_task_decodes_its_own_parts(tmp_path, monkeypatch, capsys):
    """24 images in parts of 5: of three tasks the first has parts 0 and 3, and nobody has both."""
    monkeypatch.setattr("cxrdist.data.squares.PART_SIZE", 5)
    source = make_images(tmp_path / "images", COUNTS)
    config = PackConfig("folder", source, tmp_path / "out", size=32, workers=1, num_tasks=3)
    squares = tmp_path / ".out.partial" / "squares"
    there = set()
    for task, images in enumerate((10, 9, 5)):
        pack(replace(config, task=task))
        assert f"task {task} of 3: {images} images are decoded" in capsys.readouterr().out
        new = {int(file.stem) for file in squares.glob("*.squares")} - there
        assert new == set(range(task, 5, 3))
        there |= new


@pytest.mark.parametrize("fault", ["state", "more", "cut", "no thumbnails"])
def test_squares_of_another_version_are_named(tmp_path, fault):
    """Fields that were added or dropped since, or a damaged list: one line, no shards."""
    source = make_images(tmp_path / "images", COUNTS)
    config = PackConfig("folder", source, tmp_path / "out", size=32, workers=1, num_tasks=1)
    pack(replace(config, task=0))
    part = tmp_path / ".out.partial" / "squares" / "000000.squares"
    head, _, pngs = part.read_bytes().partition(b"\n")
    rows = [{n: v for n, v in row.items() if n != fault} for row in json.loads(head)]
    rows = [row | {"older": 1} if fault == "more" else row for row in rows]
    text = json.dumps(rows).encode()[: -1 if fault == "cut" else None]
    pngs = pngs[: -32 * 32] if fault == "no thumbnails" else pngs
    part.write_bytes(text + b"\n" + pngs)
    problem = r"squares: is damaged, or was written by another version of cxrdist; remove .*partial"
    with pytest.raises(CxrdistError, match=problem):
        pack(replace(config, num_tasks=None, merge=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", "{", "3", '"pack"'])
def test_a_damaged_work_directory_is_named(tmp_path, text):
    """What an unfinished pack left is judged like any other document."""
    source = make_images(tmp_path / "images", COUNTS)
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "pack.json").write_text(text)
    with pytest.raises(CxrdistError, match=r"pack\.json: .*remove .*partial to start over"):
        pack(PackConfig("folder", source, tmp_path / "out", size=32))
    assert not (tmp_path / "out").exists()


def test_of_copies_the_one_in_test_is_kept_and_none_with_two_labels(tmp_path):
    """--duplicates drop: test before val before train; what may be labelled wrongly is dropped."""
    random = np.random.default_rng(0)

    def draw(*names: str) -> None:
        image = Image.fromarray(random.integers(0, 256, (40, 40), np.uint8))
        for name in names:
            image.save(tmp_path / f"{name}.png")

    rows = [("path", "label", "split")]
    for split in ("train", "val", "test"):
        for label in "ab":
            for number in range(3):
                draw(f"{split}-{label}{number}")
                rows.append((f"{split}-{label}{number}.png", label, split))
    for names in (("1-train", "1-test", "1-val"), ("2-train", "2-val"), ("3-train", "3-test")):
        draw(*names)
        rows += [(f"{name}.png", "a", name[2:]) for name in names]
    rows[-1] = ("3-test.png", "b", "test")
    write_table(tmp_path / "table.csv", rows[0], rows[1:])
    out = tmp_path / "out"
    pack(PackConfig("csv", tmp_path / "table.csv", out, size=32, workers=1, duplicates="drop"))
    with open(out / "dropped.csv", newline="") as file:
        dropped = {tuple(row.values()) for row in csv.DictReader(file)}
    same, other = "is the same image", "is the same image with another label"
    assert dropped == {
        ("1-train.png", "1-test.png", same),
        ("1-val.png", "1-test.png", same),
        ("2-train.png", "2-val.png", same),
        ("3-train.png", "3-test.png", other),
        ("3-test.png", "3-test.png", other),
    }
    kept = {sample.path: sample.split for sample in read_index(out).samples}
    assert kept == {
        path: split for path, _, split in rows[1:] if path not in {d[0] for d in dropped}
    }
