"""The ranks: start them, check the world size, agree on errors and stops, gather results."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object

from cxrdist.environment import ON, PRECISION, USE_CPU, refuse_settings
from cxrdist.errors import CxrdistError, RunFailedError, choices, failure_of
from cxrdist.heartbeat import start_heartbeat
from cxrdist.lifetime import joined
from cxrdist.precision import use_full_float32
from cxrdist.signals import stop_requested

T = TypeVar("T")

_stay = False  # whether `finish` leaves the ranks connected
_start_heartbeat = cache(start_heartbeat)  # once per process, which may run several commands


def read_trackers(text: str | None) -> list[str]:
    """Parse names of Accelerate's trackers; reject missing ones, of which it would only warn."""
    names = [name.strip() for name in text.split(",")] if text else []
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise CxrdistError(
                f"--track: no tracker {name!r}; {choices(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in installed:
            raise CxrdistError(
                f"--track {name}: is not installed; run `pip install {name}`, or leave --track out"
            )
    return names


def start(tracking: list[str] | None = None, tracking_dir: Path | None = None) -> Accelerator:
    """Build the Accelerator of this process: the launched ranks, GPU or CPU, mixed precision.

    Operations that mixed precision keeps in float32 use full float32, without TensorFloat-32.
    The trackers (`read_trackers`) write to ``tracking_dir``.

    Raises:
        CxrdistError: a tracker is unknown or not installed, the process was launched as one of
            several ranks but found no others, there are more ranks than GPUs, or the environment
            would change the results.
    """
    refuse_settings(gpu=torch.cuda.is_available())
    _refuse_too_few_gpus()
    # torch 2.14 deprecates these names, but accelerate and torch 2.10 lack the new ones.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor` is deprecated", FutureWarning)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            # Without this, launched CPU ranks do not join a process group (accelerate 1.15).
            cpu=not torch.cuda.is_available(),
            log_with=tracking or None,
            project_dir=str(tracking_dir) if tracking else None,
            kwargs_handlers=[
                # train/statistics keeps the running statistics of all ranks equal. Views save the
                # memory of a second copy of the gradients.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                # NCCL's default, 10 minutes, is short while one rank decodes all images.
                InitProcessGroupKwargs(timeout=timedelta(minutes=30)),
            ],
        )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        mend = "see --track" if tracking else "start several ranks with cxrdist launch"
        raise CxrdistError(f"accelerate could not start: {reason}; {mend}") from error
    joined()
    if accelerator.num_processes != launched:
        raise CxrdistError(
            f"WORLD_SIZE is {launched} but this process is one of {accelerator.num_processes}; "
            "start the ranks with cxrdist launch --config_file FILE COMMAND, not with torchrun"
        )
    refuse_other_mathematics(accelerator)
    use_full_float32()  # must come last: with torch.compile Accelerate turns TensorFloat-32 on
    if launched > 1:
        _start_heartbeat(accelerator.process_index, launched)
    return accelerator


def _refuse_too_few_gpus() -> None:
    """Check that each rank of this machine has its own GPU, if the machine has any."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus > 0 and os.environ.get(USE_CPU, "no").lower() not in ON:
        raise CxrdistError(
            f"--num_processes: {ranks} ranks on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; launch one rank per GPU, with num_processes {gpus} on "
            "each machine"
        )


def refuse_other_mathematics(accelerator: Accelerator) -> None:
    """Reject accelerate settings that would change the results.

    `refuse_settings` reads the environment variables; this checks the state that this version of
    accelerate derived from them: no accumulation, compilation or sharding, the same precision.
    """
    state = accelerator.state
    built = {
        "gradient_accumulation_steps": (str(accelerator.gradient_accumulation_steps), ["1"]),
        "mixed_precision": (accelerator.mixed_precision, [os.environ.get(PRECISION, "no")]),
        "distributed_type": (state.distributed_type.value, ["NO", "MULTI_GPU", "MULTI_CPU"]),
        "dynamo_backend": (state.dynamo_plugin.backend.value, ["NO"]),
    }
    for name, (value, expected) in built.items():
        if value not in expected:
            raise CxrdistError(
                f"accelerate has {name} {value}, expected {' or '.join(expected)}; take it out of "
                "the accelerate config and the environment"
            )


def finish(accelerator: Accelerator) -> None:
    """Wait for all ranks and close their connections.

    Open connections have threads that may abort an exiting rank. Within `staying_connected` only
    the trackers are closed.
    """
    accelerator.wait_for_everyone()
    if not _stay:
        accelerator.end_training()
        return
    for tracker in accelerator.trackers:
        tracker.finish()


@contextmanager
def staying_connected() -> Iterator[None]:
    """Let several commands run in succession on the same ranks, which can connect only once.

    The connections are closed at the end, except after an error: then other ranks may not answer.
    """
    global _stay
    _stay = True
    try:
        yield
    finally:
        _stay = False
    # Accelerate's state belongs to the process, so this is a handle to the same ranks.
    finish(start())


def local_ranks(accelerator: Accelerator) -> tuple[int, int]:
    """Return this process's rank on its node, and the number of ranks there."""
    return accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call a function on each rank; if one rank fails, all ranks stop with its error.

    Raises:
        CxrdistError, RunFailedError: on the main rank, the first error of any rank; the others
            exit with its code.
    """
    # Any other error is a fault of the program: its traceback ends this rank, and the launcher then
    # ends the others, which wait in `gather`.
    error: CxrdistError | RunFailedError | None = None
    try:
        result = work()
    except (CxrdistError, RunFailedError) as caught:
        error = caught
    except OSError as caught:
        error = failure_of(caught) or RunFailedError(str(caught))
    errors = [e for e in gather(accelerator, [error]) if e is not None]
    if not errors:
        return result
    if accelerator.is_main_process:
        raise errors[0]
    raise SystemExit(2 if isinstance(errors[0], CxrdistError) else 1)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Call a function on the main rank only; if it fails, all ranks stop with its error."""
    return together(accelerator, lambda: work() if accelerator.is_main_process else None)


