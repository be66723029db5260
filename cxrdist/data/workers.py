"""Workers: processes that read images; a file that crashes or hangs one fails alone."""

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from cxrdist.errors import CxrdistError, RunFailedError
from cxrdist.signals import stopping_afterwards

# Processor time: a real X-ray takes a tenth of a second; anything slower is malicious or broken.
SECONDS_PER_IMAGE = 10
WAITING = 6  # times as long an image may take by the clock: a busy machine or a slow disk
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_BLOCK_BYTES = 32 << 20  # the most that glibc takes on 64 bits
MOST_KEPT_BYTES = 64 << 20  # of free memory, by a worker
# A worker imports the script that started it, which would call cxrdist once more.
BROKEN = (
    "the processes that read images have ended; in a script of your own, call cxrdist below a line "
    'if __name__ == "__main__": and otherwise run the same command again'
)
STOP_SECONDS = 0.2  # until a stop ends the wait for a result
CHUNKS_AHEAD = 2  # chunks per worker that are submitted before the first of them is yielded


class HasFile(Protocol):
    """An item for a worker, which belongs to a file."""

    @property
    def file(self) -> Path:
        """The file to read."""


Item = TypeVar("Item", bound=HasFile)
Made = TypeVar("Made")
Step = Callable[[Any], Any]


class Workers(ProcessPool):
    """Processes that read images."""

    def __init__(self, number: int, context: BaseContext) -> None:
        super().__init__(number, initializer=_keep_memory, context=context)
        self.ahead = CHUNKS_AHEAD * number
        """Chunks that may wait for them."""
        self.first: list[BaseProcess] = []
        """The processes at the start; others replace those that crash."""


@dataclass(frozen=True)
class Job(Generic[Item, Made]):
    """Items that one worker processes together, and their results."""

    pool: ProcessPool
    steps: Sequence[Step]
    items: Sequence[Item]
    seconds: float
    future: ProcessFuture

    def results(self) -> list[Made | CxrdistError]:
        """Wait for the result of each item, in order, or the error why its file cannot be used.

        If the worker died or was too slow, the items are tried one by one, to find the culprit.
        """
        try:
            return self._finish()
        except (TimeoutError, ProcessExpired) as error:
            if len(self.items) > 1:
                again = (schedule(self.pool, self.steps, [one], self.seconds) for one in self.items)
                return [made for job in again for made in job.results()]
            if isinstance(error, TimeoutError):
                seconds = WAITING * self.seconds
                reason = f"was not read within {seconds:g} s; if this machine was busy, try again"
            elif error.exitcode == -signal.SIGPROF:
                reason = f"was not read within {self.seconds:g} s of processor time"
            else:
                reason = f"crashed its decoder (exit code {error.exitcode})"
            return [CxrdistError(f"{self.items[0].file}: {reason}")]

    def _finish(self) -> list[Made | CxrdistError]:
        while True:
            with stopping_afterwards():
                if wait([self.future], STOP_SECONDS).done:
                    made: list[Made | CxrdistError] = self.future.result()
                    return made


def schedule(
    pool: ProcessPool,
    steps: Sequence[Step],
    items: Sequence[Item],
    seconds: float | None = None,
) -> Job[Item, Any]:
    """Submit items to the workers.

    One worker calls the steps: the first with each item, each other one with what the step before
    it has made. A CxrdistError that a step raises is the item's result. The limit for all items
    together is in seconds of processor time, `SECONDS_PER_IMAGE` if None; by the clock it is
    `WAITING` times as long.
    """
    limit = SECONDS_PER_IMAGE if seconds is None else seconds
    with stopping_afterwards():
        future = pool.schedule(_make_each, args=(steps, items, limit), timeout=WAITING * limit)
    return Job(pool, steps, items, limit, future)


def in_order(
    pool: Workers,
    make: Callable[[Item], Made],
    items: Sequence[Item],
    chunk: int,
    seconds: float,
) -> Iterator[Made | CxrdistError]:
    """Yield the result of each item, in order, or the error why its file cannot be used.

    The workers are at most some chunks of items ahead, so that waiting results take little memory.
    ``make`` is the only step, and ``seconds`` the limit for a chunk, as in `schedule`.
    """
    waiting: deque[Job[Item, Made]] = deque()
    for start in range(0, len(items), chunk):
        waiting.append(schedule(pool, [make], items[start : start + chunk], seconds))
        if len(waiting) > pool.ahead:
            yield from waiting.popleft().results()
    while waiting:
        yield from waiting.popleft().results()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # Not os.cpu_count, which counts cores that SLURM or a container's cpuset withholds.
    return len(os.sched_getaffinity(0))


def _make_each(steps: Sequence[Step], items: Sequence[Any], seconds: float) -> list[Any]:
    """Take the steps; each does all items, so that its code and tables stay in the cache."""
    made = list(items)
    # SIGPROF ends this process, also within a decoder that never returns to Python.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    for step in steps:
        for i, item in enumerate(items):
            if not isinstance(made[i], CxrdistError):
                made[i] = _make(step, made[i], item.file)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return made


def _make(step: Step, one: Any, file: Path) -> Any:
    """Return the result of a step, or the error that it raises."""
    try:
        return step(one)
    except CxrdistError as error:
        return CxrdistError(str(error))  # without its cause, which may not be picklable
    except MemoryError:
        return CxrdistError(f"{file}: does not fit into the memory of this machine")


def _keep_memory() -> None:
    """Reuse the memory of an image for the next one.

    By default glibc returns it to the system, which clears each page before it is used again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        # Setting either ends glibc's dynamic thresholds (mallopt(3)), so both are set.
        mallopt(M_MMAP_THRESHOLD, MOST_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


@contextmanager
def image_workers(workers: int | None, preload: Sequence[str]) -> Iterator[Workers]:
    """Start worker processes.

    They are forked from a small clean process, since this one may have threads; one per core if
    the number is None. ``preload`` are modules that all of them need.

    Raises:
        RunFailedError: they ended without having been given an item.
    """
    context = multiprocessing.get_context("forkserver")
    # Heeded only for the first pool of a process, whose server keeps running.
    context.set_forkserver_preload(list(preload))
    pool = Workers(workers or num_cores(), context)
    try:
        _start(pool)
        yield pool
        pool.close()
    except BaseException as error:
        is_broken = isinstance(error, RuntimeError) and not pool.active
        pool.stop()  # not close, which would complete all submitted tasks first
        for process in pool.first:  # before `join` removes locks that a new one still has to open
            process.terminate()
        if is_broken:
            raise RunFailedError(BROKEN) from None
        raise
    finally:
        with stopping_afterwards():
            pool.join()


def _start(pool: Workers) -> None:
    """Start the processes; a `Stopped` meanwhile would leave some that the pool does not know.

    A terminal sends the SIGINT of Ctrl-C to all of them, too. They inherit that it is blocked, as
    those that still import modules would print a traceback.
    """
    with stopping_afterwards():
        resource_tracker.ensure_running()  # first, as its start unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        others = multiprocessing.active_children()
        try:
            _ = pool.active  # starts it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            pool.first = [p for p in multiprocessing.active_children() if p not in others]
