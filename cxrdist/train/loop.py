"""Train: stages of epochs of steps, saved within and at the end of each epoch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from cxrdist.config import TrainConfig
from cxrdist.distributed import entering, finish, read_trackers, say, start, together
from cxrdist.files import locked, sweep
from cxrdist.run import RunDirectory
from cxrdist.signals import stopping_at_a_boundary
from cxrdist.train.advice import advice
from cxrdist.train.checks import refuse_bad_recipe, refuse_large_world, trainable_index
from cxrdist.train.epoch import Epoch
from cxrdist.train.memory import memory_for
from cxrdist.train.publish import publish, publish_stage
from cxrdist.train.resume import resume
from cxrdist.train.stage import StageRun
from cxrdist.train.step import Slice, passes_of
from cxrdist.train.training import Training, build_training, refuse_other_run

# A row has the loss and the digest of the images since the row before: 1 traces each step.
STEPS_PER_LOG_ROW = int(os.environ.get("CXRDIST_STEPS_PER_LOG_ROW", "50"))


def train(config: TrainConfig) -> None:
    """Train the recipe's stages in turn and publish the model of the last stage's best epoch.

    Called again with the same run directory, it resumes after the last save.

    Raises:
        Stopped: a rank was asked to stop.
        CxrdistError: the recipe, shards, weights or run directory cannot be used.
        RunFailedError: a loss or gradient was not finite; nothing is published.
    """
    with _open_training(config) as training:
        if training is None:
            return
        with stopping_at_a_boundary():
            checkpoint, stages_left = resume(training)
            for name in stages_left:
                stage = StageRun(training, name, checkpoint)
                with stage.progress() as bar:
                    stage.begin(bar)
                    while not stage.finished:
                        epoch = stage.open_epoch()
                        train_epoch(stage, epoch, bar)
                        # Settled first: after a step that was not finite, no weights are validated.
                        scores = stage.settle(epoch) | stage.validate()
                        checkpoint = stage.end_epoch(epoch, scores, bar)
                # Leaves the stage's best weights in the network: these are published.
                stage.close()
                publish_stage(training, name)
        publish(training)


def train_epoch(stage: StageRun, epoch: Epoch, bar: tqdm) -> None:
    """Run the steps of an epoch that are not yet done; save, and stop if a rank was asked to."""
    recipe = stage.recipe
    for step in range(epoch.step, epoch.plan.num_steps):
        batch = stage.prepare_step(epoch)
        with memory_for(batch, recipe.max_images_per_rank, f"{epoch.where}, step {step + 1}"):
            if stage.captured is not None:
                shares, norm = stage.captured(batch.turn, *batch.inputs)
            else:
                shares = backward(stage, batch)
                norm = stage.update(batch)
        epoch.count(shares, norm, batch)
        stage.steps_done += 1
        bar.update(epoch.plan.step_size(step))
        # Not after a save: a resumed run cuts off the rows after the checkpoint's `log_bytes`.
        if epoch.step % STEPS_PER_LOG_ROW == 0:
            stage.log_steps(epoch)
        # After the last step `validate` stops if asked, and `end_epoch` saves.
        if not epoch.done:
            stage.stop_if_asked()
            if epoch.step % recipe.save_steps == 0:
                stage.save(epoch)


def backward(stage: StageRun, batch: Slice) -> Tensor:
    """Add the gradients of a step; DDP's mean over ranks is then the mean over the known labels.

    The slices of the ranks differ in the number of known labels. So each rank weights its loss by
    world size / known labels of the whole step, and its penalties by world size / images.
    Micro-batches synchronise once, in the last pass.

    Returns:
        This rank's shares of the loss and of the mean penalty, float32 [2]; the sums over ranks are
        those of the step. The loss is the mean binary cross-entropy over the known labels of all
        images (paper, section 3.3; 0 without known labels), plus the weight times the mean penalty.
    """
    accelerator = stage.training.accelerator
    per_label, per_image = 1 / max(1, batch.num_known), 1 / sum(batch.sizes)
    total = torch.zeros(2, device=accelerator.device)
    passes = list(passes_of(batch, accelerator.process_index, stage.recipe.max_images_per_rank))
    for one in passes:
        stage.prepare_pass(batch, one)
        with nullcontext() if one is passes[-1] else accelerator.no_sync(stage.model):
            inputs = (tensor[one.rows] for tensor in batch.inputs)
            loss, penalty = stage.model(*inputs, turn=batch.turn).unbind()
            mean = penalty * (one.weight * per_image)
            share = loss * (one.weight * per_label) + mean * stage.background_weight
            stage.updater.backward(share * accelerator.num_processes)
        total += torch.stack([share, mean]).detach()
    return total


@contextmanager
def _open_training(config: TrainConfig) -> Iterator[Training | None]:
    """Start the ranks, lock the run, and yield the training; None if the run is already trained."""
    refuse_bad_recipe(config)
    run = RunDirectory(config.run)
    accelerator = start(read_trackers(config.track), run.tracking)
    main = accelerator.is_main_process
    together(accelerator, lambda: refuse_large_world(config, accelerator.num_processes))
    index = together(accelerator, lambda: trainable_index(config))
    # The run is read under its lock, as another training could be writing it.
    with entering(accelerator, locked(config.run), here=main):
        together(
            accelerator, lambda: refuse_other_run(run, config, index, accelerator.mixed_precision)
        )
        if (run.model / "model.json").is_file():
            say(accelerator, f"{run.root}: is already trained; the model is in {run.model}")
            yield None
            return
        if main:
            sweep(run.root, alone=True)
            sweep(run.checkpoints, alone=True)
        training = build_training(accelerator, run, config, index)
        for line in advice(training):
            say(accelerator, line)
        if config.track:
            accelerator.init_trackers("cxrdist")
        yield training
    finish(accelerator)
