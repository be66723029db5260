"""Train: stages of epochs of steps, each epoch ending in a checkpoint."""

import hashlib
import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from tqdm import tqdm

from cxrdist.config import TrainConfig
from cxrdist.data.index import read_index
from cxrdist.distributed import average_buffers, start, sum_over_ranks, together
from cxrdist.errors import CxrdistError, RunFailedError, refuse_below_one
from cxrdist.model.densenet import block_names, network_state, save_model
from cxrdist.run import (
    RunDirectory,
    append_log,
    atomic_directory,
    locked,
    now,
    read_json,
    write_json,
)
from cxrdist.terminal import progress, table
from cxrdist.train.checkpoint import Checkpoint, Position, State, load_latest, save_checkpoint
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
from cxrdist.train.training import Training, build_training, refuse_other_run

STEPS_PER_LOG_ROW = 50


def train(config: TrainConfig) -> None:
    """Train the recipe's stages in turn and publish the model of the last stage's best epoch.

    Called again with the same run directory it goes on after the last complete epoch.

    Raises:
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
        training = build_training(accelerator, run, config, index)
        if config.track:
            accelerator.init_trackers("cxrdist")
        _run_stages(training)
        if main:
            _publish(training)
            print(f"trained; the model is in {run.model}")
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _refuse_bad_recipe(config: TrainConfig) -> None:
    blocks = [f"denseblock{i + 1}" for i in range(len(config.network.block_config))]
    check_stages(config.stages, ["stem", *blocks, "head"])
    refuse_below_one(config, "global_batch_size", "max_images_per_rank")
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
    checkpoint = together(accelerator, lambda: load_latest(training.run.checkpoints))
    if checkpoint is not None:
        position = checkpoint.position
        accelerator.print(f"going on after {position.stage}, epoch {position.epoch}")
        names = names[names.index(position.stage) + position.finished :]
        training.model.network.load_state_dict(checkpoint.best)
    if accelerator.is_main_process:
        # Rows after the checkpoint belong to an epoch that will be run again.
        with open(training.run.log, "ab") as log:
            log.truncate(checkpoint.position.log_bytes if checkpoint else 0)
    for name in names:
        checkpoint = StageRun(training, name, checkpoint).run()
        training.model.network.load_state_dict(checkpoint.best)


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
        self.best: State = {}
        self.epochs_done = before.position.epochs_done if before else 0
        self.steps_done = before.position.steps_done if before else 0
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
            self.stopping = EarlyStopping(**resumed.position.stopping)
            self.best = resumed.best
            self._load_optimizer(resumed.optimizer)
        elif training.accelerator.is_main_process:
            self._print_groups()

    def run(self) -> Checkpoint:
        """Train until the epochs or the patience are used up; the last epoch's checkpoint."""
        training = self.training
        total = self.stage.epochs * training.num_images
        done = self.stopping.epoch * training.num_images
        show = training.accelerator.is_main_process
        with progress(total, self.name, "images", show=show, done=done) as bar:
            while True:
                row = self.train_and_validate(bar)
                is_best = self.stopping.update(row["val_loss"])
                if is_best:
                    self.best = _on_cpu(network_state(training.model))
                checkpoint = self._end_epoch(row, is_best, bar)
                if checkpoint.position.finished:
                    break
        training.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        training.accelerator.free_memory()
        return checkpoint

    def train_and_validate(self, bar: tqdm) -> dict[str, Any]:
        """Train an epoch and validate; the epoch's row of the log."""
        training, accelerator = self.training, self.training.accelerator
        began = time.perf_counter()
        row = self.train_epoch(bar)
        average_buffers(accelerator, trained_modules(training.model, self.trained))
        model = accelerator.unwrap_model(self.model)
        found = validate(accelerator, model, training.material, training.val_plan)
        if not math.isfinite(found["val_loss"]):
            raise RunFailedError(
                f"stage {self.name}, epoch {self.stopping.epoch + 1}: the validation loss is not "
                "finite; nothing was saved or published. Lower the stage's learning rates"
            )
        seconds = round(time.perf_counter() - began, 3)
        return {**row, **found, "seconds": seconds}

    def train_epoch(self, bar: tqdm) -> dict[str, Any]:
        """Take all steps of the next epoch; the count of steps, mean loss and rate."""
        training, accelerator = self.training, self.training.accelerator
        epoch = self.stopping.epoch + 1
        plan = training.plan(self.name, epoch)
        losses = torch.zeros(plan.num_steps, device=accelerator.device)
        began, num_images = time.perf_counter(), 0
        part = read_slice(training.material, plan, 0, accelerator)
        for step in range(plan.num_steps):
            where = f"stage {self.name}, epoch {epoch}, step {step + 1}"
            _seed(training.recipe.seed, where, accelerator.process_index)
            prepare_modes(training.model, self.trained, part)
            losses[step] = backward(
                accelerator, self.model, part, training.recipe.max_images_per_rank
            )
            if step + 1 < plan.num_steps:  # read while a GPU is still busy with this step
                part = read_slice(training.material, plan, step + 1, accelerator)
            update(accelerator, self.optimizer, losses[step], where)
            self.steps_done += 1
            num_images += plan.step_size(step)
            bar.update(plan.step_size(step))
            if (step + 1) % STEPS_PER_LOG_ROW == 0:
                recent = losses[step + 1 - STEPS_PER_LOG_ROW : step + 1]
                rate = num_images / (time.perf_counter() - began)
                self._log("step", {"step": self.steps_done, **self._loss(recent, rate)})
        rate = num_images / (time.perf_counter() - began)
        return {"step": self.steps_done, **self._loss(losses, rate)}

    def _loss(self, losses: torch.Tensor, rate: float) -> dict[str, float]:
        """Mean loss of some steps over all ranks, and images a second."""
        mean = sum_over_ranks(self.training.accelerator, losses).mean()
        return {"loss": float(mean), "images_per_second": round(rate, 2)}

    def _end_epoch(self, row: dict[str, Any], is_best: bool, bar: tqdm) -> Checkpoint:
        """Log the epoch, then make it last: a checkpoint is written when all else stands."""
        training, stopping = self.training, self.stopping
        self.epochs_done += 1
        self._log("epoch", row)
        main = training.accelerator.is_main_process
        position = Position(
            stage=self.name,
            epoch=stopping.epoch,
            epochs_done=self.epochs_done,
            steps_done=self.steps_done,
            log_bytes=training.run.log.stat().st_size if main else 0,
            stopping=stopping.state(),
            finished=stopping.epoch >= self.stage.epochs or stopping.exhausted,
        )
        network = _on_cpu(network_state(training.model))
        checkpoint = Checkpoint(position, network, self.best, self._optimizer_state())
        if main:
            bar.write(
                f"{self.name} {stopping.epoch}/{self.stage.epochs}: "
                f"loss {row['loss']:.4f}, val loss {row['val_loss']:.4f}, "
                f"{_score(row)}, "
                f"{row['images_per_second']:.1f} images/s{' (best)' if is_best else ''}"
            )
            self._note_stage()
            save_checkpoint(training.run.checkpoints, checkpoint)
        training.accelerator.wait_for_everyone()
        return checkpoint

    def _log(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row to log.jsonl and give its numbers to the trackers."""
        training = self.training
        if training.accelerator.is_main_process:
            where = {"kind": kind, "stage": self.name}
            epoch = self.stopping.epoch + (kind == "step")
            append_log(training.run.log, {**where, "epoch": epoch, **row})
        if training.recipe.track:
            values = {f"{kind}/{k}": v for k, v in row.items() if k != "step" and v is not None}
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

    def _optimizer_state(self) -> dict[str, Any]:
        scaler = self.training.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        scaler = self.training.accelerator.scaler
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])


def _score(row: dict[str, Any]) -> str:
    """The validation score of an epoch for the terminal."""
    if "val_accuracy" in row:
        return f"val accuracy {row['val_accuracy']:.4f}"
    return "val AUROC -" if row["val_auroc"] is None else f"val AUROC {row['val_auroc']:.4f}"


def _blocks(training: Training) -> list[str]:
    return block_names(training.model.network)


def _on_cpu(state: State) -> State:
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}


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
