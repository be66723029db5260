import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support import make_shards, run_ranks

from cxrdist.data import cache
from cxrdist.data.cache import open_cache, open_masks, read_rows, unpack_masks
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError

CPU = torch.device("cpu")
NODES = Path(__file__).parent / "nodes.py"
DIFFER = "60 of 60 images differ from the index"


@pytest.fixture
def cached(shards, tmp_path) -> Path:
    """The file of a complete cache of the shards."""
    open_cache(read_index(shards), tmp_path, Accelerator(cpu=True))
    (file,) = tmp_path.glob("*.npy")
    return file


def invert(file: Path, numbers: list[int] | None = None) -> None:
    """Invert some images of a cache, all of them if no numbers are given."""
    images = np.load(file)
    images[numbers] = ~images[numbers]
    np.save(file, images)


def test_a_home_that_is_not_there_names_the_option(shards, monkeypatch):
    """The cache is in the home if nothing else is said; --cache says where else."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(CxrdistError, match=r"No such file .* with --cache"):
        open_cache(read_index(shards), None, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """Shards of 24 images of which 16 have a mask."""
    return make_shards(tmp_path_factory.mktemp("masked"), {"a": 12, "b": 12}, masks=True, size=30)


def test_the_cache_of_masks_has_the_pixels_of_the_shards(masked, tmp_path, capsys):
    """Each mask as it was packed, black where there is none; the images' cache stays as it is."""
    index = read_index(masked)
    open_cache(index, tmp_path, Accelerator(cpu=True))
    (images,) = tmp_path.glob("*.npy")
    before = images.stat().st_mtime_ns
    masks = open_masks(index, tmp_path, Accelerator(cpu=True))
    assert masks.shape == (24, -(-30 * 30 // 8))
    rows = unpack_masks(masks, 30) * np.uint8(255)
    assert rows.shape == (24, 30, 30)
    for sample, row in zip(index.samples, rows, strict=True):
        digest = hashlib.sha256(row.tobytes()).hexdigest()
        assert digest == sample.mask_sha256 or not (sample.mask_sha256 or row.any())
    assert sum(row.any() for row in rows) == 16
    assert images.stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""
    assert sorted(file.name.split(".", 1)[1] for file in tmp_path.iterdir()) == [
        *("lock", "masks.lock", "masks.npy", "npy")
    ]


@pytest.mark.parametrize("bit", ["of a mask", "where no mask is", "behind the last pixel"])
def test_a_damaged_cache_of_masks_is_decoded_anew(masked, tmp_path, capsys, bit):
    """Every bit is compared, also those that no pixel has."""
    index = read_index(masked)
    open_masks(index, tmp_path, Accelerator(cpu=True))
    (file,) = tmp_path.glob("*.masks.npy")
    right = np.load(file)
    wrong = right.copy()
    number = [sample.mask_sha256 == "" for sample in index.samples].index(bit != "of a mask")
    wrong[number, -1 if bit == "behind the last pixel" else 40] ^= 1
    np.save(file, wrong)
    assert np.array_equal(open_masks(index, tmp_path, Accelerator(cpu=True)), right)
    said = f"cache {file}: 1 of 24 masks differ from the index; decoding again\n"
    assert capsys.readouterr().out == said


def decoded_shards(monkeypatch) -> list[str]:
    """Record the names of the shards that are decoded from now on."""
    names = []
    read_shard = cache.read_shard

    def recording(shard):
        names.append(shard.entry.name)
        return read_shard(shard)

    monkeypatch.setattr(cache, "read_shard", recording)
    return names


def test_the_cache_holds_each_sample_in_the_order_of_the_index(shards, tmp_path, capsys):
    """Row i is sample i, bit for bit; a first run reports no fault."""
    index = read_index(shards)
    images = open_cache(index, tmp_path, Accelerator(cpu=True))
    assert capsys.readouterr().out == ""
    assert images.shape == (60, 32, 32)
    for sample, pixels in zip(index.samples, images, strict=True):
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == sample.sha256


def test_the_cache_is_shared_and_read_only(shards, tmp_path):
    """A second run takes the same file, and nobody writes into it."""
    index = read_index(shards)
    open_cache(index, tmp_path, Accelerator(cpu=True))
    (file,) = tmp_path.glob("*.npy")
    before = file.stat().st_mtime_ns
    images = open_cache(index, tmp_path, Accelerator(cpu=True))
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def open_on_two_nodes(shards: Path, directories: list[Path]) -> list[str]:
    """Open the caches of two nodes of one rank together; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, NODES, shards, *directories],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "yes"}
            | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        found = [node.communicate(timeout=100)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0]
    return found


@pytest.mark.parametrize(
    "shared", [True, False], ids=["a shared directory", "one directory filled"]
)
def test_two_nodes_fill_what_is_missing(shards, tmp_path, shared):
    """In a directory that both see only one decodes; a node that has all waits for the other."""
    if not shared:
        open_cache(read_index(shards), tmp_path / "0", Accelerator(cpu=True))
    directories = [tmp_path / ("0" if shared else name) for name in "01"]
    found = open_on_two_nodes(shards, directories)
    assert found[0] == found[1]
    for directory in directories:
        assert sorted(file.suffix for file in directory.iterdir()) == [".lock", ".npy"]


def test_damaged_shards_are_found_even_with_a_cache(tmp_path):
    """A run does not start on shards that are no longer what the index says."""
    shards = make_shards(tmp_path, {"a": 8, "b": 8})
    open_cache(read_index(shards), tmp_path / "cache", Accelerator(cpu=True))
    shard = shards / "val-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CxrdistError, match=r"val-000000\.tar"):
        open_cache(read_index(shards), tmp_path / "cache", Accelerator(cpu=True))


def test_a_cache_is_reused_whatever_made_it(shards, cached, capsys):
    """A file that numpy wrote with the right images is taken as it is, without a word."""
    np.save(cached, np.load(cached))
    before = cached.stat().st_ino
    open_cache(read_index(shards), cached.parent, Accelerator(cpu=True))
    assert cached.stat().st_ino == before
    assert capsys.readouterr().out == ""


def foreign(file: Path) -> None:
    """Squares of other X-rays, as many and as large."""
    np.save(file, np.random.default_rng(0).integers(0, 256, (60, 32, 32), np.uint8))


def truncated(file: Path) -> None:
    os.truncate(file, 30 * 32 * 32)


def short(file: Path) -> None:
    """A whole array with one image less."""
    np.save(file, np.load(file)[:59])


def other_shape(file: Path) -> None:
    """The same bytes as images that are not square; the header is as long."""
    np.save(file, np.load(file).reshape(60, 16, 64))


def no_array(file: Path) -> None:
    """As many bytes as expected, none of them an array's."""
    file.write_bytes(b"(" * file.stat().st_size)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (invert, DIFFER),
        (foreign, DIFFER),
        (truncated, "has 30720 bytes, expected 61568"),
        (short, "has 60544 bytes, expected 61568"),
        (other_shape, "does not begin like an array of 60 x 32 x 32 bytes"),
        (no_array, "does not begin like an array of 60 x 32 x 32 bytes"),
        (empty, "has 0 bytes, expected 61568"),
    ],
)
def test_a_damaged_cache_is_decoded_anew(shards, cached, capsys, damage, fault):
    """The images are the right ones again, one line says so, and the next run finds no fault."""
    index, right = read_index(shards), np.load(cached)
    damage(cached)
    images = open_cache(index, cached.parent, Accelerator(cpu=True))
    assert np.array_equal(images, right)
    assert capsys.readouterr().out == f"cache {cached}: {fault}; decoding again\n"
    assert np.array_equal(open_cache(index, cached.parent, Accelerator(cpu=True)), right)
    assert capsys.readouterr().out == ""
    assert sorted(file.suffix for file in cached.parent.iterdir()) == [".lock", ".npy"]


