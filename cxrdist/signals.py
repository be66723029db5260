"""Requests to stop: TERM, INT and USR1, followed at once or at the next step boundary."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from cxrdist.errors import Stopped

STOP_CODE = 75  # EX_TEMPFAIL of sysexits.h: run it again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Slurm signals a whole process tree and launchers pass signals on: what comes so soon is the same.
SAME_REQUEST_SECONDS = 5.0


class _Request:
    """The signal that was received, by this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.name = ""
        self.waits = False

    def receive(self, number: int, _: FrameType | None) -> None:
        """Note a signal; outside training it ends the command here."""
        if os.getpid() != self.pid:  # a worker process that was forked from this one
            _die(number)
        if not self.name:
            self.name = signal.Signals(number).name
            if not self.waits:
                raise Stopped(f"stopped on {self.name}; run the same command again")


_request = _Request()


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let a signal raise `Stopped` wherever the main thread is; files in the making are removed."""
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request()
    before = {number: signal.signal(number, _request.receive) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        # What a launcher sends to the ranks that are still ending must not change their exit code.
        ending = signal.SIG_IGN if _request.name and "RANK" in os.environ else None
        for number, handler in before.items():
            signal.signal(number, ending or handler)


@contextlib.contextmanager
def stopping_at_a_boundary() -> Iterator[None]:
    """Let a signal only be noted, for `stop_requested`; a second one ends the process at once.

    Python runs a handler between two instructions of the main thread, which may wait in a
    collective for a rank that hangs. So the second signal is seen by a thread, through the pipe
    that the kernel's handler writes to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    threading.Thread(target=_end_on_second, args=(receiving,), daemon=True).start()
    before = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    _request.waits = True
    try:
        yield
        # After an error, such as a lost rank, a signal that comes while it is reported changes
        # neither the message nor the exit code: the launcher ends the ranks that are left by one.
        _request.waits = False
    finally:
        signal.set_wakeup_fd(before)
        os.close(sending)


def _end_on_second(pipe: int) -> None:
    """Read signal numbers until the pipe is closed; die of one that is a second request."""
    first = 0.0
    with open(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in STOP_SIGNALS:
                continue
            first = first or time.monotonic()
            if time.monotonic() - first > SAME_REQUEST_SECONDS:
                os._exit(128 + number[0])


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def stop_requested() -> str:
    """Name of the signal that was received, or an empty string."""
    return _request.name
