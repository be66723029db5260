import pytest

from cxrdist.data.tables import read_table
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
