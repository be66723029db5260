"""Each way in which shards break is found by check and at the start of training."""

import csv
import io
import json
import os
import shutil
import signal
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import RUN_CXRDIST, make_shards, run_measured

from cxrdist.config import CheckConfig
from cxrdist.data import check as check_module
from cxrdist.data.check import Inspected, check
from cxrdist.data.check import _inspect as inspect
from cxrdist.data.index import PackedShard
from cxrdist.errors import CxrdistError

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Shards of two classes, several of each split."""
    return make_shards(tmp_path_factory.mktemp("whole"), {"a": 24, "b c": 24}, shard_size=6)


@pytest.fixture
def shards(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))


def members(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def test_shards_with_an_empty_split_are_whole(tmp_path, capsys):
    """Nothing is missing where nothing was asked for."""
    shards = make_shards(tmp_path, {"a": 8, "b c": 8}, split="0.75/0/0.25")
    index = json.loads((shards / "index.json").read_text())
    assert index["splits"]["val"] == {"samples": 0, "classes": {"a": 0, "b c": 0}, "shards": []}
    check(CheckConfig(shards))
    assert "16 samples in 2 shards match the index" in capsys.readouterr().out


def cut_at_sample(shards: Path) -> None:
    data, member = (shards / SHARD).read_bytes(), members(shards / SHARD)[4]
    (shards / SHARD).write_bytes(data[: member.offset] + bytes(1024))


def cut_at_member(shards: Path) -> None:
    data, member = (shards / SHARD).read_bytes(), members(shards / SHARD)[5]
    (shards / SHARD).write_bytes(data[: member.offset] + bytes(1024))


def cut_in_header(shards: Path) -> None:
    data, member = (shards / SHARD).read_bytes(), members(shards / SHARD)[4]
    (shards / SHARD).write_bytes(data[: member.offset + 200])


def cut_in_data(shards: Path) -> None:
    data, member = (shards / SHARD).read_bytes(), members(shards / SHARD)[5]
    (shards / SHARD).write_bytes(data[: member.offset_data + 100])


def zeroed_hole(shards: Path) -> None:
    data, member = bytearray((shards / SHARD).read_bytes()), members(shards / SHARD)[5]
    data[member.offset : member.offset + 1024] = bytes(1024)
    (shards / SHARD).write_bytes(data)


def missing_end(shards: Path) -> None:
    data, member = (shards / SHARD).read_bytes(), members(shards / SHARD)[-1]
    (shards / SHARD).write_bytes(data[: member.offset_data + -(-member.size // 512) * 512])


def huge_size(shards: Path) -> None:
    """A header that promises 2^60 bytes, with the right checksum and length of the file."""
    data, member = bytearray((shards / SHARD).read_bytes()), members(shards / SHARD)[5]
    member.size = 2**60
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)[:512]
    (shards / SHARD).write_bytes(data)


def sparse_member(shards: Path) -> None:
    """A member of type S in GNU's sparse form."""
    data, member = bytearray((shards / SHARD).read_bytes()), members(shards / SHARD)[5]
    member.type = tarfile.GNUTYPE_SPARSE
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)[:512]
    (shards / SHARD).write_bytes(data)


