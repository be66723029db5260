"""Run on each rank of a test: train an epoch of each stage, or take one gradient.

usage: ranks.py stages SHARDS RUN OUT
       ranks.py frozen|trained SHARDS RUN OUT BATCH[:IMAGES_PER_PASS]...
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from cxrdist.config import Augmentation, Network, Stage, TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.run import RunDirectory
from cxrdist.terminal import progress
from cxrdist.train.stage import StageRun
from cxrdist.train.stages import set_modes
from cxrdist.train.step import Batches, Staging, backward, read_slice
from cxrdist.train.training import Training, build_training

SMALL = Network(growth_rate=4, block_config=(2, 2, 2, 2), dropout=0.0)
BLOCKS = ["stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4", "head"]
# The paper's stages in small: head only, then all with growing rates, then late blocks again.
STAGES = {
    "head": Stage({"head": 0.02}, epochs=1, patience=1),
    "all": Stage({b: 0.001 * 2**i for i, b in enumerate(BLOCKS)}, epochs=1, patience=1),
    "late": Stage({"denseblock4": 0.01, "head": 0.1}, epochs=1, patience=1),
}


def build(shards: Path, run: Path) -> Training:
    config = TrainConfig(
        shards,
        run,
        STAGES,
        init="none",
        copies={"a": 3, "b": 5},
        global_batch_size=9,
        augmentation=Augmentation(degrees=10),
        network=SMALL,
        cache=run.parent / "cache",
    )
    accelerator = start()
    index = read_index(shards)
    return build_training(accelerator, RunDirectory(run), config, index)


def state(training: Training) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in training.model.network.state_dict().items()}


def run_stages(training: Training) -> dict:
    """An epoch of each stage: the state before and after, and the last gradient."""
    found = {}
    for name, stage in STAGES.items():
        before = state(training)
        under_way = StageRun(training, name, None)
        gradients = {}
        step = under_way.updater.optimizer.step

        def keep_gradients(gradients=gradients, step=step):
            for key, parameter in training.model.network.named_parameters():
                if parameter.grad is not None:
                    gradients[key] = parameter.grad.clone()
            step()

        under_way.updater.optimizer.step = keep_gradients
        with progress(0, "", "images", show=False) as bar:
            under_way.train_and_validate(bar)
        training.accelerator.free_memory()
        found[name] = {
            "trained": list(stage.lr),
            "steps": under_way.steps_done,
            "before": before,
            "after": state(training),
            "gradients": gradients,
        }
    return found


def take_gradients(training: Training, trained: set[str], batches: list[str]) -> dict:
    """The synchronised gradient in float64 of the first step of an epoch, for each batch.

    Args:
        training: the run.
        trained: blocks whose BatchNorm is trained.
        batches: images of the step, and of a pass.
    """
    found = {}
    training.model.double()
    under_way = StageRun(training, "all", None)
    set_modes(training.model, trained)
    for batch in batches:
        size, _, per_pass = batch.partition(":")
        recipe = replace(training.recipe, global_batch_size=int(size))
        plan = replace(training, recipe=recipe).plan("all", 1)
        staging = Staging(training.material.images, int(size), training.accelerator.device)
        epoch = Batches(training.material, plan, training.accelerator.device)
        epoch.targets = epoch.targets.double()
        part = read_slice(epoch, staging, 0, training.accelerator)
        loss = backward(
            *(training.accelerator, under_way.model, under_way.updater, part),
            *(int(per_pass) if per_pass else None, under_way.statistics.before_pass),
        )
        found[batch] = {
            "loss": loss,
            "images": part.num_images,
            "gradients": {k: p.grad.clone() for k, p in training.model.network.named_parameters()},
            "statistics": {k: b.clone() for k, b in training.model.network.named_buffers()},
        }
        under_way.updater.optimizer.zero_grad()
    return found


def main() -> None:
    job, shards, run, out = sys.argv[1], *map(Path, sys.argv[2:5])
    training = build(shards, run)
    if job == "stages":
        found = run_stages(training)
    else:
        trained = set(BLOCKS) if job == "trained" else set()
        found = take_gradients(training, trained, sys.argv[5:])
    out.mkdir(exist_ok=True)
    torch.save(found, out / f"rank{training.accelerator.process_index}.pt")
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()


if __name__ == "__main__":
    main()
