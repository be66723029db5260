"""Stop requests (TERM, INT, HUP and USR1), handled at once or at the next step boundary."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from cxrdist.errors import Stopped
from cxrdist.lifetime import reports_stop

STOP_CODE = 75  # EX_TEMPFAIL of sysexits.h: run it again
# USR1 is the warning before a time limit (--signal in launch/train.sbatch).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Slurm signals a whole process tree, and launchers also pass signals on, so one request may arrive
# several times within this period.
SAME_REQUEST_SECONDS = 5.0
# After this time without handling a signal, the main thread waits in C++, such as for a dead rank.
UNHEARD_SECONDS = 3.0

Handler = Callable[[int, FrameType | None], None]


def handle_stops(handler: Handler) -> dict[signal.Signals, Any]:
    """Install a handler of the stop signals; return those before it.

    `nohup` ignores HUP for all that it starts, so that a closed terminal ends nothing.
    """
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]
    return {number: signal.signal(number, handler) for number in heard}


class _Request:
    """The stop signal that this process received, if any."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = ""
        self.may_raise = True  # not while modules are imported
        self.is_deferred = False  # whether a signal is only recorded, to stop a little later

    def receive(self, number: int, _: FrameType | None) -> None:
        """Record a signal; outside training, end the command."""
        if os.getpid() != self.pid:  # this is a worker process, forked with the handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # A later signal must not interrupt the clean-up that the first one has begun.
        if not self.name:
            self.name = signal.Signals(number).name
            if not self.may_raise:
                _end(number)
            if not self.is_deferred:
                self.stop()

    def stop(self) -> NoReturn:
        """End the command by an exception, so that unfinished files are removed."""
        raise Stopped(f"stopped on {self.name}; run the same command again")


_request = _Request()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Make a signal raise `Stopped` in the main thread, so that unfinished files are removed.

    If the main thread waits in C++, for example for a rank that died before it joined, nothing can
    be raised: then the process ends after UNHEARD_SECONDS.
    """
    global _request
    # Python sets signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier, _request = _request, _Request()
    before = handle_stops(_request.receive)
    try:
        with _watched(_end_unheard):
            yield
    finally:
        # Launchers signal ranks that are still exiting; that must not change their exit code.
        ending = signal.SIG_IGN if _request.name and "RANK" in os.environ else None
        for number, handler in before.items():
            signal.signal(number, ending or handler)
        _request = earlier  # the next command of this process is not asked to stop


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Make a signal end the process without an exception, within `stopping_at_once`.

    Used during imports: some modules catch every exception while they are imported.
    """
    _request.may_raise = False
    try:
        yield
    finally:
        _request.may_raise = True


@contextlib.contextmanager
def stopping_afterwards() -> Iterator[None]:
    """Make a signal raise `Stopped` after this block, not within it.

    Used around calls that take locks which other threads need: an exception between the moment that
    a lock is taken and the begin of its `with` block leaves it locked, and the clean-up waits for
    ever.
    """
    earlier, is_deferred = _request.name, _request.is_deferred
    _request.is_deferred = True
    try:
        yield
    finally:
        _request.is_deferred = is_deferred
    if _request.name != earlier and not is_deferred:
        _request.stop()


@contextlib.contextmanager
def stopping_at_a_boundary() -> Iterator[None]:
    """Make a signal only set `stop_requested`; a second one ends the process at once.

    A thread handles the second signal: Python runs handlers between two instructions of the main
    thread, which may wait in a collective for a rank that hangs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.is_deferred = True
    with _watched(_end_on_second):
        yield
    # Not reset after an error, such as a lost rank: a signal that arrives while the error is
    # reported must change neither the message nor the exit code.
    _request.is_deferred = False


@contextlib.contextmanager
def _watched(watch: Callable[[Iterator[int]], None]) -> Iterator[None]:
    """Run a thread that receives the numbers of stop signals through a wakeup pipe."""
    receiving, sending = os.pipe()
    # set_wakeup_fd requires it.
    os.set_blocking(sending, False)
    threading.Thread(target=watch, args=(_stop_signals(receiving),), daemon=True).start()
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    try:
        yield
    finally:
        # In this order, or a signal in between would write to a closed pipe.
        signal.set_wakeup_fd(before)
        os.close(sending)


def _stop_signals(pipe: int) -> Iterator[int]:
    """Yield stop signals from the pipe until it is closed."""
    with open(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in STOP_SIGNALS:
                yield number[0]


def _end_unheard(numbers: Iterator[int]) -> None:
    """End the process after a signal that the main thread does not handle."""
    request = _request
    for number in numbers:
        time.sleep(UNHEARD_SECONDS)
        if not request.name:
            _end(number)


def _end_on_second(numbers: Iterator[int]) -> None:
    """End the process on a second stop request."""
    first = 0.0
    for number in numbers:
        first = first or time.monotonic()
        if time.monotonic() - first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)  # as a shell reports a process that the signal ended


def _end(number: int) -> None:
    """End the process at once, with the message and exit code of `Stopped`."""
    line = f"stopped on {signal.Signals(number).name}; run the same command again"
    if reports_stop(line):
        os.write(sys.stderr.fileno(), f"cxrdist: {line}\n".encode())
    os._exit(STOP_CODE)


def stop_requested() -> str:
    """Return the name of the signal that was received, or an empty string."""
    return _request.name
