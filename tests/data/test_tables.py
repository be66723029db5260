import gzip
import os

import pytest
from support import run_measured

from cxrdist.data.tables import read_table, read_text
from cxrdist.errors import CxrdistError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path,label\na,x\nb,\0\n", "row 3: has a NUL"),
        ("path,label\na,x\n".encode("utf-16-le"), "row 1: has a NUL"),
        (b"path,label\na,x\nb," + b"y" * 131_073 + b"\n", "row 3: field larger than field limit"),
        (b'path,label\na,x\nb,"y\nc,z\n', "row 3: unexpected end of data"),
        (b'path,label\na,"x" y\n', "row 2: ',' expected after"),
        (b"\xff\xfepat", "begins as utf-16 but is not"),
    ],
)
def test_what_is_no_csv_text_is_named_by_row(tmp_path, data, message):
    """One line for each, and no row is swallowed by an open quote."""
    file = tmp_path / "t.csv"
    file.write_bytes(data)
    with pytest.raises(CxrdistError) as error:
        list(read_table(file, {"path"}).rows())
    assert message in str(error.value)


def test_rows_are_counted_as_a_spreadsheet_does(tmp_path):
    """Blank rows count, and a cell of several lines is in one row; empty cells at the end pass."""
    file = tmp_path / "t.csv"
    file.write_text('path,label\n"a\nb",x,,\n\n,\nc,y\n')
    rows = list(read_table(file, {"path"}).rows())
    assert [(row.where.rpartition(" ")[2], row.cells) for row in rows] == [
        ("2", ["a\nb", "x"]),
        ("5", ["c", "y"]),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_quoted_cell_may_follow_a_blank(tmp_path, separator):
    """As in the header; its quotes are not part of it, and it may hold the separator."""
    file = tmp_path / "t.csv"
    rows = [["path", ' "label"'], ["a", f' "x{separator} y"'], ['"b"', '   "z"']]
    file.write_text("\n".join(map(separator.join, rows)))
    table = read_table(file, {"path"})
    assert table.columns == ("path", "label")
    assert [row.cells for row in table.rows()] == [["a", f"x{separator} y"], ["b", "z"]]
    file.write_text(f"path{separator}label\n a{separator} x\n")
    assert [row.cells for row in read_table(file, {"path"}).rows()] == [[" a", " x"]]


def test_a_header_of_several_lines_and_other_letters_is_read(tmp_path):
    """Bytes without a letter in Windows-1252 are read as Latin-1."""
    file = tmp_path / "t.csv"
    file.write_bytes(b'path;"the\nlabel"\n\x81\xe4;x\n')
    table = read_table(file, {"path"})
    assert table.columns == ("path", "the\nlabel")
    assert [row.cells for row in table.rows()] == [["\x81\xe4", "x"]]


def test_a_missing_table_is_one_line(tmp_path):
    """As is a folder in its place."""
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(CxrdistError, match="cannot be read"):
            read_table(path, {"path"})


def test_a_gzip_file_is_read_like_the_table_in_it(tmp_path):
    """Whatever its name, and in several members as `cat` joins them."""
    file = tmp_path / "t.csv"
    file.write_bytes(gzip.compress(b"path,label\n") + gzip.compress(b"a,x\r\nb,\xe4\n"))
    table = read_table(file, {"path"})
    assert table.columns == ("path", "label")
    assert [row.cells for row in table.rows()] == [["a", "x"], ["b", "\xe4"]]
    assert "windows-1252" in table.notes[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_a_damaged_gzip_file_is_one_line(tmp_path, damage):
    """A download that broke off, a changed byte, and two bytes that only look like one."""
    whole = gzip.compress(b"path,label\n" + b"a,x\n" * 1000)
    data = {
        "cut": whole[:-9],
        "flipped": whole[:20] + bytes([whole[20] ^ 255]) + whole[21:],
        "no gzip": b"\x1f\x8bpath,label\n",
    }[damage]
    file = tmp_path / "t.csv.gz"
    file.write_bytes(data)
    with pytest.raises(CxrdistError, match="is a damaged gzip file") as error:
        read_table(file, {"path"})
    assert "\n" not in str(error.value)


READ = """
import sys
from pathlib import Path
from cxrdist.data.tables import read_table, read_text
from cxrdist.errors import CxrdistError
try:
    read_table(Path(sys.argv[1]), {"path"})
except CxrdistError as error:
    print(error)
"""


@pytest.mark.parametrize("more", [1, 1000])
def test_a_table_of_more_than_1_gib_is_refused_unread(tmp_path, more):
    """By its size alone: the file is sparse, and no disk holds what it declares."""
    file = tmp_path / "t.csv"
    file.touch()
    os.truncate(file, 2**30 + more)
    with pytest.raises(CxrdistError, match=f"has {2**30 + more} bytes, expected a table of at mo"):
        read_text(file)


def test_a_gzip_bomb_is_refused_before_memory_is_taken(tmp_path):
    """1 MiB that unpacks to more than 1 GiB needs no more memory than any small table."""
    file = tmp_path / "t.csv.gz"
    file.write_bytes(gzip.compress(bytes(16 << 20), compresslevel=1) * 65)
    done = run_measured(READ, file)
    assert done.code == 0, done.stderr
    assert done.stdout.endswith("t.csv.gz: unpacks to more than 1 GiB, expected a table")
    assert done.mib < 200


def test_a_pipe_in_place_of_a_table_is_one_line(tmp_path):
    """It would be waited for until somebody writes."""
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(CxrdistError, match=r"table\.csv: cannot be read \(not a regular file\)"):
        read_text(tmp_path / "table.csv")
