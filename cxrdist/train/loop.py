"""Train: stages of epochs of steps, saved within and at the end of each epoch."""

import os
import sys
from contextlib import ExitStack
from functools import partial

from accelerate import Accelerator
from tqdm import tqdm

from cxrdist.config import TrainConfig
from cxrdist.data.folds import cut_fold, read_fold
from cxrdist.data.index import Index, read_index
from cxrdist.data.labels import read_uncertain
from cxrdist.distributed import finish, gather, local_ranks, read_trackers, start, together
from cxrdist.errors import CxrdistError
from cxrdist.info import read_info
from cxrdist.model.densenet import save_model
from cxrdist.model.networks import block_names, refuse_small_squares
from cxrdist.run import (
    RunDirectory,
    atomic_directory,
    cut_log,
    locked,
    now,
    read_log,
    room_for,
    sweep,
    write_json,
    write_text,
)
from cxrdist.signals import stopping_at_a_boundary
from cxrdist.terminal import table
from cxrdist.train.background import check_backgrounds, check_regions
from cxrdist.train.checkpoint import Checkpoint, fitting, load_latest, load_network
from cxrdist.train.stage import StageRun
from cxrdist.train.stages import check_stages
from cxrdist.train.training import (
    Training,
    build_training,
    fixed_recipe,
    recipe_yaml,
    refuse_other_run,
)

LEAST_IMAGES_PER_RANK = 4
FEW_STEPS = 300
"""Optimiser steps that are few: AdamW moves a weight by about its rate in a step, at most."""


def train(config: TrainConfig) -> None:
    """Train the recipe's stages in turn and publish the model of the last stage's best epoch.

    Called again with the same run directory it goes on after the last save.

    Raises:
        Stopped: a rank was asked to stop.
        CxrdistError: the recipe, shards, weights or run directory cannot be used.
        RunFailedError: a loss or gradient was not finite; nothing is published.
    """
    refuse_bad_recipe(config)
    accelerator = start(read_trackers(config.track), RunDirectory(config.run).tracking)
    together(accelerator, lambda: _refuse_large_world(config, accelerator.num_processes))
    main = accelerator.is_main_process
    index = together(accelerator, lambda: _trainable_index(config))
    run = RunDirectory(config.run)
    with ExitStack() as stack:
        lock = locked(config.run)
        together(accelerator, lambda: stack.enter_context(lock) if main else None)
        together(accelerator, lambda: refuse_other_run(run, config, index))
        if (run.model / "model.json").is_file():
            accelerator.print(f"{run.root}: is trained already; the model is in {run.model}")
            return
        if main:
            sweep(run.root, alone=True)
            sweep(run.checkpoints, alone=True)
        training = build_training(accelerator, run, config, index)
        accelerator.print(_advice(config, accelerator.num_processes), end="")
        accelerator.print(_advice_on_cpu(accelerator), _advice_on_steps(training), sep="", end="")
        if config.track:
            accelerator.init_trackers("cxrdist")
        with stopping_at_a_boundary():
            _run_stages(training)
        together(accelerator, lambda: _publish(training) if main else None)
        accelerator.print(f"trained; the model is in {run.model}")
    finish(accelerator)


def refuse_bad_recipe(config: TrainConfig) -> None:
    """Make sure that a recipe can be trained, as far as that is known without its shards.

    Raises:
        CxrdistError: a field has an invalid value.
    """
    check_stages(config.stages, block_names(config.network))
    check_backgrounds(config)
    read_uncertain(config.uncertain)
    read_trackers(config.track)
    if config.balance == "classes" and config.copies:
        raise CxrdistError(
            "--balance classes: chooses the copies from the counts, but --copies has "
            f"{config.copies}; leave one out, such as with --balance none or --copies {{}}"
        )
    if config.fold is not None:
        read_fold(config.fold)


def _trainable_index(config: TrainConfig) -> Index:
    shards, index = config.shards, cut_fold(read_index(config.shards), config.fold)
    for split in ("train", "val"):
        if not index.numbers(split):
            raise CxrdistError(
                f"--shards {shards}: have no images in {split}; training needs train and val, pack "
                "with --split 0.7/0.1/0.2"
            )
    check_regions(config, index)
    refuse_small_squares(config.network, index.image_size_px, f"--shards {shards}")
    return index


def _refuse_large_world(config: TrainConfig, world_size: int) -> None:
    if world_size > config.global_batch_size:
        raise CxrdistError(
            f"--global-batch-size: {config.global_batch_size} images for {world_size} ranks; "
            "launch at most as many ranks as images in a step"
        )


