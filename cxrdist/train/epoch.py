"""The epoch under way: its plan, its step, its losses, and proof of what it has taken."""

import torch
from accelerate import Accelerator
from torch import Tensor

from cxrdist.data.plan import Plan
from cxrdist.distributed import gather_tensor
from cxrdist.errors import RunFailedError
from cxrdist.train.step import Slice


class Epoch:
    """Counts steps on each rank; `settle` brings the ranks' counts together.

    Attributes:
        plan: of the epoch.
        step: steps done.
        settled: steps whose losses are brought together.
        losses: float64 [steps], mean loss of each settled step over its images.
        logged_step: steps that have a row in the log.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        """Begin an epoch."""
        self.plan = plan
        self.step = self.settled = self.logged_step = 0
        self.losses = torch.zeros(plan.num_steps, dtype=torch.float64)
        self._shares = torch.zeros(plan.num_steps, device=device)
        self._taken_before = self._taken = 0

    def go_on(self, step: int, logged_step: int, losses: Tensor, taken: int) -> None:
        """Continue from a checkpoint, on any number of ranks."""
        self.step = self.settled = step
        self.logged_step = logged_step
        self.losses[:step] = losses
        self._taken_before = taken

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.plan.num_steps

    def count(self, share: Tensor, part: Slice) -> None:
        """Count a step of this rank.

        Args:
            share: its share of the loss, float32 [].
            part: what it took.
        """
        self._shares[self.step] = share
        if part.weight:
            self._taken += self.plan.digest(part.rows)
        self.step += 1

    def settle(self, accelerator: Accelerator) -> int:
        """Sum the losses up over all ranks, in their order, and check what all have taken.

        Returns:
            The digest of what was taken so far.

        Raises:
            RunFailedError: the ranks did not take each planned image once.
        """
        new = slice(self.settled, self.step)
        if new.start < new.stop:
            shares = gather_tensor(accelerator, self._shares[new])
            self.losses[new] = shares.double().sum(0)
            self.settled = self.step
        mine = torch.tensor(_signed(self._taken), device=accelerator.device)
        of_ranks = gather_tensor(accelerator, mine).tolist()
        taken = (self._taken_before + sum(of_ranks)) % 2**64
        if taken != self.plan.digest(slice(0, int(self.plan.bounds[self.step]))):
            raise RunFailedError(
                f"the ranks have not taken each image of {self.step} steps once; "
                "start all of them with the same cxrdist, recipe and shards"
            )
        return taken

    def mean_loss(self, first: int = 0) -> float:
        """Mean loss of the settled steps from one on."""
        return float(self.losses[first : self.settled].mean())


def _signed(number: int) -> int:
    """The same 64 bits as a signed number, for a tensor."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
