"""The time limit of an image: processor time, so that a busy machine loses no good file."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from cxrdist.data.workers import image_workers, in_order
from cxrdist.errors import CxrdistError


class Item(NamedTuple):
    file: Path


def wait(item: Item) -> str:
    """Take longer than the limit by the clock."""
    time.sleep(1.5)
    return item.file.name


def spin(item: Item) -> str:
    """Never come back from C code, for one of the files."""
    if item.file.name == "slow":
        re.fullmatch("(a+)+", "a" * 60 + "b")
    return item.file.name


@pytest.mark.parametrize("make", [wait, spin])
def test_the_limit_of_an_image_is_of_processor_time(make):
    """A file that waits is read; one that computes on costs itself, and is named."""
    names = ["a", "slow", "b"]
    with image_workers(1, [__name__]) as pool:
        made = list(in_order(pool, make, [Item(Path(name)) for name in names], 3, 1))
    if make is spin:
        assert isinstance(made[1], CxrdistError)
        assert str(made[1]) == "slow: was not read within 1 s of processor time"
        made[1] = "slow"
    assert made == names