def test_only_shards_with_an_image_that_differs_are_decoded(tmp_path, monkeypatch, capsys):
    """The first and the last image of a shard cost that shard; a reuse decodes none."""
    shards = make_shards(tmp_path, {"a": 20, "b": 20}, shard_size=5)
    index, directory = read_index(shards), tmp_path / "cache"
    right = open_cache(index, directory, Accelerator(cpu=True)).copy()
    (file,) = directory.glob("*.npy")
    ends = np.cumsum([shard.samples for shard in index.shards])
    invert(file, [int(ends[1]), int(ends[3]) - 1])
    names = decoded_shards(monkeypatch)
    assert np.array_equal(open_cache(index, directory, Accelerator(cpu=True)), right)
    assert "2 of 40 images differ" in capsys.readouterr().out
    assert names == [index.shards[2].name, index.shards[3].name]
    open_cache(index, directory, Accelerator(cpu=True))
    assert len(names) == 2


def test_a_run_that_has_mapped_the_cache_keeps_its_file(shards, cached):
    """A new file takes the name; the old one, which another run reads, is not written to."""
    invert(cached, [7])
    with open(cached, "rb") as mapped:
        before = mapped.read()
        open_cache(read_index(shards), cached.parent, Accelerator(cpu=True))
        mapped.seek(0)
        assert mapped.read() == before
        assert os.fstat(mapped.fileno()).st_ino != cached.stat().st_ino


