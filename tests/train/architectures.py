"""Run on each rank of a test: the gradient of a step of each architecture.

usage: architectures.py SHARDS FOLDER ARCHITECTURE ...

It forks one gloo rank, then two, as `ranks.py` does; each writes FOLDER/WORLD/rank0.pt and so on:
for each architecture the loss, and of each gradient and each BatchNorm statistic its length and its
product with fixed numbers, since AlexNet's alone would be 400 MB.
"""

import sys
from pathlib import Path

import ranks
import torch
from torch import Tensor

from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.run import RunDirectory
from cxrdist.train.loop import backward
from cxrdist.train.stage import StageRun
from cxrdist.train.stages import set_modes
from cxrdist.train.step import Batches, read_slice
from cxrdist.train.training import build_training

STAGES = {"every": Stage({"all": 0.01}, epochs=1, patience=1, block_decay=0.5)}


def digest(tensor: Tensor) -> Tensor:
    """Length of a tensor, and its product with fixed numbers of about 1."""
    flat = tensor.detach().double().flatten()
    return torch.stack([flat.norm(), flat @ torch.arange(len(flat)).double().cos()])


def take_gradient(shards: Path, folder: Path, architecture: str) -> dict:
    """The synchronised gradient of the second step, which has three images, in float64."""
    config = TrainConfig(
        shards,
        folder / architecture,
        STAGES,
        init="none",
        global_batch_size=3,
        augmentation=Augmentation(degrees=10),
        network=Network(architecture=architecture, dropout=0.0),
        cache=folder / "cache",
    )
    training = build_training(start(), RunDirectory(config.run), config, read_index(shards))
    training.model.double()
    under_way = StageRun(training, "every", None)
    set_modes(training.model, under_way.trained)
    epoch = Batches(training.data, training.plan("every", 1), training.accelerator.device)
    epoch.targets = epoch.targets.double()
    part = read_slice(epoch, under_way.staging, None, 1, 0, training.accelerator)
    loss = backward(under_way, part)
    under_way.statistics.after_step(part.sizes)
    network = training.model.network
    found = {name: digest(p.grad) for name, p in network.named_parameters()}
    found |= {name: digest(buffer) for name, buffer in network.named_buffers()}
    training.accelerator.free_memory()
    return {"loss": loss, "images": part.rows.stop - part.rows.start, "digests": found}


def take_jobs(shards: Path, folder: Path, jobs: list[str]) -> None:
    """Do the jobs of this rank; a job is an architecture."""
    found = {architecture: take_gradient(shards, folder, architecture) for architecture in jobs}
    rank = start().process_index
    torch.save(found, folder / f"rank{rank}.pt")
    start().wait_for_everyone()
    start().end_training()


if __name__ == "__main__":
    ranks.take_jobs = take_jobs
    shards, folder = map(Path, sys.argv[1:3])
    for world in (1, 2):
        ranks.fork(shards, folder / str(world), world, sys.argv[3:])
