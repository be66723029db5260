"""The bench of the GPU: the real training step, eager, compiled and captured."""

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator

from cxrdist.bench.measure import Contender, Measured, measure
from cxrdist.bench.stage import plain_step, stage_run, take_steps
from cxrdist.bench.traffic import StepTraffic, Traffic, copy_bandwidth, step_traffic
from cxrdist.config import BenchConfig, Network
from cxrdist.distributed import finish, gather, say, start
from cxrdist.terminal import table
from cxrdist.train.capture import WARM_UP_STEPS, can_capture, record_cuda_graph
from cxrdist.train.memory import is_out_of_memory
from cxrdist.train.stage import PRECISIONS, StageRun

T = TypeVar("T")

NETWORK = Network()  # DenseNet121
BATCHES = (9, 16, 64, 256)  # 9 is the paper's; up to 64 a stage captures compiled steps by itself
ROUND_SECONDS = 1.0
FIRST_STEPS = WARM_UP_STEPS + 2  # one step is recorded, and one replayed

HEADERS = (
    *("way", "batch", "images/s", "ms\n/step", "min..max"),
    *("GB/s", "share", "fused", "peak\nMiB", "first /\nthis"),
)
LEGEND = """\
way: compiled is the recipe's compile without capture; captured replays the whole step as one CUDA
  graph, on one rank only; both is compiled and captured. batch: images of a step over all ranks.
GB/s: what a rank's eager step moves at least, per second. share: that, divided by the bandwidth.
fused: the share of what convolutions and optimiser move, a lower bound for any compiler."""


class Way(NamedTuple):
    """A way to run a training step."""

    name: str
    compiled: bool
    captured: bool


WAYS = [
    Way("eager", False, False),
    Way("compiled", True, False),
    Way("captured", False, True),
    Way("both", True, True),
]


def bench_gpu(config: BenchConfig) -> None:
    """Time the real training step for each batch and way; the main rank prints a table of each.

    All ranks of a launch call it together; each takes its slice of the batch.
    """
    accelerator = start()
    world_size = accelerator.num_processes
    precision = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    traffic = step_traffic(NETWORK, config.size, precision)
    bandwidth = copy_bandwidth(accelerator.device)
    ways = [w for w in WAYS if not w.captured or can_capture(accelerator.device, world_size, 1)]
    say(accelerator, _heading(accelerator, config.size, bandwidth, traffic))
    say(accelerator, LEGEND)
    for batch in _batches(world_size):
        of_ways = [_try_way(accelerator, config, way, batch) for way in ways]
        num_bytes = traffic.bytes_of(batch / world_size)
        rows = [
            [way.name, str(batch), *_figures(batch, measured, of_ways[0], num_bytes, bandwidth)]
            for way, measured in zip(ways, of_ways, strict=True)
        ]
        say(accelerator, table(rows, HEADERS))
    finish(accelerator)


def _batches(world_size: int) -> list[int]:
    """List the batch sizes, in images over all ranks.

    Fixed numbers show strong scaling, multiples of the world size weak scaling.
    """
    batches = {*BATCHES, *(world_size * batch for batch in BATCHES)}
    return sorted(batch for batch in batches if batch >= world_size)


