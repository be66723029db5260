import gc

import pytest

from cxrdist.data.collector import collector_paused


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before_also_after_an_error(enabled):
    """A function that pauses it may be called within another, and may fail."""

    @collector_paused()
    def fail() -> None:
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
        raise ZeroDivisionError

    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
