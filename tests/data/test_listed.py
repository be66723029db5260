"""The files of a public data set, matched with the rows of its tables."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from public_sets import write_public_set

from cxrdist.config import SourceConfig
from cxrdist.data.found import LeftOut
from cxrdist.data.listed import MISSING, NOT_IN_TABLE, OUTSIDE, TWICE, Listed
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError


@pytest.mark.parametrize("folder", ["", ".", "./", "../set", "set/.."])
def test_all_is_taken_or_left_out_with_a_reason(tmp_path, monkeypatch, folder):
    """Whatever the folder is called; a user may stand in it."""
    home = tmp_path / "set"
    for file in ("images/1.png", "images/2.jpg", "images/3.png", "other/1.png", "set/readme.txt"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    monkeypatch.chdir(home)
    listed = Listed(Path(folder), re.compile("images/([^/]+)"))
    taken = [listed.take(name) is not None for name in ("1", "3", "3", "4", "4")]
    assert taken == [True, True, False, False, False]
    left_out, num_found, _ = listed.account()
    assert left_out == (
        LeftOut("3", TWICE),
        LeftOut("4", TWICE),
        LeftOut("4", MISSING),
        LeftOut("images/2.jpg", NOT_IN_TABLE),
        LeftOut("other/1.png", OUTSIDE),
        LeftOut("set/readme.txt", "not an image"),
    )
    assert num_found == sum(taken) + len(left_out)


@pytest.mark.parametrize("source", ["chestxray14", "chexpert", "mimic-cxr"])
def test_rows_that_contradict_each_other_are_refused(tmp_path, source):
    """Which of two labels or views an image has must not depend on the order of the rows."""
    table = write_public_set(tmp_path, source)[0]
    _, row, *_ = table.read_text().splitlines()
    for end, message in (("", None), ("x", "is in an earlier row, which says something else")):
        changed = row.replace(",PA", ",AP") if source != "chexpert" else row.replace("68", "69")
        with table.open("a") as file:
            file.write(f"{changed if end else row}\n")
        with pytest.raises(CxrdistError, match=message) if message else nullcontext():
            read_source(SourceConfig(source, tmp_path), least_classes=1)