def flipped_bit(shards: Path) -> None:
    data = bytearray((shards / SHARD).read_bytes())
    data[len(data) // 2] ^= 1
    (shards / SHARD).write_bytes(data)


def missing_shard(shards: Path) -> None:
    (shards / SHARD).unlink()


def swapped_shards(shards: Path) -> None:
    (shards / SHARD).rename(shards / "other")
    (shards / "train-000001.tar").rename(shards / SHARD)
    (shards / "other").rename(shards / "train-000001.tar")


DAMAGES = [
    *(cut_at_sample, cut_at_member, cut_in_header, cut_in_data, zeroed_hole, missing_end),
    *(huge_size, sparse_member, flipped_bit, missing_shard, swapped_shards),
]


def edited_samples(shards: Path) -> None:
    table = shards / "samples.csv"
    table.write_text(table.read_text().replace(",a,", ",b c,", 1))


@pytest.mark.parametrize("damage", [*DAMAGES, edited_samples], ids=lambda damage: damage.__name__)
def test_check_names_the_damaged_file(shards, damage):
    """Exit code 2, one line on stderr, no hang, little memory."""
    damage(shards)
    done = run_measured(RUN_CXRDIST, "check", shards)
    assert done.code == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("cxrdist: ")
    assert ("samples.csv" if damage is edited_samples else SHARD) in line
    assert "Traceback" not in done.stderr
    assert done.mib < 1024


@pytest.mark.parametrize("damage", [*DAMAGES, edited_samples], ids=lambda damage: damage.__name__)
def test_training_does_not_begin_on_damaged_shards(shards, damage, tmp_path):
    """Opening the cache refuses the shard before the webdataset library reads it."""
    from accelerate import Accelerator

    from cxrdist.data.cache import open_cache
    from cxrdist.data.index import read_index

    damage(shards)
    with pytest.raises(CxrdistError, match=r"samples\.csv" if damage is edited_samples else SHARD):
        open_cache(read_index(shards), tmp_path, Accelerator(cpu=True))


@pytest.mark.parametrize("damage", [huge_size])
def test_train_names_the_damaged_file(shards, damage, tmp_path):
    """The command itself: exit code 2, one line on stderr, no hang, little memory."""
    damage(shards)
    paths = ("--shards", shards, "--run", tmp_path / "run", "--cache", tmp_path / "cache")
    done = run_measured(RUN_CXRDIST, "train", "--config", "demo", "--init", "none", *paths)
    assert done.code == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert ("samples.csv" if damage is edited_samples else SHARD) in line
    assert "Traceback" not in done.stderr
    assert done.mib < 1024


@pytest.mark.parametrize("damage", [huge_size, sparse_member, cut_in_data, cut_at_member])
def test_a_right_hash_does_not_make_a_bad_tar_safe(shards, damage):
    """An index that was made for a damaged shard is no licence to read it."""
    from cxrdist.data.index import read_index
    from cxrdist.data.shards import describe_shard, read_shard

    damage(shards)
    about = json.loads((shards / "index.json").read_text())
    entries = about["splits"]["train"]["shards"]
    entries[0] = asdict(describe_shard(shards / SHARD, entries[0]["samples"]))
    (shards / "index.json").write_text(json.dumps(about))
    with pytest.raises(CxrdistError, match=SHARD):
        list(read_shard(read_index(shards).packed()[0]))


def test_all_that_is_wrong_is_said(shards, capsys):
    """Several faults are all printed, the last line counts them."""
    flipped_bit(shards)
    (shards / "test-000000.tar").unlink()
    (shards / "stranger.tar").touch()
    with pytest.raises(CxrdistError, match=f"3 faults, the first is .*{SHARD}"):
        check(CheckConfig(shards))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in said] == [
        *(SHARD, "test-000000.tar", "stranger.tar")
    ]


def test_every_sample_is_compared_with_its_row(shards, capsys):
    """Pixels, labels and patients that differ from samples.csv are named by their keys."""
    rows = list(csv.reader((shards / "samples.csv").read_text().splitlines()))
    keys = [row[0] for row in rows]
    rows[1][3] = "b c" if rows[1][3] == "a" else "a"
    rows[2][4] = "somebody"
    rows[3][7] = "0" * 64
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    (shards / "samples.csv").write_text(text.getvalue())
    with pytest.raises(CxrdistError, match="faults"):
        check(CheckConfig(shards))
    said = capsys.readouterr().out
    assert "was changed after packing" in said
    for key, what in zip(keys[1:4], ("label", "patient", "pixels"), strict=True):
        assert any(key in line and what in line for line in said.splitlines())
    assert keys[4] not in said


def test_masks_are_counted_and_their_share_is_told(tmp_path, capsys):
    """Of 24 images 16 have a mask; the shares are those of the decoded masks."""
    shards = make_shards(tmp_path, {"a": 12, "b": 12}, masks=True)
    check(CheckConfig(shards, audit=True))
    said = capsys.readouterr().out
    index = json.loads((shards / "index.json").read_text())
    audit = json.loads((shards / "audit.json").read_text())
    with tarfile.open(shards / "val-000000.tar") as tar:
        names = [name for name in tar.getnames() if name.endswith(".mask.png")]
        masks = [np.asarray(Image.open(tar.extractfile(name))) for name in names]
    held = audit["masks"]["splits"]
    assert held["val"]["with a mask"] == len(masks)
    assert sum(split["with a mask"] for split in held.values()) == 16
    assert sum(split["without a mask"] for split in held.values()) == 8
    shares = [np.mean(mask == 255) for mask in masks]
    assert index["masks"]["least"] <= min(shares) + 1e-4
    assert index["masks"]["most"] >= max(shares) - 1e-4
    assert {name: audit["masks"][name] for name in index["masks"]} == index["masks"]
    assert "masks: 16 images have one, 8 do not; they cover " in said


def dies_of_one(shard: PackedShard, squares: Path | None) -> Inspected:
    """Inspect a shard as `check` does; the process that gets one of them is killed."""
    if shard.file.name == SHARD:
        os.kill(os.getpid(), signal.SIGKILL)
    return inspect(shard, squares)


def test_a_shard_that_kills_its_worker_is_one_fault(whole, monkeypatch):
    """The others are inspected, and the line names the shard."""
    monkeypatch.setattr(check_module, "_inspect", dies_of_one)
    with pytest.raises(CxrdistError, match=rf"{SHARD}: crashed .* \(exit code -9\)$"):
        check(CheckConfig(whole))


def test_whole_shards_pass(whole, capsys):
    """What pack made is whole."""
    check(CheckConfig(whole))
    assert "48 samples in 10 shards match the index" in capsys.readouterr().out
