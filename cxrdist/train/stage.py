"""A stage under way: its optimiser, epochs, log rows and checkpoints."""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cxrdist.distributed import on_main
from cxrdist.documents import typed
from cxrdist.errors import RunFailedError, Stopped
from cxrdist.files import append_log, settle_log, write_json
from cxrdist.info import read_info
from cxrdist.model.networks import block_names
from cxrdist.terminal import progress, rounded, table
from cxrdist.train.background import describe_background
from cxrdist.train.capture import CapturedStep, Recorder, can_capture, record_cuda_graph
from cxrdist.train.checkpoint import (
    Checkpoint,
    Position,
    State,
    fitting,
    load_network,
    load_optimizer_tensors,
    on_cpu,
    optimizer_tensors,
    refuse_others,
    save_best,
    save_checkpoint,
)
from cxrdist.train.epoch import Epoch
from cxrdist.train.learner import Learner
from cxrdist.train.stages import (
    EarlyStopping,
    build_optimizer,
    describe_groups,
    freeze,
    moving_norms,
    parameter_groups,
    rate_factor,
    rates_of,
    set_modes,
)
from cxrdist.train.statistics import Statistics
from cxrdist.train.step import Batches, Pass, Slice, Staging, read_slice, validate
from cxrdist.train.training import Training, fixed_recipe
from cxrdist.train.update import Average, Updater, gradient_scaler

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StageRun:
    """A stage under way: freeze -> DDP -> optimiser, in this order, anew for every stage."""

    def __init__(self, training: Training, name: str, before: Checkpoint | None) -> None:
        """Set up the stage, or resume it if the latest checkpoint, `before`, is of this stage."""
        self.training, self.name, self.before = training, name, before
        self.recipe = training.recipe
        self.stage = self.recipe.stages[name]
        self.background = training.backgrounds.get(name)
        self.background_weight = self.background.recipe.weight if self.background else 0.0
        self.trained = set(rates_of(self.stage, training.model.shape))
        self.moving = self.recipe.frozen_batch_norm == "moving"
        self.stopping = EarlyStopping(self.stage.patience)
        self.epoch: Epoch | None = None
        self.best: State = {}
        self.bests = dict(before.position.bests) if before else {}
        self.epochs_done = before.position.epochs_done if before else 0
        self.steps_done = before.position.steps_done if before else 0
        self.skipped = 0
        self.saved = before.position if before else None
        self.frozen = [b for b in block_names(training.model.shape) if b not in self.trained]
        resumed = before if before and before.position.stage == name else None
        if resumed:
            with fitting(resumed.position.name):
                # Before the set-up, which copies weights into a folded trunk and into the average.
                load_network(training.model.network, resumed.network)
        self._set_up()
        if resumed:
            with fitting(resumed.position.name):
                self._resume(resumed)
        elif training.accelerator.is_main_process:
            self._print_groups()

    def _set_up(self) -> None:
        """Freeze, then wrap in DDP, then make the optimiser."""
        training, accelerator, recipe = self.training, self.training.accelerator, self.recipe
        # DDP synchronises what requires a gradient when it wraps a network. What is unfrozen later
        # differs between ranks without an error.
        freeze(training.model, self.trained)
        groups = parameter_groups(training.model, self.stage)
        self.groups = describe_groups(groups)
        self.statistics = Statistics(
            accelerator,
            moving_norms(training.model, self.trained, moving=self.moving),
            synchronised=recipe.batch_norm == "synchronised",
        )
        precision = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
        self.model = accelerator.prepare(
            Learner(
                *(training.model, self.trained, precision, self.background),
                compiled=recipe.compile,
                moving=self.moving,
            )
        )
        # Not before: `prepare` gives a rank of several CPUs new tensors, which the average follows.
        network = training.model.network
        self.updater = Updater(
            build_optimizer(recipe.optimizer, groups),
            gradient_scaler(accelerator),
            recipe.max_gradient_norm,
            Average(network, recipe.average) if recipe.average is not None else None,
        )
        device, world_size = accelerator.device, accelerator.num_processes
        most = -(-recipe.global_batch_size // world_size)
        size_px = training.model.image_size_px
        self.staging = Staging(training.data.images, size_px, most, device)
        self.foregrounds = (
            Staging(self.background.foreground, size_px, most, device) if self.background else None
        )
        self.captured: CapturedStep | None = None
        one_pass = recipe.max_images_per_rank is None or recipe.max_images_per_rank >= most
        if recipe.compile and one_pass and can_capture(device, world_size, most):
            self.capture(record_cuda_graph)

    def capture(self, record: Recorder) -> None:
        """Record each step from now on and replay it as a whole."""
        for dropout in self.training.model.dropouts:
            dropout.rows = None  # a recorded step takes all of its images in one pass
        self.updater.prepare_capture(self.training.accelerator.device)
        self.captured = CapturedStep(self._one_pass, record)

    def _resume(self, resumed: Checkpoint) -> None:
        """Restore optimiser, early stopping and epoch from a checkpoint, of any number of ranks."""
        position, updater = resumed.position, self.updater
        self.stopping = typed(position.stopping, EarlyStopping)
        if not 0 <= self.stopping.best_epoch <= self.stopping.epoch <= self.stage.epochs:
            raise ValueError(f"epoch {self.stopping.epoch} of {self.stage.epochs}")
        self.best, self.skipped = resumed.best, position.skipped
        load_optimizer_tensors(updater.optimizer, resumed.optimizer)
        if updater.scaler and position.scaler:
            updater.scaler.load_state_dict(position.scaler)
        if updater.average:
            refuse_others(resumed.average, updater.average.state)
            updater.average.load(resumed.average)
        if position.step:
            self.epoch = self._next_epoch()
            if not position.logged_step <= position.step <= self.epoch.plan.num_steps:
                raise ValueError(f"step {position.step} of {self.epoch.plan.num_steps}")
            self.epoch.resume(resumed)

    def _next_epoch(self) -> Epoch:
        training, number = self.training, self.stopping.epoch + 1
        plan = training.plan(self.name, number)
        batches = Batches(training.data, plan, training.accelerator.device)
        return Epoch(f"stage {self.name}, epoch {number}", batches, self.skipped)

    def progress(self) -> tqdm:
        """Open the bar of the stage's images, with those of earlier runs of the command done."""
        per_epoch = self.training.num_images
        done = self.stopping.epoch * per_epoch
        if self.epoch is not None:
            done += int(self.epoch.plan.bounds[self.epoch.step])
        show = self.training.accelerator.is_main_process
        return progress(self.stage.epochs * per_epoch, self.name, "images", show=show, done=done)

    def begin(self, bar: tqdm) -> None:
        """Validate the weights at the start as epoch 0, so that a worse epoch is never the best."""
        if self.best:  # a resumed stage has done so
            return
        scores = self._scores()
        self.stopping.best_loss = scores["val_loss"]
        if self.before:
            # The stage starts from these weights, so their file is that of its epoch 0, too.
            self.best = self.before.best
            self.bests[self.name] = self.bests[self.before.position.stage]
        else:
            self._keep_best()
        self._log("epoch", {"step": self.steps_done, **scores})
        if self.training.accelerator.is_main_process:
            bar.write(f"{self.name} begins: {_validated(scores)}")

    @property
    def finished(self) -> bool:
        """Return whether the epochs or the patience are used up."""
        return self.stopping.epoch >= self.stage.epochs or self.stopping.exhausted

    def open_epoch(self) -> Epoch:
        """Make the next epoch, or take the one that a checkpoint was saved in."""
        self.epoch = self.epoch or self._next_epoch()
        # The validation before it has set evaluation mode.
        set_modes(self.training.model, self.trained, moving=self.moving)
        return self.epoch

    def prepare_step(self, epoch: Epoch) -> Slice:
        """Seed dropout, set the learning rates, and read this rank's slice of the next step."""
        accelerator, num_steps = self.training.accelerator, epoch.plan.num_steps
        # Not a text that is also shown: a new wording would change the draws. With `rank 0`, all
        # ranks have the draws that older versions had on one rank.
        _seed(
            f"{self.recipe.seed}, stage {self.name}, epoch {self.stopping.epoch + 1}, "
            f"step {epoch.step + 1}, rank 0"
        )
        self.updater.set_rates(
            rate_factor(self.stage, self.stopping.epoch, epoch.step, num_steps),
            self.stopping.epoch * num_steps + epoch.step,
        )
        staging = self.staging, self.foregrounds
        turn = self.steps_done % 2 if self.background else 0  # without it all steps are alike
        return read_slice(epoch.batches, *staging, epoch.step, turn, accelerator)

    def prepare_pass(self, batch: Slice, one: Pass) -> None:
        """Tell BatchNorm and dropout which images of the step the next pass takes."""
        self.statistics.before_pass(one.sizes)
        accelerator, num_images = self.training.accelerator, sum(batch.sizes)
        first = sum(batch.sizes[: accelerator.process_index])
        begin, end = first + one.rows.start, first + one.rows.stop
        rows = torch.arange(begin, end, device=accelerator.device)
        rows.clamp_(max=num_images - 1)  # a row of weight 0 may come after the last one of the step
        for dropout in self.training.model.dropouts:
            dropout.rows, dropout.num_images = rows, num_images
        # Each pass draws for the whole step, from the same state.
        torch.manual_seed(torch.initial_seed())

    def update(self, batch: Slice) -> Tensor:
        """Take the optimiser's step; return the norm of all gradients, float32 []."""
        norm = self.updater.step()
        self.statistics.after_step(batch.sizes)
        self.updater.move_average()
        return norm

    def settle(self, epoch: Epoch) -> dict[str, Any]:
        """Sum the ranks' counts of a whole epoch (`Epoch.settle`): its losses, and its digest."""
        taken = epoch.settle(self.training.accelerator, self.updater)
        self.skipped = epoch.skipped
        epoch.measure_speed()
        return self._losses(epoch, 0) | {"taken": f"{taken:016x}"}

    def validate(self) -> dict[str, Any]:
        """Validate after an epoch, and keep the weights if they are the stage's best."""
        average = self.updater.average
        with average.in_network() if average else nullcontext():
            scores = self._scores()
            if self.stopping.update(scores["val_loss"]):
                self._keep_best()
        return scores

    def _scores(self) -> dict[str, Any]:
        training = self.training
        scores = validate(
            training.accelerator,
            training.model,
            training.validation,
            self.stop_if_asked,
            self.background,
        )
        if not math.isfinite(scores["val_loss"]):
            where = self.epoch.where if self.epoch else f"stage {self.name}, before its first epoch"
            raise RunFailedError(
                f"{where}: the validation loss is not finite; nothing was saved or published. "
                "Lower the stage's learning rates"
            )
        return scores

    def close(self) -> None:
        """Leave the network with the stage's best weights, and free what only the stage needed."""
        self.statistics.close()
        self.training.accelerator.free_memory()
        self.training.model.network.load_state_dict(self.best)

    def _losses(self, epoch: Epoch, first: int) -> dict[str, Any]:
        """Return the losses of the steps from `first` on, for a row of the log."""
        row = {"step": self.steps_done, "loss": epoch.mean_loss(first)}
        return row | {"background": epoch.mean_penalty(first)} if self.background else row

    def _one_pass(
        self, turn: int, images: Tensor, matrices: Tensor, targets: Tensor, *foreground: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run a whole step on one rank in one pass, on tensors alone; it can be recorded."""
        num_known = (targets >= 0).sum().clamp(min=1)  # a replayed step reads the device only
        loss, penalty = self.model(images, matrices, targets, *foreground, turn=turn).unbind()
        mean = penalty * (1 / len(images))
        loss = loss * num_known.reciprocal() + mean * self.background_weight
        self.updater.backward(loss)
        norm = self.updater.step()
        # No `statistics.after_step`: a single rank has nothing to average.
        self.updater.move_average()
        return torch.stack([loss, mean]).detach(), norm

    def log_steps(self, epoch: Epoch) -> None:
        """Log the mean loss of the steps since the last row, and the digest of what they took."""
        taken = epoch.settle(self.training.accelerator, self.updater)
        row = self._losses(epoch, epoch.logged_step)
        epoch.logged_step = epoch.step
        self._log("step", row | {"taken": f"{taken:016x}"})

    def stop_if_asked(self) -> None:
        """Save and raise `Stopped` if a rank was asked to stop; between steps or val batches."""
        if not self.training.vote.passed():
            return
        where = f"stage {self.name}, before its first epoch"
        # Before the first epoch, nothing has been done since the last checkpoint.
        if self.epoch is not None:
            self.save(self.epoch)
            where = f"{self.epoch.where}, step {self.epoch.step}"
        line = f"stopped and saved at {where}; run the same command again to resume"
        raise Stopped(line if self.training.accelerator.is_main_process else "")

    def end_epoch(self, epoch: Epoch, scores: dict[str, Any], bar: tqdm) -> Checkpoint:
        """Log an epoch with its losses and scores, then write its checkpoint, last of all."""
        training, stopping = self.training, self.stopping
        self.epochs_done += 1
        self._log("epoch", scores)
        per_second, seconds = epoch.images_per_second, round(epoch.seconds, 3)  # with validation
        row = {"step": self.steps_done, "images_per_second": per_second, "seconds": seconds}
        self._log("speed", row)
        speed = f", {per_second:.1f} images/s" if per_second else ""
        if training.accelerator.is_main_process:
            is_best = stopping.best_epoch == stopping.epoch
            bar.write(
                f"{self.name} {stopping.epoch}/{self.stage.epochs}: "
                f"loss {scores['loss']:.4f}{_background(scores, 'background')}, "
                f"{_validated(scores)}{speed}{' (best)' if is_best else ''}"
            )
        on_main(training.accelerator, self._note_stage)
        self.epoch = None
        return self.save(None)

    def _keep_best(self) -> None:
        """Save the current weights as the stage's best, on the main rank.

        They go into a new directory, since older checkpoints refer to theirs: its number counts
        the epoch under way, too.
        """
        training, number = self.training, self.epochs_done + (self.epoch is not None)
        self.best = {k: on_cpu(v) for k, v in training.model.network.state_dict().items()}
        saved = on_main(
            training.accelerator, lambda: save_best(training.run.checkpoints, number, self.best)
        )
        self.bests[self.name] = saved or ("", "")

    def save(self, epoch: Epoch | None) -> Checkpoint:
        """Write a checkpoint of the epoch, or of its end if None; on all ranks together."""
        training, accelerator, updater = self.training, self.training.accelerator, self.updater
        main, stopping = accelerator.is_main_process, self.stopping
        taken = epoch.settle(accelerator, updater) if epoch else 0
        position = Position(
            stage=self.name,
            epoch=stopping.epoch,
            step=epoch.step if epoch else 0,
            epochs_done=self.epochs_done,
            steps_done=self.steps_done,
            # On disk before the checkpoint, since `cut_log` refuses a log that is shorter.
            log_bytes=settle_log(training.run.log) if main else 0,
            logged_step=epoch.logged_step if epoch else 0,
            taken=taken,
            skipped=epoch.skipped if epoch else self.skipped,
            stopping=asdict(stopping),
            finished=not epoch and self.finished,
            bests=dict(self.bests),
            scaler=updater.scaler.state_dict() if updater.scaler else {},
            seconds=round(epoch.seconds, 3) if epoch else 0.0,
        )
        network, average = training.model.network.state_dict(), updater.average
        if average:  # a stop in the validation finds the average in the network
            network |= average.set_aside
        checkpoint = Checkpoint(
            position,
            # Only the main rank writes them. On the others, the next stage needs position and best.
            {k: on_cpu(v) for k, v in network.items()} if main else {},
            optimizer_tensors(updater.optimizer) if main else {},
            {k: on_cpu(v) for k, v in average.state.items()} if main and average else {},
            epoch.losses[: epoch.step] if epoch else torch.zeros(0, dtype=torch.float64),
            epoch.penalties[: epoch.step] if epoch else torch.zeros(0, dtype=torch.float64),
            self.best,
        )
        recipe = fixed_recipe(self.recipe)
        arguments = training.run.checkpoints, checkpoint, recipe, self.saved
        on_main(accelerator, lambda: save_checkpoint(*arguments))
        self.saved = position
        return checkpoint

    def _log(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row to log.jsonl and give its numbers to the trackers."""
        training = self.training
        if training.accelerator.is_main_process:
            where = {"kind": kind, "stage": self.name}
            epoch = self.stopping.epoch + (kind == "step")
            append_log(training.run.log, {**where, "epoch": epoch, **row})
        if training.recipe.track:
            values = {f"{kind}/{k}": v for k, v in row.items() if isinstance(v, float)}
            training.accelerator.log(values, step=row["step"])

    def _note_stage(self) -> None:
        """Update the entry of this stage in run.json."""
        run, stopping = self.training.run, self.stopping
        info = read_info(run)
        info["stages"][self.name] = {
            "parameter_groups": self.groups,
            "frozen": self.frozen,
            "frozen_batch_norm": self.recipe.frozen_batch_norm,
            "epochs": stopping.epoch,
            "steps": self.steps_done,
            "best_epoch": stopping.best_epoch,
            "best_val_loss": stopping.best_loss,
            "background": self.background.info if self.background else None,
        }
        write_json(run.info, info)

    def _print_groups(self) -> None:
        rows = [list(map(str, group.values())) for group in self.groups]
        how = "frozen, its BatchNorm moves" if self.moving else "frozen"
        frozen = [[block, how] for block in self.frozen]
        print(f"\nstage {self.name}: up to {self.stage.epochs} epochs")
        print(table(frozen + rows, list(self.groups[0])))
        if self.background:
            print(describe_background(self.background.info))


def _validated(row: dict[str, Any]) -> str:
    """Format the validation loss and score of an epoch for the terminal."""
    background = _background(row, "val_background")
    name = "accuracy" if "val_accuracy" in row else "auroc"
    score, title = row[f"val_{name}"], name.replace("auroc", "AUROC")
    return f"val loss {row['val_loss']:.4f}{background}, val {title} {rounded(score, 4)}"


def _background(row: dict[str, Any], name: str) -> str:
    """Format the mean penalty within a loss; empty without one."""
    return f" (background {row[name]:.4f})" if name in row else ""


def _seed(key: str) -> None:
    """Seed the dropout of a step, so that a resumed run draws what an unbroken one draws."""
    digest = hashlib.sha256(key.encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
