"""What all sources have in common; each has tests of its own."""

from typing import get_args

import pytest
from public_sets import DOCUMENTS, write_public_set

from cxrdist.config import SourceConfig, SourceName
from cxrdist.data.listed import MISSING, TWICE
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError


@pytest.mark.parametrize("name", get_args(SourceName))
def test_an_input_that_is_not_there_is_named(tmp_path, name):
    """Before anything else is missed, whatever the source; one line."""
    with pytest.raises(CxrdistError, match=r"lost: (no such f|No such file)") as caught:
        read_source(SourceConfig(name, tmp_path / "lost"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_found_is_records_and_left_out(tmp_path, monkeypatch, name):
    """Also of a data set in which a user stands, and of which an image is lost."""
    write_public_set(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    files = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")}
    source = read_source(SourceConfig(name, tmp_path.relative_to(tmp_path), views="all"))
    assert source.num_found == len(files) == len(source.records) + len(source.left_out)
    assert {left.reason for left in source.left_out} <= {"not an image"}
    source.records[0].file.unlink()
    fewer = read_source(SourceConfig(name, tmp_path, views="all"))
    assert fewer.num_found >= len(files)
    assert fewer.num_found == len(fewer.records) + len(fewer.left_out)
    assert len(fewer.records) == len(source.records) - 1
    lost = [left.reason for left in fewer.left_out if left.reason in (MISSING, TWICE)]
    assert lost == [MISSING]


def test_a_source_of_which_nothing_is_packed_says_why(tmp_path):
    """Lists without a line, as of another version: all images are strangers."""
    for file in write_public_set(tmp_path, "covidx"):
        file.write_text("")
    with pytest.raises(CxrdistError, match=r"to pack: 3 not in the table, 2 not an image$"):
        read_source(SourceConfig("covidx", tmp_path))
