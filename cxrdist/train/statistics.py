"""BatchNorm statistics that move in a stage: over all ranks, or per rank."""

import torch
from accelerate import Accelerator
from torch import Tensor

from cxrdist.model.batchnorm import BatchNorm


class Statistics:
    """Keeps the running statistics of all ranks equal, after every step.

    Synchronised, each BatchNorm normalises by the images of all ranks. Per rank, it normalises by
    those of its own rank, and only the running statistics are averaged, in one collective per step;
    they then lack the variance between slices.

    `norms` are the BatchNorms of a stage whose statistics move.
    """

    def __init__(
        self, accelerator: Accelerator, norms: list[BatchNorm], *, synchronised: bool
    ) -> None:
        self._accelerator, self._norms = accelerator, norms
        several = accelerator.num_processes > 1 and bool(norms)
        self._averages = several and not synchronised
        self._shares: Tensor | None = None
        self._known: dict[tuple[int, ...], Tensor] = {}
        if several and synchronised:
            self._shares = self._shares_of((1,) * accelerator.num_processes)
        for norm in norms:
            # The same tensor for all, so that `before_pass` fills it once.
            norm.shares = self._shares

    def before_pass(self, sizes: tuple[int, ...]) -> None:
        """Set how many images each rank has in the next pass."""
        if self._shares is not None:
            if sizes not in self._known:  # a stage has a few; a copy from the host would wait
                self._known[sizes] = self._shares_of(sizes)
            self._shares.copy_(self._known[sizes])

    def _shares_of(self, sizes: tuple[int, ...]) -> Tensor:
        """Return what `BatchNorm.shares` holds for a pass."""
        total, mine = sum(sizes), sizes[self._accelerator.process_index]
        numbers = [*(size / total for size in sizes), float(total), float(mine > 0)]
        return self._norms[0].weight.new_tensor(numbers)

    def after_step(self, sizes: tuple[int, ...]) -> None:
        """Average the running statistics over the ranks."""
        if not self._averages:
            return
        moving = [b for norm in self._norms for b in (norm.running_mean, norm.running_var)]
        weight = sizes[self._accelerator.process_index] / sum(sizes)
        flat = self._accelerator.reduce(torch.cat(moving) * weight, reduction="sum")
        parts = flat.split([len(buffer) for buffer in moving])
        torch._foreach_copy_(moving, list(parts))

    def close(self) -> None:
        """Detach the BatchNorms from the other ranks."""
        for norm in self._norms:
            norm.shares = None
