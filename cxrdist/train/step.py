"""One optimiser step over all ranks, and the validation after an epoch."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cxrdist.data.cache import Images, read_rows
from cxrdist.data.plan import Draws, Plan
from cxrdist.distributed import gather, sum_over_ranks
from cxrdist.errors import RunFailedError
from cxrdist.evaluate.metrics import mean_auroc
from cxrdist.model.augment import warp
from cxrdist.model.densenet import Classifier
from cxrdist.train.stages import set_modes

VAL_IMAGES_PER_PASS = 64


@dataclass(frozen=True)
class Material:
    """What is learnt from.

    Attributes:
        images: uint8 [samples, size, size].
        targets: uint8 [samples, classes], 1 where a sample has the label.
        task: multiclass or multilabel.
    """

    images: Images
    targets: NDArray[np.uint8]
    task: str


@dataclass(frozen=True)
class Slice:
    """A rank's part of a step, on its device.

    Attributes:
        images: uint8 [B, 1, H, W], B is at least 1.
        targets: float32 [B, classes], 1 where an image has the label.
        draws: warps of the B images.
        rows: of the plan.
        step_size: images of the step over all ranks.
        weight: 1, or 0 on a rank for which the step has no image; it still takes part.
    """

    images: Tensor
    targets: Tensor
    draws: Draws
    rows: slice
    step_size: int
    weight: float


def read_slice(material: Material, plan: Plan, step: int, accelerator: Accelerator) -> Slice:
    """Read this rank's part of a step."""
    rows = plan.rank_rows(step, accelerator.process_index, accelerator.num_processes)
    weight = 1.0
    if rows.start == rows.stop:
        first = int(plan.bounds[step])
        rows, weight = slice(first, first + 1), 0.0
    images, targets = _read(material, plan, rows, accelerator.device)
    return Slice(images, targets, plan.draws.rows(rows), rows, plan.step_size(step), weight)


def _read(
    material: Material, plan: Plan, rows: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    numbers = plan.samples[rows]
    targets = torch.from_numpy(material.targets[numbers]).float().to(device, non_blocking=True)
    return read_rows(material.images, numbers, device), targets


def backward(
    accelerator: Accelerator, model: nn.Module, part: Slice, max_images: int | None
) -> Tensor:
    """Add the gradients of a step; DDP's mean over ranks is then the mean over the step's images.

    Each rank weights its loss by world size / images of the step, since slices may differ by an
    image. Micro-batches synchronise once, with the last.

    Args:
        accelerator: of this rank.
        model: as `accelerator.prepare` gave it.
        part: this rank's slice.
        max_images: images of one forward pass; None for all.

    Returns:
        This rank's share of the loss, float32 []; the shares of all ranks add up to the mean
        binary cross-entropy over images and classes (paper, section 3.3), on logits.
    """
    num_images = len(part.images)
    num_passes = -(-num_images // max_images) if max_images else 1
    bounds = [num_images * i // num_passes for i in range(num_passes + 1)]
    total = torch.zeros((), device=accelerator.device)
    for i in range(num_passes):
        rows = slice(bounds[i], bounds[i + 1])
        last = i == num_passes - 1
        with nullcontext() if last else accelerator.no_sync(model):
            logits = model(warp(part.images[rows], part.draws.rows(rows)))
            loss = binary_cross_entropy_with_logits(
                logits.float(), part.targets[rows], reduction="sum"
            )
            share = loss * (part.weight / (part.step_size * part.targets.shape[1]))
            accelerator.backward(share * accelerator.num_processes)
        total += share.detach()
    return total


def update(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, share: Tensor, where: str
) -> None:
    """Take the optimiser step if all is finite.

    Args:
        accelerator: of this rank.
        optimizer: as `accelerator.prepare` gave it.
        share: this rank's share of the loss.
        where: the step's name for the message.

    Raises:
        RunFailedError: a gradient, or with fp16's scaled gradients the loss, is not finite. After
            DDP a NaN of one rank is in the gradients of all, so all stop together.
    """
    if accelerator.scaler is None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        watched = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    else:
        watched = sum_over_ranks(accelerator, share)
    if not bool(torch.isfinite(watched)):
        raise RunFailedError(
            f"{where}: the loss or a gradient is not finite; nothing was updated or published. "
            "Lower the stage's learning rates, or train without mixed precision"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def prepare_modes(model: Classifier, trained: set[str], part: Slice) -> None:
    """Set the modes of a step; a rank without an image must not move its BatchNorm statistics."""
    set_modes(model, trained if part.weight else set())


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    material: Material,
    plan: Plan,
    at_boundary: Callable[[], None],
) -> dict[str, Any]:
    """Mean loss and score over a plan of the validation split, each row once.

    Args:
        accelerator: of this rank.
        model: unwrapped: DDP would wait for ranks that have no batch.
        material: images and targets.
        plan: the expanded validation split, the same in every epoch.
        at_boundary: called before each batch, on all ranks as often; may stop them all.

    Returns:
        val_loss: mean binary cross-entropy over rows and classes. With it val_accuracy: the share
        of rows whose largest logit is the label's; or, of several labels an image, val_auroc: the
        mean over the labels that some rows have and some have not, None if there is no such one.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    rows_seen = []
    starts = range(0, len(plan.samples), VAL_IMAGES_PER_PASS)
    for turn in range(0, len(starts), accelerator.num_processes):
        at_boundary()
        if turn + accelerator.process_index >= len(starts):
            continue
        start = starts[turn + accelerator.process_index]
        rows = slice(start, min(start + VAL_IMAGES_PER_PASS, len(plan.samples)))
        images, targets = _read(material, plan, rows, accelerator.device)
        logits = model(warp(images, plan.draws.rows(rows))).float()
        loss = binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        sums += torch.stack([loss.double(), correct.double()])
        if material.task == "multilabel":
            rows_seen.append((start, logits.cpu(), targets.cpu()))
    loss_sum, num_correct = sum_over_ranks(accelerator, sums).tolist()
    num_rows, num_classes = len(plan.samples), material.targets.shape[1]
    val_loss = loss_sum / (num_rows * num_classes)
    if material.task == "multiclass":
        return {"val_loss": val_loss, "val_accuracy": num_correct / num_rows}
    rows_of_all = sorted(gather(accelerator, rows_seen), key=lambda row: row[0])
    _, all_logits, all_targets = zip(*rows_of_all, strict=True)
    return {
        "val_loss": val_loss,
        "val_auroc": mean_auroc(torch.sigmoid(torch.cat(all_logits)), torch.cat(all_targets)),
    }
