"""Checkpoints: resumable states that appear by rename when they are complete."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cxrdist.errors import CxrdistError
from cxrdist.run import atomic_directory

CHECKPOINT_FORMAT = "cxrdist-checkpoint-3"
_NAME = re.compile(r"^\d{5}-\d{7}$")
_STATE, _POSITION = "state.safetensors", "position.json"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        stage: name of the stage.
        epoch: epochs done in it.
        step: steps done in the epoch under way; with all of them done it waits for validation.
        epochs_done: epochs done in all stages.
        steps_done: optimiser steps in all stages.
        log_bytes: length of log.jsonl; what a killed run wrote after it is cut off on resuming.
        logged_step: the step of the epoch up to which the log has a row.
        taken: digest of the images that the epoch has taken (Plan.digest).
        skipped: steps in a row that the gradient scaler has skipped last.
        stopping: state of the early stopping.
        finished: whether the stage is over.
        bests: of each stage, the directory and sha256 of its best weights.
        scaler: state of the gradient scaler, for fp16.
    """

    stage: str
    epoch: int
    step: int
    epochs_done: int
    steps_done: int
    log_bytes: int
    logged_step: int
    taken: int
    skipped: int
    stopping: dict[str, Any]
    finished: bool
    bests: dict[str, tuple[str, str]]
    scaler: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the checkpoint's directory; names sort in the order of time."""
        return f"{self.epochs_done:05d}-{self.step:07d}"


@dataclass(frozen=True)
class Checkpoint:
    """A position with its weights and the optimiser's state.

    Attributes:
        position: how far the run has come.
        network: the weights.
        optimizer: tensors of the optimiser's state, named PLACE.NAME.
        average: the moving average of the weights; empty where the recipe has none.
        losses: float64 [step], mean loss of each step of the epoch under way.
        best: weights of the stage's best epoch; empty before there is one.
    """

    position: Position
    network: State
    optimizer: State
    average: State
    losses: Tensor
    best: State = field(default_factory=dict)


def save_best(directory: Path, epochs_done: int, network: State) -> tuple[str, str]:
    """Write the best weights of a stage beside the checkpoints; their directory and sha256."""
    name = f"best-{epochs_done:05d}"
    content = save(network)
    with atomic_directory(directory / name) as partial:
        (partial / "network.safetensors").write_bytes(content)
    return name, _sha256(content)


def save_checkpoint(
    directory: Path, checkpoint: Checkpoint, recipe: str, before: str | None
) -> None:
    """Write a checkpoint; then remove all but this one, the one before, and what they refer to.

    Args:
        directory: of all checkpoints.
        checkpoint: to be written; its best weights are not, see `save_best`.
        recipe: text of the recipe.
        before: name of the checkpoint that was written or resumed from last.
    """
    position = checkpoint.position
    tensors = {f"network.{k}": v for k, v in checkpoint.network.items()}
    tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}
    tensors |= {f"average.{k}": v for k, v in checkpoint.average.items()}
    content = save(tensors | {"losses": checkpoint.losses})
    about = {
        "format": CHECKPOINT_FORMAT,
        "recipe_sha256": _sha256(recipe.encode()),
        "state_sha256": _sha256(content),
        "position": asdict(position),
    }
    about["sha256"] = _sha256_of(about)
    with atomic_directory(directory / position.name) as partial:
        (partial / _STATE).write_bytes(content)
        (partial / _POSITION).write_text(json.dumps(about, indent=2) + "\n")
    kept = {position.name, before, *(name for name, _ in position.bests.values())}
    if before is not None:
        kept |= _bests_of(directory / before)
    for other in directory.iterdir():
        if other.name not in kept:
            shutil.rmtree(other)


def _bests_of(checkpoint: Path) -> set[str]:
    """Directories of the best weights that a checkpoint of this run refers to."""
    try:
        bests = json.loads((checkpoint / _POSITION).read_text())["position"]["bests"]
    except FileNotFoundError:
        return set()
    return {name for name, _ in bests.values()}


def has_checkpoint(directory: Path) -> bool:
    """Whether a checkpoint was written, whole or damaged by now."""
    return directory.is_dir() and any(_NAME.match(path.name) for path in directory.iterdir())


def load_latest(directory: Path, recipe: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Read the latest whole checkpoint; None where there is none.

    Args:
        directory: of all checkpoints.
        recipe: text of the recipe.
        say: is told of each damaged checkpoint that is passed over.

    Raises:
        CxrdistError: the latest is of another recipe, or of another format of cxrdist.
    """
    if not directory.is_dir():
        return None
    for path in sorted(directory.iterdir(), reverse=True):
        if not _NAME.match(path.name):
            continue
        try:
            return _load(path, recipe)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            if isinstance(error, CxrdistError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{path}: the checkpoint is damaged ({reason:.100}); going on from one before it")
    return None


def _load(path: Path, recipe: str) -> Checkpoint:
    about = json.loads((path / _POSITION).read_text())
    if about.pop("sha256") != _sha256_of(about):
        raise ValueError(f"{_POSITION} is not what was written")
    if about["format"] != CHECKPOINT_FORMAT:
        raise CxrdistError(
            f"{path}: has format {about['format']!r}, expected {CHECKPOINT_FORMAT!r}; go on with "
            "the version of cxrdist that wrote it, or remove it"
        )
    if about["recipe_sha256"] != _sha256(recipe.encode()):
        raise CxrdistError(
            f"{path}: is a checkpoint of another recipe; remove it, or give the recipe that it "
            "was made with"
        )
    fields = about["position"]
    bests = {stage: (name, digest) for stage, (name, digest) in fields["bests"].items()}
    position = Position(**{**fields, "bests": bests})
    tensors = _read(path / _STATE, about["state_sha256"])
    best: State = {}
    if position.stage in bests:
        name, digest = bests[position.stage]
        best = _read(path.parent / name / "network.safetensors", digest)
    return Checkpoint(
        position,
        _with_prefix(tensors, "network."),
        _with_prefix(tensors, "optimizer."),
        _with_prefix(tensors, "average."),
        tensors["losses"],
        best,
    )


def _read(path: Path, digest: str) -> State:
    """Read tensors, and nothing that could run code, if they are the bytes that were written."""
    content = path.read_bytes()
    if _sha256(content) != digest:
        raise ValueError(f"{path.parent.name}/{path.name} is not what was written")
    return load(content)


def _with_prefix(tensors: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(about: dict[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True).encode())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> State:
    """The state of an optimiser without its groups, which the recipe makes anew, on the CPU."""
    return {
        f"{place}.{name}": on_cpu(value)
        for place, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: State) -> None:
    """Give a new optimiser the state that `optimizer_tensors` took.

    Each tensor gets the memory layout of its parameter: fused kernels read both element by element,
    and on a GPU parameters are channels_last.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        place, name = key.split(".", 1)
        parameter = parameters[int(place)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = value.to(parameter.device)


def on_cpu(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()
