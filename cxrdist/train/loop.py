"""Train: stages of epochs of steps, saved within and at the end of each epoch."""

import hashlib
import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from cxrdist.config import TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import (
    average_buffers,
    gather,
    gather_buffers,
    set_buffers,
    start,
    together,
)
from cxrdist.errors import CxrdistError, RunFailedError, Stopped, refuse_below_one
from cxrdist.model.densenet import block_names, network_state, save_model
from cxrdist.run import (
    RunDirectory,
    append_log,
    atomic_directory,
    cut_log,
    locked,
    now,
    read_json,
    settle_log,
    sweep,
    write_json,
)
from cxrdist.signals import stopping_at_a_boundary
from cxrdist.terminal import progress, table
from cxrdist.train.checkpoint import (
    Checkpoint,
    Position,
    State,
    load_latest,
    load_optimizer_tensors,
    on_cpu,
    optimizer_tensors,
    save_best,
    save_checkpoint,
)
from cxrdist.train.epoch import Epoch
from cxrdist.train.memory import memory_for
from cxrdist.train.stages import (
    EarlyStopping,
    build_optimizer,
    check_stages,
    describe_groups,
    freeze,
    parameter_groups,
    trained_modules,
)
from cxrdist.train.step import backward, prepare_modes, read_slice, update, validate
from cxrdist.train.training import Training, build_training, fixed_recipe, refuse_other_run

# More rows show the plan positions step by step, when a run has to be traced.
STEPS_PER_LOG_ROW = int(os.environ.get("CXRDIST_STEPS_PER_LOG_ROW", "50"))


def train(config: TrainConfig) -> None:
    """Train the recipe's stages in turn and publish the model of the last stage's best epoch.

    Called again with the same run directory it goes on after the last save.

    Raises:
        Stopped: a rank was asked to stop.
        CxrdistError: the recipe, shards, weights or run directory cannot be used.
        RunFailedError: a loss or gradient was not finite; nothing is published.
    """
    _refuse_bad_recipe(config)
    accelerator = start(config.track.split(",") if config.track else [], config.run / "tracking")
    together(accelerator, lambda: _refuse_large_world(config, accelerator.num_processes))
    main = accelerator.is_main_process
    index = together(accelerator, lambda: read_index(config.shards))
    run = RunDirectory(config.run)
    with together(accelerator, lambda: locked(config.run) if main else nullcontext()):
        together(accelerator, lambda: refuse_other_run(run, config, index))
        if (run.model / "model.json").is_file():
            accelerator.print(f"{run.root}: is trained already; the model is in {run.model}")
            return
        if main:
            sweep(run.root, alone=True)
            sweep(run.checkpoints, alone=True)
        training = build_training(accelerator, run, config, index)
        if config.track:
            accelerator.init_trackers("cxrdist")
        with stopping_at_a_boundary():
            _run_stages(training)
        together(accelerator, lambda: _publish(training) if main else None)
        accelerator.print(f"trained; the model is in {run.model}")
    accelerator.end_training()


def _refuse_bad_recipe(config: TrainConfig) -> None:
    blocks = [f"denseblock{i + 1}" for i in range(len(config.network.block_config))]
    check_stages(config.stages, ["stem", *blocks, "head"])
    refuse_below_one(config, "global_batch_size", "max_images_per_rank", "save_steps")
    if not 0 <= config.network.dropout < 1:
        raise CxrdistError(
            f"network.dropout: is {config.network.dropout}, expected at least 0 and below 1"
        )


def _refuse_large_world(config: TrainConfig, world_size: int) -> None:
    if world_size > config.global_batch_size:
        raise CxrdistError(
            f"global_batch_size: {config.global_batch_size} images for {world_size} ranks; "
            "launch at most as many ranks as images in a step"
        )


