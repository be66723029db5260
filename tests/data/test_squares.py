"""A pack that is killed, divided among tasks, or meets a changed source or a full disk."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom
from PIL import Image
from support import contents, make_images, make_masks, run_command, small_disk

from cxrdist.config import PackConfig
from cxrdist.data import pack as packing
from cxrdist.data import squares, workers
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.records import Record
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError, RunFailedError

KILLS = int(os.environ.get("CXRDIST_TEST_KILLS", "4"))


@pytest.fixture
def config(tmp_path, monkeypatch) -> PackConfig:
    """A pack of 60 images in parts of 8 and shards of 7."""
    monkeypatch.setattr("cxrdist.data.squares.PART_SIZE", 8)
    source = make_images(tmp_path / "images", {"a": 30, "b c": 30})
    return PackConfig(
        "folder", source, tmp_path / "out", size=32, split="0.5/0.25/0.25", shard_size=7
    )


def with_(config: PackConfig, **changes: object) -> PackConfig:
    return PackConfig(**{**vars(config), **changes})


def stamps(folder: Path) -> dict[str, int]:
    """What tells whether a file was written anew."""
    return {f.name: f.stat().st_ino for f in folder.iterdir()}


@pytest.fixture(scope="module")
def many_images(tmp_path_factory) -> Path:
    """Enough images that packing them takes a second or two."""
    return make_images(tmp_path_factory.mktemp("many"), {"a": 320, "b": 320}, size=160)


@pytest.mark.parametrize("whole_group", [True, False], ids=["job", "main process"])
def test_a_killed_pack_goes_on_to_the_same_bytes(tmp_path, many_images, whole_group):
    """SIGKILL at random moments, the same command again: the bytes of an undisturbed pack."""

    def command(out: str) -> list[str]:
        options = ("--size", "96", "--split", "0.5/0.25/0.25", "--shard-size", "50")
        arguments = ("pack", "--source", "folder", "--input", many_images, "--out", tmp_path / out)
        return [*map(str, (*arguments, *options))]

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "cxrdist", *command(out)],
            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
            start_new_session=True,
        )

    began = time.monotonic()
    assert start("whole").wait() == 0
    seconds, moments, killed = time.monotonic() - began, random.Random(whole_group), 0
    for attempt in range(KILLS):
        process = start(f"out{attempt}")
        try:
            process.wait(moments.uniform(0.25, 0.9) * seconds)
            seconds *= 0.9  # the machine became faster
        except subprocess.TimeoutExpired:
            killed += 1
            if whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        half = [f for f in tmp_path.glob("out*") if not (f / "index.json").is_file()]
        assert not half, "something half-made is visible"
        assert run_command(*command(f"out{attempt}")).returncode == 0
        assert contents(tmp_path / f"out{attempt}") == contents(tmp_path / "whole")
        assert not list(tmp_path.glob(".out*"))
    assert killed >= KILLS / 2


def test_tasks_and_a_merge_give_the_bytes_of_one_pack(config, tmp_path):
    """Four tasks in any order and a merge; a task that runs twice does nothing again."""
    pack(config)
    parts = with_(config, out=tmp_path / "parts", num_tasks=4)
    for task in (2, 0, 3):
        pack(with_(parts, task=task))
    merge = with_(parts, num_tasks=None, merge=True)
    with pytest.raises(CxrdistError, match="16 of 60 images are not decoded yet; run all tasks"):
        pack(merge)
    pack(with_(parts, task=1))
    before = stamps(tmp_path / ".parts.partial" / "squares")
    pack(with_(parts, task=1))
    assert stamps(tmp_path / ".parts.partial" / "squares") == before
    pack(merge)
    assert contents(tmp_path / "parts") == contents(tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["images", "out", "parts"]


def test_a_changed_mask_is_another_pack(config, tmp_path, capsys):
    """Masks that were changed, added or taken away since a pack was begun are said by name."""
    begun = with_(config, masks=make_masks(config.input, tmp_path / "masks"))
    pack(with_(begun, task=0, num_tasks=1))
    with pytest.raises(CxrdistError, match="images or of their text boxes or masks has changed"):
        pack(config)
    mask = next((tmp_path / "masks").glob("*/*.png"))
    data, status = mask.read_bytes(), mask.stat()
    mask.write_bytes(data + b" ")
    name = re.escape(mask.name)
    with pytest.raises(CxrdistError, match=rf"{name}: its mask was changed after this pack"):
        pack(begun)
    mask.write_bytes(data)
    os.utime(mask, ns=(status.st_atime_ns, status.st_mtime_ns))
    pack(begun)
    pack(with_(begun, out=tmp_path / "new"))
    assert contents(begun.out) == contents(tmp_path / "new")
    mask.rename(mask.with_suffix(".bmp"))
    pack(begun)
    assert "is packed already" in capsys.readouterr().out  # the name of a mask decides no byte


def test_a_bad_mask_stops_the_pack_or_leaves_its_image_out(config, tmp_path):
    """The line names the image; with --skip-bad it is in rejected.csv with the reason."""
    masks = make_masks(config.input, tmp_path / "masks")
    bad = next(masks.glob("*/*.png"))
    Image.new("1", (30, 30)).save(bad)
    with pytest.raises(CxrdistError, match=rf"{re.escape(bad.name)}: its mask: has 30 x 30 px, "):
        pack(with_(config, masks=masks))
    pack(with_(config, masks=masks, skip_bad=True))
    with open(config.out / "rejected.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [bad.relative_to(masks).as_posix()]
    assert len(read_index(config.out).samples) == 59


def test_finished_shards_are_not_written_again(config, tmp_path, monkeypatch):
    """A pack that ends before the last step leaves its shards for the next."""
    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    shards = {n: i for n, i in stamps(tmp_path / ".out.partial" / "shards").items() if ".tar" in n}
    pack(config)
    after = stamps(config.out)
    assert len(shards) > 6
    assert {name: after[name] for name in shards} == shards


def test_the_same_command_after_the_end_does_nothing(config, capsys):
    """A pack with other options or images is refused, and the difference is named."""
    pack(config)
    before = stamps(config.out)
    pack(config)
    assert "is packed already" in capsys.readouterr().out
    packed = len(read_index(config.out).samples)
    line = rf"already exists, with {packed} images \({{}}; the source has {{}}\); remove it"
    with pytest.raises(CxrdistError, match=line.format("--seed was 0, is 1", packed)):
        pack(with_(config, seed=1))
    one = next(config.input.glob("*/*.png"))
    shutil.copy(one, one.with_name("another.png"))
    with pytest.raises(CxrdistError, match=line.format("the images .*", packed + 1)):
        pack(config)
    assert stamps(config.out) == before


def test_another_pack_does_not_mix_with_an_unfinished_one(config):
    """Other options, a changed list of images and a changed image are each refused by name."""
    pack(with_(config, task=0, num_tasks=1))
    with pytest.raises(CxrdistError, match="--size was 32, is 48"):
        pack(with_(config, size=48))
    image = config.input / "a" / "a000_0.png"
    data, status = image.read_bytes(), image.stat()
    image.write_bytes(data + b" ")
    with pytest.raises(CxrdistError, match=r"a000_0\.png: was changed after this pack started"):
        pack(config)
    image.write_bytes(data)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    image.rename(image.with_name("new.png"))
    with pytest.raises(CxrdistError, match="the list of images or of their text boxes or masks"):
        pack(config)
    image.with_name("new.png").rename(image)
    pack(config)


def test_options_that_do_not_decide_the_squares_keep_them(config, tmp_path, monkeypatch):
    """Another split, seed, pattern or shard size: no square is made anew, and no shard is stale.

    The first pack was stopped with its shards written; they are none of the second.
    """
    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(config)
    other = with_(
        config,
        **{"split": "0.8/0/0.2", "seed": 3, "shard_size": 11, "patient_pattern": r"^(\w+)_"},
        **{"duplicates": "report", "skip_bad": True, "expect": {"a": 30}},
    )
    pack(with_(other, out=tmp_path / "new"))
    squares = stamps(tmp_path / ".out.partial" / "squares")
    pack(with_(other, task=0, num_tasks=1))
    assert stamps(tmp_path / ".out.partial" / "squares") == squares
    pack(with_(other, merge=True))
    assert contents(config.out) == contents(tmp_path / "new")
    assert json.loads((config.out / "pack.json").read_text())["split"] == "0.8/0/0.2"


def test_shards_of_other_views_are_not_taken_for_these(config, tmp_path, monkeypatch):
    """samples.csv is the same, but each KEY.json tells the view of a changed table."""

    def table(view: str) -> PackConfig:
        rows = [f"{f.relative_to(config.input)},{f.parent.name},{view}" for f in files]
        path = config.input / "images.csv"
        path.write_text("\n".join(["path,label,view", *rows]))
        return with_(config, source="csv", input=path)

    files = sorted(config.input.glob("*/*.png"))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(table("PA"))
    pack(table("AP"))
    pack(with_(table("AP"), out=tmp_path / "new"))
    assert contents(config.out) == contents(tmp_path / "new")


REFUSED = {
    "fractions": ({"split": "0.8/0.3/-0.1"}, "--split 0.8/0.3/-0.1: expected paper, or three"),
    "too small for paper": ({"split": "paper"}, "--split paper: takes 60 test images"),
    "pattern": (
        {"patient_pattern": "("},
        r"--patient-pattern '\(': is not a valid regular expression",
    ),
    "pattern without a group": ({"patient_pattern": "a"}, "expected a group around the patient"),
    "one patient": ({"patient_pattern": "(_)"}, "60 of 60 images have the same patient ID"),
    "expected class": (
        {"expect": {"c": 3}},
        "--expect.c: is not a class of images, which has a, b c",
    ),
    "size": ({"size": 4501}, "--size 4501: gives 4501 px, expected at most 4500"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_refused_before_an_image_is_opened(config, monkeypatch, case):
    """What options and the list of images tell is judged first; nothing is left behind."""
    changes, message = REFUSED[case]
    monkeypatch.setattr(packing, "make_squares", lambda *_: pytest.fail("an image was decoded"))
    with pytest.raises(CxrdistError, match=message):
        pack(with_(config, **changes))
    assert [file.name for file in config.out.parent.iterdir()] == ["images"]


def test_a_patient_in_two_given_splits_is_refused_before_an_image_is_opened(config, monkeypatch):
    """A table that gives splits and patients is judged by them."""
    rows = [
        f"{f.relative_to(config.input)},{f.parent.name},p{i // 2},{('train', 'test')[i % 2]}"
        for i, f in enumerate(sorted(config.input.glob("*/*.png")))
    ]
    table = config.input / "images.csv"
    table.write_text("\n".join(["path,label,patient,split", *rows]))
    monkeypatch.setattr(packing, "make_squares", lambda *_: pytest.fail("an image was decoded"))
    with pytest.raises(CxrdistError, match=r"patient p0: .* is in train, .* in test"):
        pack(with_(config, source="csv", input=table))


@pytest.mark.parametrize(
    ("label", "patient", "message"),
    [
        ("a" * 256, "p", "gives 256 characters of a class, expected at most 255"),
        ("a", "p" * 33_000, r"gives \d+ characters about an image, expected at most 32768"),
    ],
    ids=["class", "patient"],
)
def test_names_that_no_index_may_hold_are_refused_before(
    config, monkeypatch, label, patient, message
):
    """Readers of the shards would refuse them, after all images were decoded."""
    files = sorted(config.input.glob("*/*.png"))[:2]
    cells = zip(files, (label, "b"), (patient, "q"), strict=True)
    rows = [f"{file.relative_to(config.input)},{name},{who}" for file, name, who in cells]
    table = config.input / "images.csv"
    table.write_text("\n".join(["path,label,patient", *rows]))
    monkeypatch.setattr(packing, "make_squares", lambda *_: pytest.fail("an image was decoded"))
    with pytest.raises(CxrdistError, match=message):
        pack(with_(config, source="csv", input=table))


def test_one_patient_tag_for_all_is_refused_and_mended_without_decoding_again(
    tmp_path, monkeypatch
):
    """The tag's value is not told; a pattern that tells the patients resumes with the squares."""
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(12):
            values = np.random.default_rng(i).integers(0, 4096, (40, 40))
            write_dicom(tmp_path / "in" / name / f"{i:02d}.dcm", values, 12, PatientID="4711")
    config = PackConfig("folder", tmp_path / "in", tmp_path / "out", size=32, workers=1)
    with pytest.raises(CxrdistError, match="24 of 24 images have the same patient ID") as caught:
        pack(config)
    assert "4711" not in str(caught.value)
    monkeypatch.setattr(
        packing, "make_squares", lambda missing, *_: pytest.fail("again") if missing else []
    )
    pack(with_(config, patient_pattern=r"^(\d+)"))
    assert len({sample.patient for sample in read_index(config.out).samples}) == 12


