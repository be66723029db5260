"""A stage under way."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from support import Dispatched

from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError
from cxrdist.run import RunDirectory
from cxrdist.terminal import progress
from cxrdist.train.loop import train_epoch
from cxrdist.train.stage import StageRun
from cxrdist.train.training import build_training

BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]


def test_nothing_is_read_from_the_device_between_two_log_rows(shards: Path, tmp_path: Path):
    """The whole loop of an epoch: slices, warps, gradients, update, average, counts, votes."""
    config = TrainConfig(
        shards,
        tmp_path / "run",
        {"all": Stage(dict.fromkeys(BLOCKS, 0.01), epochs=1, patience=1)},
        init="none",
        global_batch_size=7,
        augmentation=Augmentation(degrees=5),
        network=Network(growth_rate=4, block_config=(1, 1, 1, 1)),
        average=0.9,
        max_gradient_norm=1.0,
        cache=tmp_path / "cache",
    )
    training = build_training(start(), RunDirectory(config.run), config, read_index(shards))
    under_way = StageRun(training, "all", None)
    epoch = under_way.open_epoch()
    with progress(0, "", "images", show=False) as bar, Dispatched() as counted:
        train_epoch(under_way, epoch, bar)
    assert epoch.step == epoch.plan.num_steps == 5
    assert counted.operations["aten.convolution.default"] == 5 * (2 * 4 + 4)
    reads = ("local_scalar", "item", "nonzero", "equal.default", "masked_select", "unique")
    assert not [name for name in counted.operations if any(read in name for read in reads)]
    with Dispatched() as control:
        epoch.settle(training.accelerator, under_way.updater)
        float(epoch.losses[0])
    assert [name for name in control.operations if "local_scalar" in name]


def test_dropout_does_not_depend_on_the_words_of_a_message(shards: Path, tmp_path: Path):
    """It is seeded by seed, stage, epoch, step and rank; other words would be other draws."""
    config = TrainConfig(
        shards,
        tmp_path / "run",
        {"all": Stage({"head": 0.01}, epochs=3, patience=3)},
        init="none",
        network=Network(growth_rate=4, block_config=(1, 1, 1, 1)),
        seed=5,
        cache=tmp_path / "cache",
    )
    training = build_training(start(), RunDirectory(config.run), config, read_index(shards))
    under_way = StageRun(training, "all", None)
    under_way.stopping.epoch = 1
    epoch = under_way.open_epoch()
    epoch.where = "in a message"
    epoch.step = 2
    under_way.prepare_step(epoch)
    digest = hashlib.sha256(b"5, stage all, epoch 2, step 3, rank 0").digest()
    assert torch.initial_seed() == int.from_bytes(digest[:8], "little") // 2


def test_an_audit_of_anybody_is_text(shards, tmp_path):
    """What stands beside the shards is copied into the run only if it can be read again."""
    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    (copied / "audit.json").write_bytes(b"\xff\xfe")
    config = TrainConfig(copied, tmp_path / "run", stages={}, init="none", cache=tmp_path / "cache")
    with pytest.raises(
        CxrdistError, match=r"audit\.json: 'utf-8' codec can't decode .*; write it anew"
    ):
        build_training(start(), RunDirectory(config.run), config, read_index(copied))
    assert not (tmp_path / "run").exists()
