import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support import make_shards

from cxrdist.data.cache import open_cache, read_rows
from cxrdist.data.index import read_index
from cxrdist.errors import CxrdistError

CPU = torch.device("cpu")


def test_the_cache_holds_each_sample_in_the_order_of_the_index(shards, tmp_path):
    """Row i is sample i, bit for bit."""
    index = read_index(shards)
    images = open_cache(index, tmp_path, Accelerator(cpu=True))
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


@pytest.mark.parametrize(
    "shared", [True, False], ids=["a shared directory", "one directory filled"]
)
def test_two_nodes_fill_what_is_missing(shards, tmp_path, shared):
    """In a directory that both see only one decodes; a node that has all waits for the other."""
    if not shared:
        open_cache(read_index(shards), tmp_path / "0", Accelerator(cpu=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    directories = [tmp_path / ("0" if shared else name) for name in "01"]
    nodes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "nodes.py", shards, *directories],
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


def test_read_rows_gives_the_rows_asked_for():
    """Rows come in the order asked, with a channel, as a copy."""
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    rows = read_rows(images, np.array([3, 0, 3]), CPU)
    assert rows.shape == (3, 1, 2, 2)
    assert np.array_equal(rows[:, 0].numpy(), images[[3, 0, 3]])
    rows.zero_()
    assert images[3].any()
