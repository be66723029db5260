"""Run on each rank of a test: train an epoch of each stage, and take gradients.

usage: ranks.py SHARDS FOLDER WORLD=JOB,... ...

For each number of ranks it forks so many gloo ranks, which write FOLDER/WORLD/rank0.pt and so on:
torch is loaded once for all of them. A job is `stages`, or MODE/BATCH[:IMAGES_PER_PASS] for the
gradient of a step. The mode is `frozen` or `trained`, which BatchNorm is then, `compiled`, which is
`trained` in one compiled graph, `bf16`, which is `trained` under autocast, or `per_rank`, which is
`trained` on its own slice. `lrp` and `gradient` are `trained` with a background loss by that
method, `frozen_lrp` is `frozen`; `lrp_turn` is `lrp` in a step that pays the gradient's share.
`frozen_dropout` and `compiled_dropout` have a dropout of one half, which no other mode has. The job
`moving` is `stages` where frozen BatchNorm moves, `averaged` is `stages` with an average of the
weights and BatchNorm statistics per rank.
"""

import itertools
import os
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from cxrdist.config import Augmentation, Background, Network, Stage, TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import start
from cxrdist.run import RunDirectory
from cxrdist.terminal import progress
from cxrdist.train import learner
from cxrdist.train.background import open_backgrounds, read_text_boxes
from cxrdist.train.loop import backward, train_epoch
from cxrdist.train.stage import StageRun
from cxrdist.train.stages import set_modes
from cxrdist.train.step import Batches, read_slice
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


def follow(under_way: StageRun) -> dict[str, torch.Tensor]:
    """The average of a stage by its formula, in float64, of the state after each step."""
    network, decay, update = (
        under_way.training.model.network,
        under_way.recipe.average,
        under_way.update,
    )
    average = {k: v.double() for k, v in network.state_dict().items() if v.is_floating_point()}
    steps = itertools.count()

    def update_and_follow(batch):
        norm, step = update(batch), next(steps)
        keep = min(decay, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if name in average:
                average[name] = keep * average[name] + (1 - keep) * value.double()
        return norm

    under_way.update = update_and_follow
    return average


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
        average = follow(under_way) if training.recipe.average else {}
        with progress(0, "", "images", show=False) as bar:
            epoch = under_way.open_epoch()
            train_epoch(under_way, epoch, bar)
            under_way.settle(epoch)
            under_way.validate()
        training.accelerator.free_memory()
        found[name] = {
            "trained": list(stage.lr),
            "steps": under_way.steps_done,
            "before": before,
            "after": state(training),
            "gradients": gradients,
            "average": average,
            "best": under_way.best,
        }
    return found


def with_changes(training: Training, mode: str) -> Training:
    """Let BatchNorm of frozen blocks move, or average the weights."""
    changes = {
        "stages": {},
        "moving": {"frozen_batch_norm": "moving"},
        "averaged": {"average": 0.7, "batch_norm": "per_rank"},
    }
    return replace(training, recipe=replace(training.recipe, **changes[mode]))


def with_background(training: Training, method: str) -> Training:
    """Let the stage `all` have a background loss whose gradient is not small."""
    stage = replace(STAGES["all"], background=Background(30.0, "masks", method))
    config = replace(training.recipe, stages={"all": stage})
    index = read_index(config.shards)
    boxes = read_text_boxes(config, index)
    opened = open_backgrounds(config, index, boxes, training.accelerator)
    return replace(training, backgrounds=opened)


def take_gradient(training: Training, mode: str, batch: str) -> dict:
    """The synchronised gradient of the first step of an epoch, in float64 but under autocast."""
    size, _, per_pass = batch.partition(":")
    recipe = replace(
        training.recipe,
        global_batch_size=int(size),
        max_images_per_rank=int(per_pass) if per_pass else None,
        compile=mode.startswith("compiled"),
        batch_norm="per_rank" if mode == "per_rank" else "synchronised",
    )
    training = replace(training, recipe=recipe)
    turn = int(mode == "lrp_turn")
    method = mode.removesuffix("_turn").rpartition("_")[2]
    if method in ("lrp", "gradient"):
        training = with_background(training, method)
    half = mode == "bf16"
    training.model.to(torch.float32 if half else torch.float64)
    under_way = StageRun(training, "all", None)
    set_modes(training.model, set() if mode.startswith("frozen") else set(BLOCKS))
    training.model.network.head_drop.train().p = 0.5 if mode.endswith("_dropout") else 0.0
    torch.manual_seed(7)
    epoch = Batches(training.data, training.plan("all", 1), training.accelerator.device)
    epoch.targets = epoch.targets.to(training.model.mean.dtype)
    staging = under_way.staging, under_way.foregrounds
    part = read_slice(epoch, *staging, 0, turn, training.accelerator)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = backward(under_way, part)
    under_way.statistics.after_step(part.sizes)
    gradients = {k: p.grad.clone() for k, p in training.model.network.named_parameters()}
    under_way.updater.optimizer.zero_grad()
    training.accelerator.free_memory()
    return {
        "loss": loss,
        "images": part.rows.stop - part.rows.start,
        "gradients": gradients,
        "statistics": state(training),
    }


def take_jobs(shards: Path, folder: Path, jobs: list[str]) -> None:
    """Do the jobs of this rank."""
    training = build(shards, folder / "run")
    before, found = state(training), {}
    for job in jobs:
        training.model.float().network.load_state_dict(before)
        mode, _, batch = job.partition("/")
        found[job] = (
            run_stages(with_changes(training, mode))
            if mode in ("stages", "moving", "averaged")
            else take_gradient(training, mode, batch)
        )
    torch.save(found, folder / f"rank{training.accelerator.process_index}.pt")
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()


def fork(shards: Path, folder: Path, world: int, jobs: list[str]) -> None:
    """Do jobs on some ranks, as `torchrun` would start them; torch has no threads before."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        if world > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            numbers |= {"LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ |= {name: str(number) for name, number in numbers.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        try:
            take_jobs(shards, folder, jobs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"{len(failed)} of {world} ranks failed")


def main() -> None:
    shards, folder = map(Path, sys.argv[1:3])
    learner.COMPILE_BACKEND = "aot_eager"
    for argument in sys.argv[3:]:
        world, _, jobs = argument.partition("=")
        fork(shards, folder / world, int(world), jobs.split(","))


if __name__ == "__main__":
    main()