def test_a_mended_image_is_read_again(config, tmp_path):
    """An unreadable image stops the pack; mended, only its part is decoded again."""
    bad = config.input / "a" / "a000_0.png"
    data = bad.read_bytes()
    bad.write_bytes(data[:100])
    (config.input / "b c" / "b 000_0.png").write_text("no image")
    with pytest.raises(CxrdistError, match=r"a000_0\.png: .* \(2 such images, all in .*rejected"):
        pack(config)
    assert not config.out.exists()
    squares = tmp_path / ".out.partial" / "squares"
    before = stamps(squares)
    bad.write_bytes(data)
    with pytest.raises(CxrdistError, match=r"b 000_0\.png: is not a readable"):
        pack(config)
    changed = {name for name, inode in stamps(squares).items() if before[name] != inode}
    assert changed == {"000000.squares"}
    pack(with_(config, skip_bad=True))
    with open(config.out / "rejected.csv") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["b c/b 000_0.png"]
    assert len(read_index(config.out).samples) == 59


def test_an_image_that_vanishes_is_one_line(config, monkeypatch):
    """It was deleted after the folder was listed; with --skip-bad it is in rejected.csv."""
    read = packing.read_source

    def read_and_delete(*arguments, **named):
        source = read(*arguments, **named)
        source.records[0].file.unlink()
        return source

    monkeypatch.setattr(packing, "read_source", read_and_delete)
    with pytest.raises(CxrdistError, match=r"a000_0\.png: cannot be read \(No such file"):
        pack(config)
    other = with_(config, out=config.out.with_name("other"), skip_bad=True)
    pack(other)
    with open(other.out / "rejected.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["path"], len(read_index(other.out).samples)) == ("a/a000_1.png", 58)


def test_a_kill_while_shards_of_earlier_rows_are_removed_leaves_none_of_them(
    config, tmp_path, monkeypatch
):
    """The rows change since an image that was left out has been mended."""
    config = with_(config, skip_bad=True)
    bad = config.input / "a" / "a000_0.png"
    data = bad.read_bytes()
    bad.write_bytes(data[:100])
    for name in ("cxrdist.data.pack.publish", "pathlib.Path.unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pack(config)
        bad.write_bytes(data)
    pack(config)
    pack(with_(config, out=tmp_path / "new"))
    assert contents(config.out) == contents(tmp_path / "new")


def test_two_packs_of_one_directory_do_not_meet(config, tmp_path):
    """A second process that would write to the same shards stops at once."""
    with packing.locked(tmp_path / ".out.partial"):
        done = run_command(
            *("pack", "--source", "folder", "--input", config.input, "--out", config.out),
            *("--size", 32, "--split", "0.5/0.25/0.25"),
        )
    assert done.returncode == 2
    assert "another cxrdist process is writing here" in done.stderr


def test_a_full_disk_is_one_line_and_the_pack_goes_on_after_it(config, tmp_path):
    """No room: nothing visible stands; with room again the same command ends it."""
    small = with_(config, out=tmp_path / "disk" / "out")
    with small_disk(tmp_path / "disk", "100k") as make_room:
        with pytest.raises(RunFailedError, match=r"/disk/out: No space left on device; make room"):
            pack(small)
        assert not small.out.exists()
        make_room()
        pack(small)
        pack(config)
        assert contents(small.out) == contents(config.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": 4, "num_tasks": 4}, "--task 4: expected 0 to 3"),
        ({"task": 1}, "--task and --num-tasks: give both"),
        ({"task": 1, "num_tasks": 2, "merge": True}, "--merge: run it without --task"),
        ({"num_tasks": 2, "merge": True}, "--merge: run it without --task and --num-tasks"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(config, changes, message):
    """A wrong task number would leave images out."""
    with pytest.raises(CxrdistError, match=message):
        pack(with_(config, **changes))


def readers_of(fifo: Path) -> list[int]:
    """The other processes that have a FIFO open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(fifo):
                found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})


@pytest.mark.parametrize("kills", [False, True], ids=["hangs", "dies"])
def test_a_decoder_that_hangs_or_dies_costs_one_image(config, tmp_path, monkeypatch, kills):
    """The file is named; the images that its worker was given with it are read by another."""
    monkeypatch.setattr(workers, "SECONDS_PER_IMAGE", 30 if kills else 2)
    monkeypatch.setattr(workers, "WAITING", 1)
    records = read_source(config).records
    fifo = config.input / "a" / "a000_9.png"  # who reads it waits for what is never written
    os.mkfifo(fifo)
    records.insert(9, Record(fifo, "a/a000_9.png", "a", "p", "s"))
    parts, part_files = squares.plan_parts(records), tmp_path / "squares"
    writer, ended = os.open(fifo, os.O_RDWR), threading.Event()

    def kill_readers() -> None:
        while not ended.wait(0.05):
            for pid in readers_of(fifo):
                os.kill(pid, signal.SIGKILL)

    if kills:
        threading.Thread(target=kill_readers, daemon=True).start()
    try:
        list(squares.make_squares(parts, part_files, 32, "crop", 1))
    finally:
        ended.set()
        os.close(writer)
    found = [s for part in parts for s in squares.read_part(part_files, part, redo_bad=False)]
    (bad,) = [square for square in found if square.reason]
    assert bad.record.path == "a/a000_9.png"
    slow = "was not read within 2 s; if this machine was busy, try again"
    assert ("crashed its decoder" if kills else slow) in bad.reason
    assert len(found) == 61


def test_squares_of_other_images_are_refused(config, tmp_path):
    """A part's file that lists other records than the pack does is not taken for theirs."""
    records = read_source(config).records
    (part,), (other,) = (squares.plan_parts(some) for some in (records[:2], records[2:4]))
    list(squares.make_squares([part], tmp_path / "squares", 32, "crop", 1))
    assert len(squares.read_part(tmp_path / "squares", part, redo_bad=False)) == 2
    with pytest.raises(CxrdistError, match="is damaged, or was written by another version"):
        squares.read_part(tmp_path / "squares", other, redo_bad=False)
