"""Shards as a torch Dataset: each sample of a split as it is packed, also in workers and ranks."""

import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import make_shards
from torch.utils.data import DataLoader, DistributedSampler

from cxrdist import open_shards
from cxrdist.data.dataset import ShardDataset
from cxrdist.data.index import read_index
from cxrdist.data.shards import read_shard
from cxrdist.errors import CxrdistError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of train, and one or more of the other splits."""
    return make_shards(tmp_path_factory.mktemp("dataset"), {"a": 12, "b": 12}, shard_size=5)


def test_items_are_the_samples_of_the_split(shards):
    """Image, target, key and patient, in the order of samples.csv."""
    index = read_index(shards)
    for split in ("train", "val", "test"):
        dataset, number = open_shards(shards, split), 0
        for shard in index.packed():
            for sample, (pixels, _) in zip(shard.samples, read_shard(shard), strict=True):
                if sample.split == split:
                    item = dataset[number]
                    assert np.array_equal(item.image.numpy(), pixels[None])
                    assert item.target.tolist() == [sample.label == n for n in dataset.classes]
                    assert (item.key, item.patient) == (sample.key, sample.patient)
                    number += 1
        assert len(dataset) == number > 0
    assert dataset[0].target.dtype == torch.float32
    before = dataset[0].target.clone()
    dataset[0].target.fill_(0.5)
    assert torch.equal(dataset[0].target, before)
    assert dataset[-1].key == dataset[len(dataset) - 1].key


def test_workers_and_ranks_share_an_epoch(shards):
    """Two ranks with two forked workers each, after the parent has read: each image is whole."""
    dataset = open_shards(shards, "train")
    expected = {item.key: item.image for item in (dataset[i] for i in range(len(dataset)))}
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, drop_last=False)
        loader = DataLoader(
            dataset, batch_size=3, sampler=sampler, num_workers=2, multiprocessing_context="fork"
        )
        for batch in loader:
            assert batch.target.shape == (len(batch.key), 2)
            assert all(
                torch.equal(i, expected[k]) for k, i in zip(batch.key, batch.image, strict=True)
            )
            seen += batch.key
    assert {*seen} == expected.keys()


def test_a_forked_process_reads_files_of_its_own(shards):
    """With one position in a file for both, one would read what the other one asked for."""
    dataset = open_shards(shards, "train")
    before = dataset[0].key
    opened = dataset._opened(0)

    def differs(queue: multiprocessing.SimpleQueue) -> None:
        queue.put((dataset._opened(0) is not opened, dataset[0].key))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=differs, args=(queue,))
    process.start()
    assert queue.get() == (True, before)
    process.join()
    assert dataset._opened(0) is opened
    assert pickle.loads(pickle.dumps(dataset))[0].key == before  # as for workers that are spawned


def test_unknown_labels_are_minus_one(tmp_path):
    """Uncertain and missing alike, as the loss of cxrdist leaves them out."""
    dataset = open_shards(make_shards(tmp_path, {"a": 4, "b": 4}, split="1/0/0"), "train")
    index = dataset.index
    samples = [s._replace(label="", uncertain="a", missing="b") for s in index.samples]
    unknown = ShardDataset(replace(index, task="multilabel", samples=samples), "train")
    assert unknown._targets.tolist() == [[-1, -1]] * 8
    with pytest.raises(CxrdistError, match=r"has no samples in val; give another split"):
        open_shards(index.directory, "val")


def test_wrong_names_and_damage_are_refused(shards, tmp_path):
    """A split that is none, a directory without shards, and a byte that was changed."""
    with pytest.raises(CxrdistError, match=r"split is 'tran': expected train, val, test"):
        open_shards(shards, "tran")
    with pytest.raises(CxrdistError, match=r"^/.*: has no index\.json"):
        open_shards(tmp_path, "train")
    file = shards / "test-000000.tar"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    dataset = open_shards(shards, "test")
    with pytest.raises(CxrdistError, match=r"test-000000\.tar: the shard's content differs"):
        dataset[0]
