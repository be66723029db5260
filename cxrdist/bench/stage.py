"""Training steps to measure: a stage of the real loop on random images, and one plain step."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.bench.measure import quiet
from cxrdist.config import Network, Stage, TrainConfig
from cxrdist.data.plan import plan_epoch
from cxrdist.distributed import StopVote
from cxrdist.files import write_json
from cxrdist.model.densenet import Classifier
from cxrdist.model.networks import block_names
from cxrdist.run import RunDirectory
from cxrdist.terminal import progress
from cxrdist.train.learner import Learner
from cxrdist.train.loop import train_epoch
from cxrdist.train.stage import StageRun
from cxrdist.train.stages import build_optimizer, parameter_groups
from cxrdist.train.step import Batches, TrainingData
from cxrdist.train.training import Training
from cxrdist.train.update import Updater

CLASSES = ["COVID-19", "Normal", "Viral Pneumonia"]
BATCH = 9  # the paper's
RATE = 1e-5  # the paper's for the head


def stage_run(
    accelerator: Accelerator,
    scratch: Path,
    size_px: int,
    blocks: list[str] | None = None,
    recipe: dict[str, Any] | None = None,
) -> StageRun:
    """Set up a stage of the real loop, on as many random images as one step takes.

    Args:
        accelerator: of this rank; all ranks call this together.
        scratch: a directory of this rank's own.
        size_px: side of the images in pixels.
        blocks: the blocks to train; all if None.
        recipe: fields of `TrainConfig` that differ from the paper's recipe.
    """
    # No checkpoint is written between the steps.
    fields: dict[str, Any] = {"init": "none", "global_batch_size": BATCH, "save_steps": sys.maxsize}
    fields |= recipe or {}
    model = Classifier(fields.get("network", Network()), CLASSES, size_px)
    model.to(accelerator.device)
    model.to(memory_format=torch.channels_last)
    lr = dict.fromkeys(blocks or block_names(model.shape), RATE)
    stages = {"bench": Stage(lr=lr, epochs=1, patience=1)}
    config = TrainConfig(scratch, scratch / "run", stages, **fields)
    random, count = np.random.Generator(np.random.Philox(0)), config.global_batch_size
    images: NDArray[np.uint8] = random.integers(0, 256, (count, size_px, size_px), dtype=np.uint8)
    everyone, ones = np.arange(count), np.ones(count, dtype=np.int64)
    run = RunDirectory(scratch / "run")
    write_json(run.info, {"stages": {}})
    run.log.touch()
    data = TrainingData(images, np.eye(3, dtype=np.int8)[everyone % 3], "multiclass")
    # Only because a training has one: the bench does not validate.
    val_plan = plan_epoch(everyone[:1], ones[:1], config.augmentation, 1, (0, "val", 0))
    training = Training(
        accelerator=accelerator,
        run=run,
        recipe=config,
        model=model,
        data=data,
        samples=everyone,
        copies=ones,
        validation=Batches(data, val_plan, accelerator.device),
        vote=StopVote(accelerator),
    )
    with quiet():
        return StageRun(training, "bench", None)


def take_steps(stage: StageRun, num_steps: int) -> int:
    """Run the real loop for an epoch of some steps; return the number of images of all ranks."""
    # An epoch takes this many copies of each image of a batch, so it has as many steps.
    copies = np.full(stage.recipe.global_batch_size, num_steps)
    stage.training = replace(stage.training, copies=copies)
    # `open_epoch` would resume the last epoch.
    stage.epoch = None
    with progress(0, "", "images", show=False) as bar:
        epoch = stage.open_epoch()
        train_epoch(stage, epoch, bar)
        stage.settle(epoch)
    return stage.training.num_images


def plain_step(
    shape: Network, size_px: int, num_images: int, precision: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Return a function for one step of all blocks: warp, forward and backward pass, optimiser.

    It leaves out the loop, other ranks and compilation. ``precision`` is the dtype of autocast,
    float32 for none.
    """
    with device:  # fake tensors cannot be moved to it afterwards
        model = Classifier(shape, CLASSES, size_px)
        images = torch.zeros(num_images, 1, size_px, size_px, dtype=torch.uint8)
        matrices = torch.zeros(num_images, 2, 3)
        targets = torch.zeros(num_images, len(CLASSES))
    blocks = block_names(model.shape)
    learner = Learner(model, set(blocks), precision, compiled=False)
    stage = Stage(lr=dict.fromkeys(blocks, RATE), epochs=1, patience=1)
    scaler = torch.amp.GradScaler(device.type) if precision == torch.float16 else None
    updater = Updater(build_optimizer("sgd", parameter_groups(model, stage)), scaler, None, None)

    def step() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = learner(images, matrices, targets)[0] / targets.numel()
        updater.backward(loss)
        updater.step()

    return step
