"""The slice of each step that a rank takes, and the validation after an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cxrdist.data.cache import Images, read_rows
from cxrdist.data.foreground import Foreground
from cxrdist.data.labels import UNCERTAIN
from cxrdist.data.plan import Plan, cut
from cxrdist.distributed import gather
from cxrdist.evaluate.metrics import mean_auroc
from cxrdist.model.augment import sampling_matrices, warp
from cxrdist.model.densenet import Classifier
from cxrdist.train.background import BackgroundLoss
from cxrdist.train.learner import sum_of_losses

VAL_IMAGES_PER_PASS = 64  # for any number of ranks, so that logits do not depend on it
PENALTIES_PER_PASS = 8
"""Images whose penalty is computed at once in the validation: a map takes several times the memory
of a prediction."""


@dataclass(frozen=True)
class TrainingData:
    """Images and labels that a run is trained and validated on.

    Attributes:
        images: uint8 [samples, size, size].
        targets: int8 [samples, classes], 1 where a sample has the label, below 0 where that is not
            known, or is left out of the loss.
        task: multiclass or multilabel.
    """

    images: Images
    targets: NDArray[np.int8]
    task: str


class Batches:
    """A plan with what its steps need on the device, except the images, which are staged.

    Attributes:
        data: images and labels that the rows are of.
        plan: which rows a step takes.
        matrices: float32 [n, 2, 3], how each row is warped.
        targets: float32 [n, classes], 1 where a row's image has the label, -1 where unknown.
        num_known: int64 [steps], known labels of all images of each step, over all ranks.
    """

    def __init__(self, data: TrainingData, plan: Plan, device: torch.device) -> None:
        """Move the plan's draws and targets to the device."""
        self.data, self.plan = data, plan
        self.matrices = sampling_matrices(plan.draws, data.images.shape[1], device)
        targets = data.targets[plan.samples]
        # `reduceat` gives the sum of a step only if it is not empty, and no step of a plan is.
        self.num_known = np.add.reduceat((targets >= 0).sum(axis=1), plan.bounds[:-1])
        unknown_alike = torch.from_numpy(np.maximum(targets, UNCERTAIN))
        self.targets = unknown_alike.float().to(device)


class Staging:
    """Two host buffers: one is filled while the device still copies images from the other."""

    def __init__(self, rows: Images | Foreground, size_px: int, most: int, device: torch.device):
        """Make buffers for at most `most` images at once, from uint8 [samples, size, size]."""
        self._rows, self._device, self._turn = rows, device, 0
        self._pinned = device.type == "cuda"
        shape = (2, most, 1, size_px, size_px)
        self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def read(self, numbers: NDArray[np.int64]) -> Tensor:
        """Bring the images of B samples to the device.

        Returns:
            uint8 [B, 1, size, size]; on a CPU the buffer itself, valid until the read after next.
        """
        turn, self._turn = self._turn, 1 - self._turn
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        here = self._buffers[turn, : len(numbers)]
        if isinstance(self._rows, Foreground):
            here[:, 0].numpy()[...] = self._rows[numbers]
        else:
            # The default mode, raise, would gather into another buffer first; numbers are in range.
            np.take(self._rows, numbers, axis=0, out=here[:, 0].numpy(), mode="clip")
        if not self._pinned:
            return here
        there = here.to(self._device, non_blocking=True)
        self._copied[turn] = copied = torch.cuda.Event()
        copied.record()
        return there


@dataclass(frozen=True)
class Slice:
    """A rank's part of a step, on its device.

    Attributes:
        images: uint8 [B, 1, H, W], B is at least 1.
        matrices: float32 [B, 2, 3], their warps.
        targets: float32 [B, classes], 1 where an image has the label, -1 where that is not known.
        foreground: uint8 [B, 1, H, W], what may be used; None without a background loss.
        rows: of the plan that are this rank's; empty where the step has no image for it. The rank
            still takes part, with one image of weight 0.
        sizes: images of each rank.
        num_known: known labels of the images of all ranks.
        turn: 0 or 1, the same on all ranks: which of its two shares the background loss takes.
    """

    images: Tensor
    matrices: Tensor
    targets: Tensor
    foreground: Tensor | None
    rows: slice
    sizes: tuple[int, ...]
    num_known: int
    turn: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of a `Learner`."""
        inputs = (self.images, self.matrices, self.targets)
        return inputs if self.foreground is None else (*inputs, self.foreground)


def read_slice(
    batches: Batches,
    staging: Staging,
    foregrounds: Staging | None,
    step: int,
    turn: int,
    accelerator: Accelerator,
) -> Slice:
    """Read this rank's part of a step, with foregrounds in a stage with a background loss."""
    plan, world_size = batches.plan, accelerator.num_processes
    all_rows = [plan.rank_rows(step, rank, world_size) for rank in range(world_size)]
    rows = all_rows[accelerator.process_index]
    # An empty slice may begin after the last row.
    first = min(rows.start, len(plan.samples) - 1)
    taken = slice(first, max(rows.stop, first + 1))  # at least one
    return Slice(
        staging.read(plan.samples[taken]),
        batches.matrices[taken],
        batches.targets[taken],
        None if foregrounds is None else foregrounds.read(plan.samples[taken]),
        rows,
        tuple(r.stop - r.start for r in all_rows),
        int(batches.num_known[step]),
        turn,
    )