@pytest.fixture
def deadline() -> Iterator[None]:
    """Let what waits for a pipe fail instead of hanging."""

    def give_up(*_: object) -> None:
        raise TimeoutError("waited for too long")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
@pytest.mark.parametrize("suffix", [".npy", ".lock"])
def test_a_name_of_the_cache_taken_by_something_else_is_refused(shards, tmp_path, suffix, kind):
    """A link is not followed, a pipe not waited for; the line names the file."""
    index, outside = read_index(shards), tmp_path / "outside"
    outside.write_text("mine")
    name = tmp_path / f"{index.sha256[:32]}{suffix}"
    if kind == "link":
        name.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(name)
    else:
        name.mkdir()
    with pytest.raises(CxrdistError, match=rf"{name.name}: is a link"):
        open_cache(index, tmp_path, Accelerator(cpu=True))
    assert outside.read_text() == "mine"


def test_a_link_in_place_of_the_unfinished_cache_is_not_written_through(shards, tmp_path):
    """The link is replaced; the file that it leads to stays as it is."""
    index, outside = read_index(shards), tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / f"{index.sha256[:32]}.partial").symlink_to(outside)
    open_cache(index, tmp_path, Accelerator(cpu=True))
    assert outside.read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_the_mark_of_a_killed_run_is_removed_after_a_day(shards, tmp_path):
    """A younger one may be of a run that waits for its nodes; other names are not ours."""
    left = {".0123456789abcdef.node": 25, ".fedcba9876543210.node": 23, ".mine.node": 25}
    for name, hours in left.items():
        (tmp_path / name).touch()
        changed = time.time() - hours * 3600
        os.utime(tmp_path / name, (changed, changed))
    open_cache(read_index(shards), tmp_path, Accelerator(cpu=True))
    kept = {file.name for file in tmp_path.glob("*.node")}
    assert kept == {".fedcba9876543210.node", ".mine.node"}


def test_a_node_that_may_not_mend_a_damaged_cache_refuses_it(shards, cached, monkeypatch):
    """It verifies what the node that owns the directory left; it writes nothing there."""
    monkeypatch.setattr(cache, "_is_ours", lambda directory, accelerator: False)
    open_cache(read_index(shards), cached.parent, Accelerator(cpu=True))
    invert(cached, [7])
    before = cached.read_bytes()
    with pytest.raises(CxrdistError, match=r"\.npy: 1 of 60 images differ from the index"):
        open_cache(read_index(shards), cached.parent, Accelerator(cpu=True))
    assert cached.read_bytes() == before


def test_the_ranks_of_a_node_share_the_verification(shards, cached):
    """Faults in the parts of both ranks are counted together, and both get the right images."""
    right = hashlib.sha256(np.load(cached).tobytes()).hexdigest()
    invert(cached, [0, 58, 59])
    done = run_ranks(2, NODES, shards, cached.parent, cached.parent)
    assert done.returncode == 0, done.stderr
    line = f"cache {cached}: 3 of 60 images differ from the index; decoding again"
    assert sorted(done.stdout.splitlines()) == sorted([line, right, right])


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_mend_a_damaged_cache(shards, cached, shared):
    """In a shared directory, or in that of a node without the main rank, which reports it."""
    right = hashlib.sha256(np.load(cached).tobytes()).hexdigest()
    invert(cached)
    other = cached.parent if shared else cached.parent / "other"
    found = open_on_two_nodes(shards, [other, cached.parent])
    line = f"cache {cached}: {DIFFER}; decoding again"
    assert [text.splitlines() for text in found] == [[line, right], [right]]


def test_read_rows_gives_the_rows_asked_for():
    """Rows come in the order asked, with a channel, as a copy."""
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    rows = read_rows(images, np.array([3, 0, 3]), CPU)
    assert rows.shape == (3, 1, 2, 2)
    assert np.array_equal(rows[:, 0].numpy(), images[[3, 0, 3]])
    rows.zero_()
    assert images[3].any()
