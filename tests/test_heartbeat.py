"""The heartbeat's limit, and whom it kills; a hanging job is in train/test_resume.py."""

import os
import platform
import signal
import subprocess

import pytest

from cxrdist.errors import CxrdistError
from cxrdist.heartbeat import _kill_neighbour, start_heartbeat


@pytest.mark.parametrize("seconds", ["abc", "0", "-1", "nan", "inf", ""])
def test_a_limit_that_is_no_time_is_refused(monkeypatch, seconds):
    """It is named, and no thread is started."""
    monkeypatch.setenv("CXRDIST_HANG_SECONDS", seconds)
    with pytest.raises(CxrdistError, match=r"^CXRDIST_HANG_SECONDS: is '.*', expected seconds"):
        start_heartbeat(0, 2)


def test_only_the_rank_itself_is_killed():
    """Not a process that has its PID now, nor one with its PID on another node."""
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": "1"})
    here, pid = platform.node(), process.pid
    others = [(0, f"{here}, pid {pid}"), (2, f"{here}, pid {pid}"), (1, f"other, pid {pid}")]
    for rank, location in (*others, (1, "it never started"), (1, f"{here}, pid x")):
        _kill_neighbour(rank, location)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    _kill_neighbour(1, f"{here}, pid {pid}")
    assert process.wait(30) == -signal.SIGKILL
