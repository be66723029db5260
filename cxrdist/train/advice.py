"""Advice: lines on a launch that works, but not as well as it could."""

import os
from collections.abc import Iterator

from accelerate import Accelerator

from cxrdist.config import TrainConfig
from cxrdist.distributed import local_ranks
from cxrdist.train.training import Training

# A guess that accepts the paper's 9 images on two GPUs, not a measurement.
LEAST_IMAGES_PER_RANK = 4
FEW_STEPS = 300
"""Fewer steps are too few: AdamW moves a weight by about the learning rate per step at most."""


def advice(training: Training) -> Iterator[str]:
    """Yield all lines of advice on a launch; none if it is fine."""
    yield from _advice_on_ranks(training.recipe, training.accelerator.num_processes)
    yield from _advice_on_cpu(training.accelerator)
    yield from _advice_on_steps(training)


def _advice_on_ranks(config: TrainConfig, world_size: int) -> Iterator[str]:
    """Advise on batches that are small for their ranks, and on micro-batches."""
    batch, most = config.global_batch_size, config.max_images_per_rank
    if world_size > 1 and batch < LEAST_IMAGES_PER_RANK * world_size:
        suited = max(1, batch // LEAST_IMAGES_PER_RANK)
        yield (
            f"{batch} images per step on {world_size} ranks: most of the time goes into "
            f"communication; this batch suits {suited} rank{'s' if suited > 1 else ''}"
        )
    # Where a network has BatchNorms, the head is the only block without one.
    trains_norms = any(set(stage.lr) - {"head"} for stage in config.stages.values())
    moves_norms = trains_norms or config.frozen_batch_norm == "moving"
    has_moving_norms = config.network.has_batch_norm and moves_norms
    if most is not None and has_moving_norms and -(-batch // world_size) > most:
        yield (
            f"micro-batches of {most} images per rank: BatchNorm normalises by the statistics of "
            "one micro-batch, not of the whole step"
        )


def _advice_on_cpu(accelerator: Accelerator) -> Iterator[str]:
    """Advise on CPU ranks that are needlessly slow, such as with a config for GPUs."""
    if accelerator.device.type != "cpu":
        return
    (_, ranks), cores = local_ranks(accelerator), len(os.sched_getaffinity(0))
    if accelerator.mixed_precision == "bf16":
        yield (
            "no GPU is used, and most CPUs are many times slower in bf16 than in float32; launch "
            "with --mixed_precision no"
        )
    if ranks > cores:
        yield (
            f"{ranks} CPU ranks for {cores} core{'s' if cores > 1 else ''} are slower than fewer; "
            f"launch with --num_processes {cores}"
        )


def _advice_on_steps(training: Training) -> Iterator[str]:
    """Advise on a recipe with too few epochs for so few images."""
    recipe = training.recipe
    per_epoch = -(-training.num_images // recipe.global_batch_size)
    total = per_epoch * sum(stage.epochs for stage in recipe.stages.values())
    if total < FEW_STEPS:
        yield (
            f"{total} optimiser steps in all, {per_epoch} per epoch, are few; give more, such as "
            f"--stages.{list(recipe.stages)[-1]}.epochs {-(-FEW_STEPS // per_epoch)}"
        )