def _advice(config: TrainConfig, world_size: int) -> str:
    """Lines on a launch that works, but not as well as it could."""
    lines, batch, most = [], config.global_batch_size, config.max_images_per_rank
    if world_size > 1 and batch < LEAST_IMAGES_PER_RANK * world_size:
        good = max(1, batch // LEAST_IMAGES_PER_RANK)
        lines.append(
            f"{batch} images per step on {world_size} ranks: most of the time goes into "
            f"communication; this batch is good for {good} rank{'s' if good > 1 else ''}"
        )
    trains_norms = any(set(stage.lr) - {"head"} for stage in config.stages.values())
    moves = trains_norms or config.frozen_batch_norm == "moving"
    norms_move = config.network.has_batch_norm and moves
    if most is not None and norms_move and -(-batch // world_size) > most:
        lines.append(
            f"micro-batches of {most} images per rank: BatchNorm that moves sees one at a time, "
            "not the whole step"
        )
    return "".join(f"{line}\n" for line in lines)


def _advice_on_cpu(accelerator: Accelerator) -> str:
    """Lines on CPU ranks that are slower than need be, such as of a config for GPUs without any."""
    (_, ranks), cores = local_ranks(accelerator), len(os.sched_getaffinity(0))
    lines = []
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        lines.append(
            "no GPU is used, and most CPUs are many times slower in bf16 than in float32; launch "
            "with --mixed_precision no"
        )
    if accelerator.device.type == "cpu" and ranks > cores:
        lines.append(
            f"{ranks} CPU ranks for {cores} core{'s' if cores > 1 else ''} are slower than fewer; "
            f"launch with --num_processes {cores}"
        )
    return "".join(f"{line}\n" for line in lines)


def _advice_on_steps(training: Training) -> str:
    """A line on a recipe whose epochs are few for so few images."""
    recipe = training.recipe
    per_epoch = -(-training.num_images // recipe.global_batch_size)
    total = per_epoch * sum(stage.epochs for stage in recipe.stages.values())
    if total >= FEW_STEPS:
        return ""
    return (
        f"{total} optimiser steps in all, {per_epoch} per epoch, are few; give more, such as "
        f"--stages.{list(recipe.stages)[-1]}.epochs {-(-FEW_STEPS // per_epoch)}\n"
    )


def _run_stages(training: Training) -> None:
    """Run the stages that are not done yet, each from the best weights of the one before.

    The model of each but the last becomes a run, so that its own figures can be evaluated.
    """
    accelerator, names = training.accelerator, list(training.recipe.stages)
    last = names[-1]

    def keep(stage: str) -> None:
        if accelerator.is_main_process and stage != last:
            _save_stage(training, stage)

    checkpoint = _resume(training)
    if checkpoint is not None:
        position = checkpoint.position
        accelerator.print(
            f"going on after {position.stage}, epoch {position.epoch}"
            + (f" and step {position.step} of the next" if position.step else "")
        )
        with fitting(position.name):
            names = names[names.index(position.stage) + position.finished :]
            if checkpoint.best:
                load_network(training.model.network, checkpoint.best)
        if position.finished:  # killed before it was kept, perhaps
            together(accelerator, lambda: keep(position.stage))
    for name in names:
        checkpoint = StageRun(training, name, checkpoint).run()
        training.model.network.load_state_dict(checkpoint.best)
        together(accelerator, partial(keep, name))


def _resume(training: Training) -> Checkpoint | None:
    """Read the latest whole checkpoint on all ranks, and cut off what was logged after it.

    Raises:
        CxrdistError: it cannot be used, or the ranks see different ones.
    """
    accelerator, run = training.accelerator, training.run
    warn = partial(tqdm.write, file=sys.stderr) if accelerator.is_main_process else lambda _: None
    recipe = fixed_recipe(training.recipe)
    checkpoint = together(accelerator, lambda: load_latest(run.checkpoints, recipe, warn))
    seen = set(gather(accelerator, [checkpoint.position.name if checkpoint else "none"]))
    if len(seen) > 1:
        raise CxrdistError(
            f"{run.checkpoints}: the ranks see different checkpoints ({', '.join(sorted(seen))}); "
            "give a run directory that all nodes share"
        )
    log_bytes = checkpoint.position.log_bytes if checkpoint else 0
    main = accelerator.is_main_process
    together(accelerator, lambda: cut_log(run.log, log_bytes) if main else None)
    return checkpoint


def _save_stage(training: Training, name: str) -> None:
    """Write RUN/stages/NAME with the model that a stage ends in."""
    stage = training.run.stage(name)
    with room_for(stage.root):
        stage.root.mkdir(parents=True, exist_ok=True)
    write_text(stage.recipe, recipe_yaml(training.recipe))
    _write_model(training, stage)


def _publish(training: Training) -> None:
    """Say in run.json when the run was finished; then, as its last act, write the model."""
    _write_model(training, training.run)
    print(_stage_table(training.run))


def _write_model(training: Training, run: RunDirectory) -> None:
    """Write run.json of a run that ends now, and then its model."""
    write_json(run.info, {**read_info(training.run), "finished": now()})
    with atomic_directory(run.model) as directory:
        save_model(training.model, directory)


def _stage_table(run: RunDirectory) -> str:
    """Tell for the terminal what the best weights of each stage reach on the validation split."""
    stages = read_info(run)["stages"]
    scores: dict[tuple[str, int], float | None] = {}
    name = "val_accuracy"
    for row in read_log(run.log):
        if row["kind"] == "epoch":
            name = "val_auroc" if "val_auroc" in row else name
            scores[row["stage"], row["epoch"]] = row[name]
    rows = []
    for stage, info in stages.items():
        score = scores.get((stage, info["best_epoch"]))
        shown = "-" if score is None else f"{score:.4f}"
        of = f"{info['best_epoch']} of {info['epochs']}"
        rows.append([stage, of, f"{info['best_val_loss']:.4f}", shown])
    return table(rows, ["stage", "best epoch", "val loss", name.replace("_", " ")])
