"""Measure contenders: images per second and peak memory over some rounds."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cxrdist.terminal import progress

CPU = torch.device("cpu")


class Contender(NamedTuple):
    """One way to do a job."""

    name: str
    work: Callable[[], int]
    """Does the job once and returns the number of images."""
    num_threads: int
    """PyTorch's threads while it runs."""
    device: torch.device = CPU
    """The device whose memory is measured."""


class Measured(NamedTuple):
    """Images per second of each round, and peak memory in MiB over all rounds and the warm-up."""

    rates: list[float]
    peak_mib: float


def measure(
    name: str, contenders: list[Contender], repeats: int, *, show: bool = True
) -> list[Measured]:
    """Warm up each contender once, then let them take turns, so that drift affects all alike.

    ``repeats`` is the number of rounds after the warm-up.
    """
    rates: list[list[float]] = [[] for _ in contenders]
    peaks = [0.0] * len(contenders)
    with progress((repeats + 1) * len(contenders), name, "runs", show=show) as bar:
        for number in range(repeats + 1):
            for i, contender in enumerate(contenders):
                torch.set_num_threads(contender.num_threads)
                _reset_peak(contender.device)
                wait_for(contender.device)
                began = time.perf_counter()
                with quiet():
                    num_images = contender.work()
                wait_for(contender.device)
                seconds = time.perf_counter() - began
                if number > 0:  # 0 is the warm-up
                    rates[i].append(num_images / seconds)
                # The warm-up counts as well: a captured step allocates only there.
                peaks[i] = max(peaks[i], _peak_mib(contender.device))
                bar.update()
    return [Measured(r, p) for r, p in zip(rates, peaks, strict=True)]


def rows_of(name: str, contenders: list[Contender], measured: list[Measured]) -> list[list[str]]:
    """Return the table's rows of a job: median rate, the first one's rate by its own, memory."""
    rows = []
    for contender, own in zip(contenders, measured, strict=True):
        # Round by round, so that a slow moment of the machine is in both sides of a ratio.
        ratios = [a / b for a, b in zip(measured[0].rates, own.rates, strict=True)]
        is_first = own is measured[0]
        rows.append(
            [
                name if is_first else "",
                contender.name,
                f"{statistics.median(own.rates):,.1f}",
                "" if is_first else f"{statistics.median(ratios):.2f}",
                "" if is_first else f"{min(ratios):.2f}..{max(ratios):.2f}",
                f"{own.peak_mib:,.0f}",
            ]
        )
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide from the terminal what is printed inside."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man proc_pid_clear_refs)


def _peak_mib(device: torch.device) -> float:
    """Return the peak since `_reset_peak`: PyTorch's tensors on a GPU, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
