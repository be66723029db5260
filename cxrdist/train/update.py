"""The optimiser step: non-finite updates are withheld on the device and reported later."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

MOST_SKIPS = 15
"""Steps in a row that the scaler may skip; that many halve its first scale, 2^16, to 2."""
LEAST_SCALE = 1.0
"""A smaller scale would shrink the loss: the gradients do not fit into half precision."""


def gradient_scaler(accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """Make the scaler of a stage where Accelerate has one, which is with fp16; else None."""
    if accelerator.scaler is None:
        return None
    return torch.amp.GradScaler(accelerator.device.type)


class Updater:
    """Takes optimiser steps without a read by the host.

    A step whose gradients are not finite changes no weight and no state of the optimiser: fused
    optimisers look at `found_inf` on the device, as with a gradient scaler. With a scaler such a
    step is an overflow, which lowers the scale. `Epoch.settle` reports it to the host.

    Args:
        optimizer: a fused one, all of whose state is defined (`build_optimizer`).
        scaler: made for this stage, for fp16.
        max_norm: gradients with a larger norm, over all parameters, are shortened to it.
        average: of the weights; moves with each step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
        average: "Average | None",
    ) -> None:
        self.optimizer, self.scaler, self.average = optimizer, scaler, average
        self._max_norm = max_norm
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled if there is a scaler."""
        scaled = self.scaler.scale(loss) if self.scaler else loss
        scaled.backward()

    def prepare_capture(self, device: torch.device) -> None:
        """Move the rates to memory on the device, and make the optimiser capturable."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = torch.tensor(rate, device=device)
            if "capturable" in group:  # AdamW requires it; fused SGD can always be recorded
                group["capturable"] = True
        if self.average:
            self.average.prepare_capture(device)

    def set_rates(self, factor: float, steps_done: int) -> None:
        """Multiply the stage's learning rates by a factor (`rate_factor`), for the next step.

        The average depends on the steps done in the stage; see `Average.set_weight`.
        """
        if self.average:
            self.average.set_weight(steps_done)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def step(self) -> Tensor:
        """Update the weights once; return the norm of all gradients before clipping, float32 []."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters, self._max_norm, norm, foreach=True
            )
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler:
            # `scaler.step` is not needed: `found_inf` is set above. `update` needs `unscale_` only.
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def move_average(self) -> None:
        """Move the average, if there is one, once a step's weights and statistics are final."""
        if self.average:
            self.average.update()

    @property
    def scale(self) -> float | None:
        """Return the scaler's scale; None without one. Reading it waits for the device."""
        return self.scaler.get_scale() if self.scaler else None


class Average:
    """Exponential moving average of weights and BatchNorm statistics (Polyak & Juditsky 1992).

    Attributes:
        state: the averages, by the names of the network's state.
        set_aside: while the network has the average, the weights that are trained; else empty.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        """Start from the current weights; each step keeps the share `decay`, such as 0.999."""
        # Not BatchNorm's `num_batches_tracked`, which is a count.
        live = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
        self.state = {name: tensor.clone() for name, tensor in live.items()}
        self.set_aside: dict[str, Tensor] = {}
        self._live, self._average = list(live.values()), list(self.state.values())
        self._decay = decay
        self._weight: float | Tensor = 1 - decay

    def prepare_capture(self, device: torch.device) -> None:
        """Move the weight of the next step to memory on the device."""
        self._weight = torch.tensor(self._weight, device=device)

    def set_weight(self, steps_done: int) -> None:
        """Set how far the next step moves the average.

        It keeps at most (1 + t) / (10 + t) after t steps (tf.train.ExponentialMovingAverage, with
        num_updates). With its whole decay, a stage of few steps would publish little but the
        weights that it began with, which may be random.
        """
        weight = 1 - min(self._decay, (1 + steps_done) / (10 + steps_done))
        if isinstance(self._weight, Tensor):
            self._weight.fill_(weight)
        else:
            self._weight = weight

    def update(self) -> None:
        """Move towards the weights."""
        moves = torch._foreach_sub(self._live, self._average)
        torch._foreach_mul_(moves, self._weight)  # no lerp, which takes no weight on the device
        torch._foreach_add_(self._average, moves)

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the average of a checkpoint."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Swap the averaged weights into the network, and back at the end."""
        trained = [tensor.clone() for tensor in self._live]
        self.set_aside = dict(zip(self.state, trained, strict=True))
        torch._foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            torch._foreach_copy_(self._live, trained)
            self.set_aside = {}
