"""Checkpoints: resumable states that appear by rename when they are complete."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cxrdist.documents import Between, parse_json, typed
from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.files import atomic_directory, read_bytes
from cxrdist.info import Count

CHECKPOINT_FORMAT = "cxrdist-checkpoint-3"
_NAME = re.compile(r"\d{5,}-\d{7,}")
_BEST = re.compile(r"best-\d{5,}")
_STATE, _POSITION = "state.safetensors", "position.json"

# Tensors that PyTorch keeps per parameter.
_STATES: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
_MOST_POSITION_BYTES = 1 << 20  # with the best weights of 10,000 stages
_MOST_STATE_BYTES = 32 << 30  # of a network of 2 billion parameters; CheXNet has 7 million

State = dict[str, Tensor]


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        epoch: epochs done in the stage.
        step: steps done in the epoch under way; with all of them done it waits for validation.
        epochs_done: epochs done in all stages.
        steps_done: optimiser steps in all stages.
        log_bytes: length of log.jsonl; what a killed run wrote after it is cut off on resuming.
        logged_step: the step of the epoch up to which the log has a row.
        taken: digest of the images that the epoch has taken (Plan.digest).
        skipped: how many of the latest steps in a row the gradient scaler has skipped.
        stopping: the fields of `EarlyStopping`.
        finished: whether the stage is over.
        bests: of each stage, the directory and sha256 of its best weights.
        seconds: how long the epoch under way has taken; 0 in checkpoints of older versions.
    """

    stage: str
    epoch: Count
    step: Count
    epochs_done: Count
    steps_done: Count
    log_bytes: Count
    logged_step: Count
    taken: int
    skipped: Count
    stopping: dict[str, int | float]
    finished: bool
    bests: dict[str, tuple[str, str]]
    scaler: dict[str, int | float]
    seconds: Annotated[float, Between(0)] = 0.0

    @property
    def name(self) -> str:
        """Return the name of the checkpoint's directory; its numbers sort in the order of time."""
        return f"{self.epochs_done:05d}-{self.step:07d}"


@dataclass(frozen=True)
class _Document:
    """The content of position.json, without its own sha256, which covers all the rest."""

    format: str
    recipe_sha256: str
    state_sha256: str
    position: Position


@dataclass(frozen=True)
class Checkpoint:
    """A position with its weights and the optimiser's state.

    Attributes:
        optimizer: tensors of the optimiser's state, named PARAMETER.NAME.
        average: the moving average of the weights; empty if the recipe has none.
        losses: float64 [step], mean loss of each step of the epoch under way.
        penalties: float64 [step], mean penalty of each of these steps.
        best: weights of the stage's best epoch; empty before there is one.
    """

    position: Position
    network: State
    optimizer: State
    average: State
    losses: Tensor
    penalties: Tensor
    best: State = field(default_factory=dict)


def save_best(directory: Path, number: int, network: State) -> tuple[str, str]:
    """Write the best weights of a stage beside the checkpoints; return directory and sha256."""
    name = f"best-{number:05d}"
    content = save(network)
    with atomic_directory(directory / name) as partial:
        (partial / "network.safetensors").write_bytes(content)
    return name, _sha256(content)


def save_checkpoint(
    directory: Path, checkpoint: Checkpoint, recipe: str, before: Position | None
) -> None:
    """Write a checkpoint; then remove all but this one, the one before, and what they refer to.

    Only directories with the name of a checkpoint or of best weights are removed: whatever else
    is there belongs to somebody else. The checkpoint's best weights are written by `save_best`.
    `before` is the checkpoint that was written or resumed from last.
    """
    position = checkpoint.position
    tensors = {f"network.{k}": v for k, v in checkpoint.network.items()}
    tensors |= {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}
    tensors |= {f"average.{k}": v for k, v in checkpoint.average.items()}
    content = save(tensors | {"losses": checkpoint.losses, "penalties": checkpoint.penalties})
    document = _Document(CHECKPOINT_FORMAT, _sha256(recipe.encode()), _sha256(content), position)
    written = asdict(document)
    written["sha256"] = _sha256_of(written)
    with atomic_directory(directory / position.name) as partial:
        (partial / _STATE).write_bytes(content)
        (partial / _POSITION).write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
    # The one before stays, so that `load_latest` can resume from it if this one is damaged.
    kept = {name for p in (position, before) if p for name in (p.name, *_bests_of(p))}
    for path in _directories(directory, _NAME) + _directories(directory, _BEST):
        if path.name not in kept:
            # On NFS a file that a dead process had open stays for a while; later saves try again.
            shutil.rmtree(path, ignore_errors=True)


def _bests_of(position: Position) -> list[str]:
    """List the directories of best weights that a checkpoint refers to."""
    return [name for name, _ in position.bests.values()]


def _directories(directory: Path, name: re.Pattern[str]) -> list[Path]:
    """List the directories whose names match, sorted by their numbers, without links."""
    paths = [
        path
        for path in directory.iterdir()
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])


def has_checkpoint(directory: Path) -> bool:
    """Return whether a checkpoint was written, even if it is damaged now."""
    return directory.is_dir() and bool(_directories(directory, _NAME))


