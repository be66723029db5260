"""The ranks: start them, refuse a world that is not the one launched, agree, gather."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)

from cxrdist.errors import CxrdistError

T = TypeVar("T")


def start(tracking: list[str] | None = None, tracking_dir: Path | None = None) -> Accelerator:
    """Build the Accelerator of this process: the launched ranks, GPU or CPU, mixed precision.

    Args:
        tracking: Accelerate trackers by name.
        tracking_dir: where they write.

    Raises:
        CxrdistError: a tracker is unknown or not installed, or the process was launched as one of
            several ranks and stands alone.
    """
    # torch 2.14 wants another spelling that accelerate has not got yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            # Without this the launched CPU ranks stay single processes (accelerate 1.15).
            cpu=not torch.cuda.is_available(),
            log_with=tracking or None,
            project_dir=str(tracking_dir) if tracking else None,
            kwargs_handlers=[
                # Buffers are averaged by the loop; sending those of rank 0 would lose the others'.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
            ],
        )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise CxrdistError(f"accelerate could not start: {reason}; see --track") from error
    if accelerator.num_processes != launched:
        raise CxrdistError(
            f"WORLD_SIZE is {launched} but this process is one of {accelerator.num_processes}; "
            "launch with accelerate launch --config_file, see launch/ for configs"
        )
    return accelerator


def local_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """This process's place on its node, and how many there are."""
    return accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do a part of shared work on each rank; where one fails, all stop with its error.

    Raises:
        CxrdistError: on the main rank, the first error of any rank; the others exit with its code.
    """
    error: CxrdistError | None = None
    try:
        result = work()
    except CxrdistError as caught:
        error = caught
    except OSError as caught:
        error = CxrdistError(f"{caught}; free the space or choose another place")
    errors = [e for e in gather(accelerator, [error]) if e is not None]
    if not errors:
        return result
    if accelerator.is_main_process:
        raise errors[0]
    raise SystemExit(2)


def gather(accelerator: Accelerator, rows: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks, in the order of the ranks, on each of them."""
    if accelerator.num_processes == 1:
        return rows
    gathered: list[Any] = gather_object(rows)
    return gathered


def average_buffers(accelerator: Accelerator, modules: list[torch.nn.Module]) -> None:
    """Give all ranks the mean of the modules' floating-point buffers, in place.

    Each rank's BatchNorm statistics saw its own slices; since the running mean is linear, their
    mean is the running mean over all slices. Frozen modules must not be given: the mean of three
    equal numbers may differ from them in the last bit.
    """
    if accelerator.num_processes == 1:
        return
    for module in modules:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer, reduction="mean"))


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks; the caller divides once."""
    total: torch.Tensor = accelerator.reduce(values, reduction="sum")
    return total
