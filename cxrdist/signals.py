"""Requests to stop: TERM, INT and USR1, followed at once or at the next step boundary."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cxrdist.errors import Stopped
from cxrdist.lifetime import another_rank_failed

STOP_CODE = 75  # EX_TEMPFAIL of sysexits.h: run it again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm signals a whole process tree and launchers pass signals on: what comes so soon is the same.
SAME_REQUEST_SECONDS = 5.0
# So long may the main thread be in C++ before it hears a signal; beyond it waits for a dead rank.
UNHEARD_SECONDS = 3.0


class _Request:
    """The signal that was received, by this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = ""
        self.begun = True
        self.waits = False

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal; outside training it ends the command here."""
        if os.getpid() != self.pid:  # a worker process that was forked from this one
            _die(number)
        if not self.name:
            self.name = signal.Signals(number).name
            if not self.begun:
                _end(number)
            if not self.waits:
                raise Stopped(f"stopped on {self.name}; run the same command again")


_request = _Request()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let a signal raise `Stopped` wherever the main thread is; files in the making are removed.

    Where the main thread waits in C++, as a rank does for one that died before it had joined,
    nothing can be raised: the process ends after UNHEARD_SECONDS.
    """
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request()
    before = {number: signal.signal(number, _request.receive) for number in STOP_SIGNALS}
    try:
        with _watched(_end_unheard):
            yield
    finally:
        # What a launcher sends to the ranks that are still ending must not change their exit code.
        ending = signal.SIG_IGN if _request.name and "RANK" in os.environ else None
        for number, handler in before.items():
            signal.signal(number, ending or handler)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the process without an exception, within `stopping_at_once`.

    For imports: some modules catch everything that is raised while they are imported.
    """
    _request.begun = False
    try:
        yield
    finally:
        _request.begun = True


@contextlib.contextmanager
def stopping_at_a_boundary() -> Iterator[None]:
    """Let a signal only be noted, for `stop_requested`; a second one ends the process at once.

    Python runs a handler between two instructions of the main thread, which may wait in a
    collective for a rank that hangs. So the second signal is seen by a thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.waits = True
    with _watched(_end_on_second):
        yield
    # After an error, such as a lost rank, it stays set: a signal that comes while it is reported
    # changes neither the message nor the exit code. The launcher ends the ranks that are left.
    _request.waits = False


@contextlib.contextmanager
def _watched(watch: Callable[[Iterator[int]], None]) -> Iterator[None]:
    """Give the numbers of stop signals to a thread, through the pipe of the kernel's handler."""
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    threading.Thread(target=watch, args=(_stop_signals(receiving),), daemon=True).start()
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sending)


def _stop_signals(pipe: int) -> Iterator[int]:
    """Yield the stop signals among those that come, until the pipe is closed."""
    with open(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in STOP_SIGNALS:
                yield number[0]


def _end_unheard(numbers: Iterator[int]) -> None:
    """End the process after a signal that the main thread does not come to."""
    request = _request
    for number in numbers:
        time.sleep(UNHEARD_SECONDS)
        if not request.name:
            _end(number)


def _end_on_second(numbers: Iterator[int]) -> None:
    """End the process on a signal that is a second request."""
    first = 0.0
    for number in numbers:
        first = first or time.monotonic()
        if time.monotonic() - first > SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def _end(number: int) -> None:
    """End the process here and now, as `Stopped` would."""
    if not another_rank_failed():
        line = f"cxrdist: stopped on {signal.Signals(number).name}; run the same command again\n"
        os.write(sys.stderr.fileno(), line.encode())
    os._exit(STOP_CODE)


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def stop_requested() -> str:
    """Return the name of the signal that was received, or an empty string."""
    return _request.name