def _try_way(
    accelerator: Accelerator, config: BenchConfig, way: Way, batch: int
) -> Measured | None:
    """Measure a way, or return None if a step does not fit into the memory of some rank.

    A rank that gave up in the middle of a step would leave the others waiting. So with several
    ranks, each first tries its slice alone, not compiled, and all agree on whether it fits.
    """
    num_images = -(-batch // accelerator.num_processes)
    try:
        if accelerator.num_processes == 1:
            return _unless_out_of_memory(
                accelerator.device, lambda: _measure_way(accelerator, config, way, batch)
            )
        fits = _unless_out_of_memory(
            accelerator.device, lambda: _step_alone(accelerator, config.size, num_images)
        )
        _free_memory(accelerator)
        if not all(gather(accelerator, [fits])):
            return None
        return _measure_way(accelerator, config, way, batch)
    finally:
        _free_memory(accelerator)


def _unless_out_of_memory(device: torch.device, work: Callable[[], T]) -> T | None:
    """Return the result of a function, or None if memory runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error, device):
            raise
        return None


def _step_alone(accelerator: Accelerator, size_px: int, num_images: int) -> bool:
    """Run one step on this rank, without the other ranks."""
    precision = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    plain_step(NETWORK, size_px, num_images, precision, accelerator.device)()
    return True


def _free_memory(accelerator: Accelerator) -> None:
    """Free the memory of a way before the next is set up, for which it would count."""
    torch.compiler.reset()
    accelerator.free_memory()
    gc.collect()  # free_memory collects garbage before it drops the models
    torch.cuda.empty_cache()


def _measure_way(accelerator: Accelerator, config: BenchConfig, way: Way, batch: int) -> Measured:
    """Measure a way: images per second over all ranks, and the largest peak memory of a rank."""
    with tempfile.TemporaryDirectory(prefix="cxrdist-bench-") as scratch:
        recipe = {"network": NETWORK, "global_batch_size": batch, "compile": way.compiled}
        stage = stage_run(accelerator, Path(scratch), config.size, recipe=recipe)
        stage.captured = None  # a stage captures small compiled batches by itself
        if way.captured:
            stage.capture(record_cuda_graph)
        work, threads = _rounds(accelerator, stage), torch.get_num_threads()
        contender = Contender(way.name, work, threads, accelerator.device)
        title, show = f"gpu, batch {batch}, {way.name}", accelerator.is_main_process
        (measured,) = measure(title, [contender], config.repeats, show=show)
    return measured._replace(peak_mib=max(gather(accelerator, [measured.peak_mib])))


def _rounds(accelerator: Accelerator, stage: StageRun) -> Callable[[], int]:
    """Return a function that runs the steps of a round; its first call chooses their number."""
    num_steps = 0

    def work() -> int:
        nonlocal num_steps
        if num_steps:
            return take_steps(stage, num_steps)
        take_steps(stage, FIRST_STEPS)  # compiles and captures, so it is not timed
        began = time.perf_counter()
        num_images = take_steps(stage, FIRST_STEPS)
        seconds = max(gather(accelerator, [time.perf_counter() - began]))  # equal on all ranks
        num_steps = max(1, math.ceil(ROUND_SECONDS * FIRST_STEPS / seconds))
        return num_images

    return work


def _figures(
    batch: int,
    measured: Measured | None,
    first: Measured | None,
    num_bytes: Traffic,
    bandwidth: float,
) -> list[str]:
    """Format the measured figures, from images/s on."""
    if measured is None:
        return ["-", "-", "out of memory", *["-"] * 5]
    rate = statistics.median(measured.rates)
    millis = sorted(1000 * batch / r for r in measured.rates)
    eager, fused = (n * rate / batch for n in num_bytes)
    return [
        f"{rate:,.1f}",
        f"{1000 * batch / rate:,.1f}",
        f"{millis[0]:,.1f}..{millis[-1]:,.1f}",
        f"{eager / 1e9:,.0f}",
        f"{eager / bandwidth:.0%}",
        f"{fused / bandwidth:.0%}",
        f"{measured.peak_mib:,.0f}",
        f"{statistics.median(first.rates) / rate:.2f}" if first else "-",
    ]


def _heading(accelerator: Accelerator, size_px: int, bandwidth: float, traffic: StepTraffic) -> str:
    """Describe what was measured, and the totals that the shares refer to."""
    device, ranks = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    image, step = (Traffic(*(n / 1e6 for n in t)) for t in (traffic.per_image, traffic.per_step))
    return (
        f"gpu: {ranks} x {name}, mixed precision {accelerator.mixed_precision}, "
        f"images of {size_px} px, all blocks trained\n"
        f"bandwidth: {bandwidth / 1e9:,.0f} GB/s, of copies within the memory of one rank\n"
        f"a step moves at least {image.eager:,.1f} MB per image + {step.eager:,.1f} MB; "
        f"fully fused {image.fused:,.1f} + {step.fused:,.1f} MB"
    )
