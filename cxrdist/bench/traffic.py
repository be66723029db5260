"""Memory traffic of a training step, counted from shapes; and the bandwidth of a device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cxrdist.bench.measure import CPU, wait_for
from cxrdist.bench.stage import plain_step
from cxrdist.config import Network

# Operations that remain when all others are fused into them: those that read large weights.
NEVER_FUSED_AWAY = ("convolution", "convolution_backward", "addmm", "mm", "_fused_sgd_")
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty")
# Larger than caches, so that a copy measures the memory.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
COPIES = 7


class Traffic(NamedTuple):
    """The least number of bytes that a step moves to and from memory.

    Attributes:
        eager: each operation reads each operand once and writes each result once; views move
            nothing. Memory that an operation changes in place is read and written.
        fused: only convolutions, matrix products and the optimiser, as if BatchNorm, ReLU,
            pooling, concatenation and sums of gradients cost nothing: a lower bound for any
            compiler.
    """

    eager: float
    fused: float


class StepTraffic(NamedTuple):
    """The bytes that a step moves for each image, and those that it moves once."""

    per_image: Traffic
    per_step: Traffic

    def bytes_of(self, num_images: float) -> Traffic:
        """Return the bytes that a step moves for this number of images."""
        pairs = zip(self.per_image, self.per_step, strict=True)
        return Traffic(*(num_images * image + step for image, step in pairs))


class _Counter(TorchDispatchMode):
    """Counts the traffic of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.eager = self.fused = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        # prim reads a tensor's device, and profiler marks an optimiser's step: neither moves data.
        if func.is_view or name in ALLOCATIONS or func.namespace in ("prim", "profiler"):
            return results
        num_bytes = _size((args, kwargs)) + _written(func, args, kwargs, results)
        self.eager += num_bytes
        self.fused += num_bytes * (name in NEVER_FUSED_AWAY)
        return results


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> int:
    """Return the bytes of an operation's new results and of the operands that it changes."""
    total = 0
    for i, argument in enumerate(func._schema.arguments):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        # Fused optimisers declare that they change gradients, but do so only with a scaler.
        if changed and argument.name != "grads":
            total += _size(args[i] if i < len(args) else kwargs.get(argument.name))
    declarations = func._schema.returns
    # Not strict: an operation without results returns None, for which nothing is declared.
    for declared, result in zip(
        declarations, results if len(declarations) > 1 else (results,), strict=False
    ):
        if declared.alias_info is None:
            total += _size(result)
    return total


def _size(values: Any) -> int:
    """Return the bytes of all tensors in nested values; expanded elements count once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            dims = zip(tensor.shape, tensor.stride(), strict=True)
            total += tensor.element_size() * math.prod(
                n if step or not n else 1 for n, step in dims
            )
    return total


def count_traffic(work: Callable[[], Any]) -> Traffic:
    """Run a function, and count the traffic of all its PyTorch operations."""
    with _Counter() as counter:
        work()
    return Traffic(counter.eager, counter.fused)


def step_traffic(shape: Network, size_px: int, precision: torch.dtype) -> StepTraffic:
    """Count the traffic of a training step of all blocks, without computing or allocating it.

    It counts one rank's step with SGD, without communication. The operations are those of the CPU;
    a GPU runs the same ones with other kernels. ``precision`` is that of `plain_step`.
    """
    counts = []
    for num_images in (2, 3):  # not 1: BatchNorm cannot train on one value per channel
        with FakeTensorMode():
            step = plain_step(shape, size_px, num_images, precision, CPU)
            counts.append(count_traffic(step))
    two, three = counts
    per_image = Traffic(*(b - a for a, b in zip(two, three, strict=True)))
    per_step = Traffic(*(a - 2 * image for a, image in zip(two, per_image, strict=True)))
    return StepTraffic(per_image, per_step)


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a copy within a device's memory reads and writes."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(COPIES):
        wait_for(device)
        began = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        rates.append(2 * len(source) / (time.perf_counter() - began))
    return statistics.median(rates)
