"""Checkpoints: resumable states that appear by rename when they are complete."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_directory

CHECKPOINT_FORMAT = "cxrdist-checkpoint-1"
_NAME = re.compile(r"^\d{6}$")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """How far a run has come, when the epoch that it names is done.

    Attributes:
        stage: name of the stage.
        epoch: epochs done in it.
        epochs_done: epochs done in all stages; the checkpoint's name.
        steps_done: optimiser steps in all stages.
        log_bytes: length of log.jsonl; what a killed run wrote after it is cut off on resuming.
        stopping: state of the early stopping.
        finished: whether the stage is over.
    """

    stage: str
    epoch: int
    epochs_done: int
    steps_done: int
    log_bytes: int
    stopping: dict[str, Any]
    finished: bool


@dataclass(frozen=True)
class Checkpoint:
    """A position with its weights and the optimiser's state.

    Attributes:
        position: how far the run has come.
        network: weights after the epoch.
        best: weights of the stage's best epoch.
        optimizer: state of the optimiser and, for fp16, of the gradient scaler.
    """

    position: Position
    network: State
    best: State
    optimizer: dict[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then remove the one before it."""
    name = f"{checkpoint.position.epochs_done:06d}"
    with atomic_directory(directory / name) as partial:
        save_file(checkpoint.network, partial / "network.safetensors")
        save_file(checkpoint.best, partial / "best.safetensors")
        torch.save(checkpoint.optimizer, partial / "optimizer.pt")
        about = {"format": CHECKPOINT_FORMAT, **asdict(checkpoint.position)}
        (partial / "position.json").write_text(json.dumps(about, indent=2) + "\n")
    for other in directory.iterdir():
        if other.name != name:
            shutil.rmtree(other)


def load_latest(directory: Path) -> Checkpoint | None:
    """Read the latest complete checkpoint; None where there is none.

    Raises:
        CxrdistError: its files are damaged.
    """
    names = (
        sorted(p.name for p in directory.iterdir() if _NAME.match(p.name))
        if (directory.is_dir())
        else []
    )
    if not names:
        return None
    latest = directory / names[-1]
    try:
        about = json.loads((latest / "position.json").read_text())
        if about.pop("format") != CHECKPOINT_FORMAT:
            raise ValueError("format of another version")
        return Checkpoint(
            Position(**about),
            load_file(latest / "network.safetensors"),
            load_file(latest / "best.safetensors"),
            torch.load(latest / "optimizer.pt", map_location="cpu", weights_only=True),
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CxrdistError(
            f"{latest}: the checkpoint is damaged ({str(error).splitlines()[0]:.100}); "
            "remove it to start from what stands before it"
        ) from error