@contextmanager
def entering(
    accelerator: Accelerator, context: AbstractContextManager[object], *, here: bool
) -> Iterator[None]:
    """Enter a context, such as a lock, on some ranks (`here`); if one fails, all stop together."""
    with ExitStack() as stack:
        together(accelerator, lambda: stack.enter_context(context) if here else None)
        yield


class StopVote:
    """Makes all ranks stop at the same step boundary when one of them receives a stop request.

    The flags are summed while the ranks compute, so a vote counts one boundary after it was cast.
    The votes have their own gloo group: collectives of a group must run in the same order on all
    ranks, and DDP starts its own from another thread.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Create the group; must be called on all ranks together."""
        self.alone = accelerator.num_processes == 1
        self.group: Any = None if self.alone else torch.distributed.new_group(backend="gloo")
        self.votes = torch.zeros(1, dtype=torch.int32)
        self.cast: torch.distributed.Work | None = None

    def passed(self) -> bool:
        """Return whether all ranks stop here; call it the same number of times on every rank."""
        if self.alone:
            return bool(stop_requested())
        if self.cast is not None:
            self.cast.wait()
            if self.votes.item():
                return True
        # Only after wait(): until then the sum of the earlier vote uses the buffer.
        self.votes.fill_(bool(stop_requested()))
        self.cast = torch.distributed.all_reduce(self.votes, group=self.group, async_op=True)
        return False


def say(accelerator: Accelerator, line: str) -> None:
    """Print a line once per job, at once; the Accelerator's own `print` does so on each node."""
    if accelerator.is_main_process:
        print(line, flush=True)


def gather(accelerator: Accelerator, rows: list[Any]) -> list[Any]:
    """Return the lists of all ranks concatenated in rank order, on every rank."""
    if accelerator.num_processes == 1:
        return rows
    # It takes a list from each rank and joins the lists, so a single value is given as [value].
    return gather_object(rows)


def gather_tensor(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Stack the tensors of all ranks to [world size, ...], on every rank, on the CPU."""
    return accelerator.gather(values.unsqueeze(0)).cpu()


# Custom operators, so that torch.compile does not break the graph of a step at a collective.
@torch.library.custom_op("cxrdist::stack_over_ranks", mutates_args=())
def stack_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Stack the tensors of all ranks to [world size, ...], on every rank, on the device."""
    # Both are passed flat: gloo gathers only into [world size * n, ...], and refuses scalars.
    # `stacked` is contiguous, so that its flatten() is a view of it.
    stacked = values.new_empty(torch.distributed.get_world_size(), *values.shape)
    torch.distributed.all_gather_into_tensor(stacked.flatten(), values.flatten())
    return stacked


@stack_over_ranks.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return values.new_empty(torch.distributed.get_world_size(), *values.shape)


@torch.library.custom_op("cxrdist::add_over_ranks", mutates_args=())
def add_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks, on the device."""
    total = values.clone()  # all_reduce works in place, and the operator may not
    torch.distributed.all_reduce(total)
    return total


@add_over_ranks.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)