@dataclass(frozen=True)
class Pass:
    """The rows of a slice that go through the network at once.

    Attributes:
        rows: of the slice, at least one.
        weight: 1, or 0 for a row that only keeps the rank in step with the others.
        sizes: images of each rank that count.
    """

    rows: slice
    weight: float
    sizes: tuple[int, ...]


def num_passes(sizes: Sequence[int], max_images: int | None) -> int:
    """Return the passes of a step whose ranks have `sizes` images, at most `max_images` in each."""
    return -(-max(sizes) // max_images) if max_images else 1


def passes_of(batch: Slice, rank: int, max_images: int | None) -> Iterator[Pass]:
    """Cut a slice into equal passes, the same number on each rank: BatchNorm waits for all."""
    count = num_passes(batch.sizes, max_images)
    for i in range(count):
        cuts = [cut(size, i, count) for size in batch.sizes]
        sizes = tuple(rows.stop - rows.start for rows in cuts)
        yield Pass(cuts[rank], 1.0, sizes) if sizes[rank] else Pass(slice(0, 1), 0.0, sizes)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: Classifier,
    batches: Batches,
    at_boundary: Callable[[], None],
    background: BackgroundLoss | None,
) -> dict[str, Any]:
    """Compute the mean loss and score over the validation plan, each row once, in float32.

    The model is the network itself, as DDP would wait for ranks that have no batch. `at_boundary`
    is called before each batch, the same number of times on every rank, and may stop them all.

    Returns:
        val_loss: mean binary cross-entropy over the known labels of all rows; with a background
        loss plus its weight times val_background, the mean penalty of all rows. For one label per
        image val_accuracy: share of rows whose largest logit is the label's. For several labels
        val_auroc: mean over the labels that some rows are known to have and some not to have, None
        if there is none.
    """
    model.eval()
    data, plan, device = batches.data, batches.plan, accelerator.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    mine = []
    starts = range(0, len(plan.samples), VAL_IMAGES_PER_PASS)
    for turn in range(0, len(starts), accelerator.num_processes):
        at_boundary()
        if turn + accelerator.process_index >= len(starts):
            continue
        start = starts[turn + accelerator.process_index]
        rows = slice(start, min(start + VAL_IMAGES_PER_PASS, len(plan.samples)))
        images = read_rows(data.images, plan.samples[rows], device)
        targets = batches.targets[rows]
        logits = model.logits(warp(images, batches.matrices[rows])).float()
        loss = sum_of_losses(logits, targets)
        correct = (logits.argmax(1) == targets.argmax(1)).sum()
        sums[:2] += torch.stack([loss.double(), correct.double()])
        if background is not None:
            sums[2] += _sum_of_penalties(model, images, batches, rows, background)
        mine.append((start, logits))
    loss_sum, num_correct, penalty_sum = accelerator.reduce(sums, reduction="sum").tolist()
    scores = {"val_loss": loss_sum / int(batches.num_known.sum())}
    if background is not None:
        scores["val_background"] = penalty_sum / len(plan.samples)
        scores["val_loss"] += background.recipe.weight * scores["val_background"]
    if data.task == "multiclass":
        return {**scores, "val_accuracy": num_correct / len(plan.samples)}
    of_all = gather(accelerator, [(start, logits.cpu()) for start, logits in mine])
    # Each rank has every n-th pass, but the targets are in the order of the plan.
    logits = torch.cat([logits for _, logits in sorted(of_all, key=lambda row: row[0])])
    return {**scores, "val_auroc": mean_auroc(logits, batches.targets.cpu())}


def _sum_of_penalties(
    model: Classifier, images: Tensor, batches: Batches, rows: slice, background: BackgroundLoss
) -> Tensor:
    """Sum the penalties of some rows of a plan, whose images are on the device, float64 []."""
    inputs = (
        images,
        batches.matrices[rows],
        batches.targets[rows],
        read_rows(background.foreground, batches.plan.samples[rows], images.device),
    )
    passes = zip(*(tensor.split(PENALTIES_PER_PASS) for tensor in inputs), strict=True)
    penalties = [
        background.penalties(model, squares, matrices, targets, foreground, None)
        for squares, matrices, targets, foreground in passes
    ]
    return torch.cat(penalties).sum(dtype=torch.float64)