def load_latest(directory: Path, recipe: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Read the latest undamaged checkpoint; return None without one.

    `say` gets a line per damaged one, and another if none is left.

    Raises:
        CxrdistError: the latest is of another recipe, or of another format of cxrdist.
    """
    if not directory.is_dir():
        return None
    paths = _directories(directory, _NAME)
    for path in reversed(paths):
        try:
            return _load(path, recipe)
        except (OSError, ValueError, SafetensorError) as error:
            # Also a ValueError, but no damage: resuming from an older checkpoint would be wrong.
            if isinstance(error, CxrdistError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{path}: the checkpoint is damaged ({reason:.100}); skipped")
    if paths:
        say(f"{directory}: no whole checkpoint is left; the training starts from the beginning")
    return None


def _load(path: Path, recipe: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError, OSError, SafetensorError: it is damaged.
        CxrdistError: it is of another recipe or format.
    """
    written = typed(parse_json(_read(path / _POSITION, _MOST_POSITION_BYTES)), dict[str, Any])
    # The hash first: a damaged checkpoint is skipped, but one of another format is an error.
    if written.pop("sha256", None) != _sha256_of(written):
        raise ValueError(f"{_POSITION} was changed after it was written")
    if written.get("format") != CHECKPOINT_FORMAT:
        raise CxrdistError(
            f"{path}: has format {written.get('format')!r}, expected {CHECKPOINT_FORMAT!r}; resume "
            "with the version of cxrdist that wrote it, or remove it"
        )
    document = typed(written, _Document)
    if document.recipe_sha256 != _sha256(recipe.encode()):
        raise CxrdistError(
            f"{path}: is a checkpoint of another recipe; remove it, or give the recipe that it "
            "was made with"
        )
    position = document.position
    # Names of best weights become paths, which must not lead out of the directory.
    if position.name != path.name or not all(map(_BEST.fullmatch, _bests_of(position))):
        raise ValueError(f"{_POSITION} is not that of this directory")
    tensors = _read_tensors(path / _STATE, document.state_sha256)
    # Older versions had no penalties.
    tensors.setdefault("penalties", torch.zeros(position.step, dtype=torch.float64))
    for name in ("losses", "penalties"):
        if name not in tensors or tensors[name].shape != (position.step,):
            raise ValueError(f"{_STATE} does not hold the {name} of {position.step} steps")
    best: State = {}
    if position.stage in position.bests:
        name, digest = position.bests[position.stage]
        best = _read_tensors(path.parent / name / "network.safetensors", digest)
    return Checkpoint(
        position,
        _with_prefix(tensors, "network."),
        _with_prefix(tensors, "optimizer."),
        _with_prefix(tensors, "average."),
        tensors["losses"],
        tensors["penalties"],
        best,
    )


def _read_tensors(path: Path, digest: str) -> State:
    """Read tensors if the file has the digest; safetensors cannot hold code."""
    content = _read(path, _MOST_STATE_BYTES)
    if _sha256(content) != digest:
        raise ValueError(f"{path.parent.name}/{path.name} was changed after it was written")
    return load(content)


def _read(path: Path, most: int) -> bytes:
    """Read a file of a checkpoint; one that is too large or not a file counts as damage."""
    # `read_bytes` rejects a link as the file only, not as a directory above it.
    if path.parent.is_symlink():
        raise ValueError(f"{path.parent.name} is a link")
    try:
        return read_bytes(path, most)
    except CxrdistError as error:
        raise ValueError(str(error).replace(f"{path}:", path.name)) from error


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Turn an error while a checkpoint is restored into one line, a CxrdistError."""
    try:
        yield
    # These are a ValueError and a RuntimeError as well, but already one line.
    except (CxrdistError, RunFailedError):
        raise
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CxrdistError(
            f"checkpoints/{name}: does not fit the recipe and the network ({reason:.200}); remove "
            "it to resume from the one before it"
        ) from error


def load_network(network: torch.nn.Module, state: State) -> None:
    """Load the weights of a checkpoint into a network; raises as `refuse_others`."""
    refuse_others(state, network.state_dict())
    network.load_state_dict(state)


def refuse_others(state: State, expected: State) -> None:
    """Raise ValueError if a tensor is missing, not expected, or of another shape or type."""
    for name in state.keys() | expected.keys():
        tensor, like = state.get(name), expected.get(name)
        if tensor is None or like is None:
            raise ValueError(f"{name} is {'missing' if tensor is None else 'not expected'}")
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")


def _with_prefix(tensors: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(document: dict[str, Any]) -> str:
    return _sha256(json.dumps(document, sort_keys=True).encode())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> State:
    """Copy an optimiser's state to the CPU, without its groups, which the recipe defines."""
    return {
        f"{number}.{name}": on_cpu(value)
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: State) -> None:
    """Load what `optimizer_tensors` copied into a new optimiser, or raise ValueError.

    Each tensor gets the memory layout of its parameter: fused kernels read both element by element,
    and parameters are channels_last.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # An optimiser's `state_dict` numbers its parameters through all groups in their order.
    by_number = {str(number): parameter for number, parameter in enumerate(parameters)}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter, names = by_number.get(number), _STATES[type(optimizer)]
        if parameter is None or any(f"{number}.{n}" not in tensors for n in names):
            raise ValueError(f"optimizer.{key} is of no parameter, or others are missing")
        # The other states have the shape of their parameter; AdamW's `step` is a single number.
        like_parameter = value.shape == parameter.shape
        if (
            name not in names
            or value.dtype != torch.float32
            or not (like_parameter or value.numel() == 1)
        ):
            raise ValueError(f"optimizer.{key} is {value.dtype} {tuple(value.shape)}")
        if like_parameter:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = value.to(parameter.device)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU."""
    # Copied, as on a CPU the next steps change the tensor. Contiguous, as safetensors takes no
    # tensor in channels_last.
    return tensor.detach().to("cpu", copy=True).contiguous()
