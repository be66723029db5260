"""The heartbeat's limit; what it does to a hanging job is in train/test_resume.py."""

import pytest

from cxrdist.errors import CxrdistError
from cxrdist.heartbeat import start_heartbeat


@pytest.mark.parametrize("seconds", ["abc", "0", "-1", "nan", "inf", ""])
def test_a_limit_that_is_no_time_is_refused(monkeypatch, seconds):
    """It is named, and no thread is started."""
    monkeypatch.setenv("CXRDIST_HANG_SECONDS", seconds)
    with pytest.raises(CxrdistError, match=r"^CXRDIST_HANG_SECONDS: is '.*', expected seconds"):
        start_heartbeat(0, 2)