def _run_stages(training: Training) -> None:
    """Run the stages that are not done yet, each from the best weights of the one before."""
    accelerator, names = training.accelerator, list(training.recipe.stages)
    checkpoint = _resume(training)
    if checkpoint is not None:
        position = checkpoint.position
        accelerator.print(
            f"going on after {position.stage}, epoch {position.epoch}"
            + (f" and step {position.step} of the next" if position.step else "")
        )
        names = names[names.index(position.stage) + position.finished :]
        if checkpoint.best:
            training.model.network.load_state_dict(checkpoint.best)
    for name in names:
        checkpoint = StageRun(training, name, checkpoint).run()
        training.model.network.load_state_dict(checkpoint.best)


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


class StageRun:
    """A stage under way: freeze -> optimiser -> DDP, in this order, anew for every stage."""

    def __init__(self, training: Training, name: str, before: Checkpoint | None) -> None:
        """Set up the stage.

        Args:
            training: the run.
            name: the stage.
            before: the latest checkpoint: of this stage to go on with it, of the one before, or
                None at the start of the run.
        """
        self.training, self.name = training, name
        self.stage = training.recipe.stages[name]
        self.trained = set(self.stage.lr)
        self.stopping = EarlyStopping(self.stage.patience)
        self.epoch: Epoch | None = None
        self.best: State = {}
        self.bests = dict(before.position.bests) if before else {}
        self.epochs_done = before.position.epochs_done if before else 0
        self.steps_done = before.position.steps_done if before else 0
        self.saved = before.position.name if before else None
        resumed = before if before and before.position.stage == name else None
        if resumed:
            training.model.network.load_state_dict(resumed.network)
        freeze(training.model, self.trained)
        groups = parameter_groups(training.model, self.stage)
        self.groups = describe_groups(groups)
        self.model, self.optimizer = training.accelerator.prepare(
            training.model, build_optimizer(training.recipe.optimizer, groups)
        )
        if resumed:
            self._go_on(resumed)
        elif training.accelerator.is_main_process:
            self._print_groups()

    def _go_on(self, resumed: Checkpoint) -> None:
        """Take over the rest of a checkpoint of this stage, written by any number of ranks."""
        position, accelerator = resumed.position, self.training.accelerator
        self.stopping = EarlyStopping(**position.stopping)
        self.best = resumed.best
        load_optimizer_tensors(self.optimizer, resumed.optimizer)
        if accelerator.scaler and position.scaler:
            accelerator.scaler.load_state_dict(position.scaler)
        if len(resumed.buffers):
            modules = trained_modules(self.training.model, self.trained)
            set_buffers(accelerator, modules, resumed.buffers)
        if position.step:
            self.epoch = self._next_epoch()
            self.epoch.go_on(position.step, position.logged_step, resumed.losses, position.taken)

    def _next_epoch(self) -> Epoch:
        plan = self.training.plan(self.name, self.stopping.epoch + 1)
        return Epoch(plan, self.training.accelerator.device)

    def run(self) -> Checkpoint:
        """Train until the epochs or the patience are used up; the last epoch's checkpoint.

        Raises:
            Stopped: a rank was asked to stop; all is saved.
        """
        training = self.training
        total = self.stage.epochs * training.num_images
        done = self.stopping.epoch * training.num_images
        if self.epoch is not None:
            done += int(self.epoch.plan.bounds[self.epoch.step])
        show = training.accelerator.is_main_process
        with progress(total, self.name, "images", show=show, done=done) as bar:
            while True:
                row, speed = self.train_and_validate(bar)
                is_best = self.stopping.update(row["val_loss"])
                checkpoint = self._end_epoch(row, speed, is_best, bar)
                if checkpoint.position.finished:
                    break
        training.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        training.accelerator.free_memory()
        return checkpoint

    def train_and_validate(self, bar: tqdm) -> tuple[dict[str, Any], dict[str, float]]:
        """Train the epoch or what is left of it, and validate.

        Returns:
            The epoch's row of the log, a function of recipe and shards, and its speed.
        """
        training, accelerator = self.training, self.training.accelerator
        began = time.perf_counter()
        row, rate = self.train_epoch(bar)
        model = accelerator.unwrap_model(self.model)
        found = validate(
            accelerator, model, training.material, training.val_plan, self._stop_if_asked
        )
        if not math.isfinite(found["val_loss"]):
            raise RunFailedError(
                f"stage {self.name}, epoch {self.stopping.epoch + 1}: the validation loss is not "
                "finite; nothing was saved or published. Lower the stage's learning rates"
            )
        seconds = round(time.perf_counter() - began, 3)
        return {**row, **found}, {"images_per_second": rate, "seconds": seconds}

    def train_epoch(self, bar: tqdm) -> tuple[dict[str, Any], float]:
        """Take the steps of the epoch that are left; its row of the log, and images a second."""
        accelerator = self.training.accelerator
        self.epoch = epoch = self.epoch or self._next_epoch()
        began, first = time.perf_counter(), epoch.step
        if not epoch.done:
            self._take_steps(epoch, bar)
            average_buffers(accelerator, trained_modules(self.training.model, self.trained))
        taken = epoch.settle(accelerator)
        num_images = int(epoch.plan.bounds[-1] - epoch.plan.bounds[first])
        rate = round(num_images / (time.perf_counter() - began), 2)
        row = {"step": self.steps_done, "loss": epoch.mean_loss(), "taken": f"{taken:016x}"}
        return row, rate

    def _take_steps(self, epoch: Epoch, bar: tqdm) -> None:
        training, accelerator, plan = self.training, self.training.accelerator, epoch.plan
        max_images = training.recipe.max_images_per_rank
        part = read_slice(training.material, plan, epoch.step, accelerator)
        for step in range(epoch.step, plan.num_steps):
            where = f"stage {self.name}, epoch {self.stopping.epoch + 1}, step {step + 1}"
            _seed(training.recipe.seed, where, accelerator.process_index)
            prepare_modes(training.model, self.trained, part)
            with memory_for(part, max_images, where):
                share = backward(accelerator, self.model, part, max_images)
            taken = part
            if step + 1 < plan.num_steps:  # read while a GPU is still busy with this step
                part = read_slice(training.material, plan, step + 1, accelerator)
            update(accelerator, self.optimizer, share, where)
            epoch.count(share, taken)
            self.steps_done += 1
            bar.update(plan.step_size(step))
            if epoch.step % STEPS_PER_LOG_ROW == 0:
                self._log_steps(epoch)
            if not epoch.done:
                self._stop_if_asked()
                if epoch.step % training.recipe.save_steps == 0:
                    self.save(epoch)

    def _log_steps(self, epoch: Epoch) -> None:
        """Log the steps since the last such row: their mean loss, and proof of what was taken."""
        taken = epoch.settle(self.training.accelerator)
        loss = epoch.mean_loss(epoch.logged_step)
        epoch.logged_step = epoch.step
        self._log("step", {"step": self.steps_done, "loss": loss, "taken": f"{taken:016x}"})

    def _stop_if_asked(self) -> None:
        """At a boundary of steps or of validation batches: save and stop if a rank was asked to.

        Raises:
            Stopped: on all ranks together, with the line for the user on the main one.
        """
        if self.training.vote.passed() and self.epoch is not None:
            self.save(self.epoch)
            where = f"stage {self.name}, epoch {self.stopping.epoch + 1}, step {self.epoch.step}"
            line = f"stopped and saved at {where}; run the same command again to go on"
            raise Stopped(line if self.training.accelerator.is_main_process else "")

    def _end_epoch(
        self, row: dict[str, Any], speed: dict[str, float], is_best: bool, bar: tqdm
    ) -> Checkpoint:
        """Log the epoch, then make it last: a checkpoint is written when all else stands."""
        training, stopping = self.training, self.stopping
        main = training.accelerator.is_main_process
        self.epochs_done += 1
        self._log("epoch", row)
        self._log("speed", {"step": self.steps_done, **speed})
        if is_best:
            self.best = {k: on_cpu(v) for k, v in network_state(training.model).items()}
            kept = together(training.accelerator, self._save_best)
            self.bests[self.name] = kept
        if main:
            bar.write(
                f"{self.name} {stopping.epoch}/{self.stage.epochs}: "
                f"loss {row['loss']:.4f}, val loss {row['val_loss']:.4f}, "
                f"{_score(row)}, "
                f"{speed['images_per_second']:.1f} images/s{' (best)' if is_best else ''}"
            )
        together(training.accelerator, lambda: self._note_stage() if main else None)
        self.epoch = None
        return self.save(None)

    def _save_best(self) -> tuple[str, str]:
        """Write the stage's best weights; a new directory, since older checkpoints need theirs."""
        if not self.training.accelerator.is_main_process:
            return "", ""
        return save_best(self.training.run.checkpoints, self.epochs_done, self.best)

    def save(self, epoch: Epoch | None) -> Checkpoint:
        """Write a checkpoint of an epoch under way, or of the end of one; on all ranks together."""
        training, accelerator = self.training, self.training.accelerator
        main, stopping = accelerator.is_main_process, self.stopping
        taken = epoch.settle(accelerator) if epoch else 0
        buffers = torch.zeros(0, 0)
        if epoch and not epoch.done:
            buffers = gather_buffers(accelerator, trained_modules(training.model, self.trained))
        position = Position(
            stage=self.name,
            epoch=stopping.epoch,
            step=epoch.step if epoch else 0,
            epochs_done=self.epochs_done,
            steps_done=self.steps_done,
            log_bytes=settle_log(training.run.log) if main else 0,
            logged_step=epoch.logged_step if epoch else 0,
            taken=taken,
            stopping=stopping.state(),
            finished=not epoch and (stopping.epoch >= self.stage.epochs or stopping.exhausted),
            bests=self.bests,
            scaler=accelerator.scaler.state_dict() if accelerator.scaler else {},
        )
        checkpoint = Checkpoint(
            position,
            {k: on_cpu(v) for k, v in network_state(training.model).items()} if main else {},
            optimizer_tensors(self.optimizer) if main else {},
            buffers,
            epoch.losses[: epoch.step] if epoch else torch.zeros(0, dtype=torch.float64),
            self.best,
        )
        together(accelerator, lambda: self._write(checkpoint) if main else None)
        return checkpoint

    def _write(self, checkpoint: Checkpoint) -> None:
        run, recipe = self.training.run, fixed_recipe(self.training.recipe)
        save_checkpoint(run.checkpoints, checkpoint, recipe, self.saved)
        self.saved = checkpoint.position.name

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
        """Bring run.json up to date with this stage."""
        run, stopping = self.training.run, self.stopping
        info = read_json(run.info)
        frozen = [b for b in _blocks(self.training) if b not in self.trained]
        info["stages"][self.name] = {
            "parameter_groups": self.groups,
            "frozen": frozen,
            "epochs": stopping.epoch,
            "steps": self.steps_done,
            "best_epoch": stopping.best_epoch,
            "best_val_loss": stopping.best_loss,
        }
        write_json(run.info, info)

    def _print_groups(self) -> None:
        rows = [list(map(str, group.values())) for group in self.groups]
        frozen = [[b, "frozen"] for b in _blocks(self.training) if b not in self.trained]
        print(f"\nstage {self.name}: up to {self.stage.epochs} epochs")
        print(table(frozen + rows, list(self.groups[0])))


def _score(row: dict[str, Any]) -> str:
    """The validation score of an epoch for the terminal."""
    if "val_accuracy" in row:
        return f"val accuracy {row['val_accuracy']:.4f}"
    return "val AUROC -" if row["val_auroc"] is None else f"val AUROC {row['val_auroc']:.4f}"


def _blocks(training: Training) -> list[str]:
    return block_names(training.model.network)


def _seed(seed: int, where: str, rank: int) -> None:
    """Seed the dropout of a step, so that a resumed run draws what the unbroken one would."""
    digest = hashlib.sha256(f"{seed}, {where}, rank {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _publish(training: Training) -> None:
    """Say in run.json when the run was finished; then, as its last act, write the model."""
    run = training.run
    write_json(run.info, {**read_json(run.info), "finished": now()})
    with atomic_directory(run.model) as directory:
        save_model(training.model, directory)
