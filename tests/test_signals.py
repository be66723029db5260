"""Stop signals of a process that waits in C, where Python runs no handler."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cxrdist import signals
from cxrdist.errors import Stopped

# The second lock of a mutex waits for ever, and no signal ends that.
WAITING = """
import ctypes, signal
from cxrdist import signals

signals.SAME_REQUEST_SECONDS, signals.UNHEARD_SECONDS = 2.0, 0.5
signal.signal(signal.SIGUSR2, lambda *_: None)
mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with {}:
    print("waits", flush=True)
    lock(mutex)
"""


@pytest.fixture
def process(request) -> Iterator[subprocess.Popen[str]]:
    """A process that waits within a context; killed at the end."""
    script, pipe = WAITING.format(request.param), subprocess.PIPE
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, text=True, stdout=pipe, stderr=pipe)
    assert process.stdout.readline() == "waits\n"
    yield process
    process.kill()
    process.wait()


def assert_waits(process: subprocess.Popen[str], seconds: float) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(seconds)


@pytest.mark.parametrize("process", ["signals.stopping_at_once()"], indirect=True)
def test_a_stop_that_the_main_thread_does_not_hear_ends_it(process):
    """With the message and the code of a stop; another signal ends nothing."""
    process.send_signal(signal.SIGUSR2)
    assert_waits(process, 1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert said == "cxrdist: stopped on SIGTERM; run the same command again\n"
    assert process.returncode == 75


@pytest.mark.parametrize(
    "process", ["signals.stopping_at_once(), signals.stopping_at_a_boundary()"], indirect=True
)
def test_only_a_second_stop_ends_what_waits_for_a_boundary(process):
    """Signals within the time of one request are one, however many come, and others are none."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
    assert_waits(process, 2.5)
    process.send_signal(signal.SIGUSR2)
    assert_waits(process, 1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 128 + signal.SIGINT


def test_a_command_after_a_stopped_one_is_not_stopped():
    """Both in one process, as from a script."""
    with pytest.raises(Stopped), signals.stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not signals.stop_requested()
