"""The epoch under way: its steps, their losses and gradients, and the digest of its images."""

import time

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cxrdist.distributed import gather_tensor
from cxrdist.errors import RunFailedError
from cxrdist.train.checkpoint import Checkpoint
from cxrdist.train.step import Batches, Slice
from cxrdist.train.update import LEAST_SCALE, MOST_SKIPS, Updater


class Epoch:
    """Counts steps on each rank; `settle` brings the ranks' counts together.

    Attributes:
        where: stage and epoch, for messages.
        step: steps done.
        settled: steps whose losses have been summed over the ranks.
        losses: float64 [steps], mean loss of each settled step over its known labels, with its
            background penalty.
        penalties: float64 [steps], mean penalty of each settled step; 0 without a background loss.
        logged_step: steps that have a row in the log.
        images_per_second: of the steps of this launch, from `measure_speed`; None if it took none,
            since an earlier launch stopped in the validation.
        skipped: how many of the last settled steps in a row, also of earlier epochs, the scaler
            has skipped.
    """

    def __init__(self, where: str, batches: Batches, skipped: int) -> None:
        self.where, self.batches, self.plan = where, batches, batches.plan
        self.step = self.settled = self.logged_step = 0
        self.skipped = skipped
        self.losses = torch.zeros(self.plan.num_steps, dtype=torch.float64)
        self.penalties = torch.zeros_like(self.losses)
        # This rank's share of each step's loss and penalty, and the norm of the gradients.
        self._numbers = torch.zeros(self.plan.num_steps, 3, device=batches.targets.device)
        self._taken_before = self._taken = 0
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self.first_step = 0
        self.images_per_second: float | None = None

    def resume(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint within this epoch, of any number of ranks."""
        position = saved.position
        self.step = self.settled = self.first_step = position.step
        self.logged_step = position.logged_step
        self.losses[: self.step], self.penalties[: self.step] = saved.losses, saved.penalties
        self._taken_before, self._seconds_before = position.taken, position.seconds

    @property
    def seconds(self) -> float:
        """Return how long the epoch has taken: in this launch, and in earlier ones until a save."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def done(self) -> bool:
        """Return whether all steps are done."""
        return self.step == self.plan.num_steps

    def count(self, shares: Tensor, norm: Tensor, batch: Slice) -> None:
        """Count a step of this rank, without a read from the device.

        Args:
            shares: its shares of the loss and of the mean penalty, float32 [2].
            norm: of the gradients of all ranks, float32 [].
            batch: its slice.
        """
        # Copied: a captured step's next replay overwrites its results.
        torch.cat([shares, norm.reshape(1)], out=self._numbers[self.step])
        self._taken += self.plan.digest(batch.rows)
        self.step += 1

    def settle(self, accelerator: Accelerator, updater: Updater) -> int:
        """Sum the losses over the ranks, in their order, and check what all have done.

        Returns:
            The digest of the images taken so far.

        Raises:
            RunFailedError: the ranks did not take each planned image once; or a step was not
                finite. Its update was withheld then, and what later steps have done is not kept.
        """
        new = slice(self.settled, self.step)
        if new.start < new.stop:
            of_ranks = gather_tensor(accelerator, self._numbers[new]).double()
            self.losses[new], self.penalties[new] = of_ranks[:, :, :2].sum(0).T
            # The norm is of the gradients of all ranks, so each rank has the same.
            self._check_steps(of_ranks[0, :, 2], updater.scale)
            self.settled = self.step
        wrapped = np.uint64(self._taken % 2**64).view(np.int64)  # tensors have signed numbers
        mine = torch.tensor(wrapped.item(), device=accelerator.device)
        taken = (self._taken_before + sum(gather_tensor(accelerator, mine).tolist())) % 2**64
        if taken != self.plan.digest(slice(0, int(self.plan.bounds[self.step]))):
            raise RunFailedError(
                f"the ranks have not taken each image of {self.step} steps once; "
                "start all of them with the same cxrdist, recipe and shards"
            )
        return taken

    def _check_steps(self, norms: Tensor, scale: float | None) -> None:
        """Raise RunFailedError if a new step is not finite; with a scaler, if too many overflow."""
        losses = torch.isfinite(self.losses[self.settled : self.step]).tolist()
        gradients = torch.isfinite(norms).tolist()
        for i, (loss, gradient) in enumerate(zip(losses, gradients, strict=True)):
            where = f"{self.where}, step {self.settled + i + 1}"
            # The scaler scales the loss later, so only gradients show its overflows.
            if not loss or (scale is None and not gradient):
                raise RunFailedError(
                    f"{where}: the loss or a gradient is not finite; its update was withheld and "
                    "nothing was published. Lower the stage's learning rates, or train without "
                    "mixed precision"
                )
            self.skipped = 0 if gradient else self.skipped + 1
            if self.skipped > MOST_SKIPS:
                raise RunFailedError(
                    f"{where}: the gradients of {self.skipped} steps in a row do not fit into "
                    "fp16; nothing was published. Train with mixed precision bf16, or without"
                )
        if scale is not None and scale < LEAST_SCALE:
            raise RunFailedError(
                f"{self.where}, step {self.step}: the gradient scaler has fallen to {scale:g}; "
                "nothing was published. Train with mixed precision bf16, or without"
            )

    def measure_speed(self) -> None:
        """Measure how fast the steps of this launch were."""
        if self.first_step < self.plan.num_steps:
            num_images = int(self.plan.bounds[-1] - self.plan.bounds[self.first_step])
            self.images_per_second = round(num_images / (time.perf_counter() - self._began), 2)

    def mean_loss(self, first: int = 0) -> float | None:
        """Return the mean loss of the settled steps from `first` on; None if no label is known.

        A step without a known label has no loss, and does not count as one of 0.
        """
        known = torch.from_numpy(self.batches.num_known[first : self.settled] > 0)
        return float(self.losses[first : self.settled][known].mean()) if known.any() else None

    def mean_penalty(self, first: int = 0) -> float:
        """Return the mean penalty of the settled steps from `first` on."""
        return float(self.penalties[first : self.settled].mean())
