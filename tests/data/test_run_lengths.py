"""Tables as CheXmask has them: any order of columns, cells of 20 kB, line breaks in quotes."""

import csv
import gzip

import numpy as np
import pytest

from cxrdist.data.run_lengths import list_runs, read_runs
from cxrdist.errors import CxrdistError

# Of the tables of ChestX-ray8, CheXpert, MIMIC-CXR-JPG, PadChest and VinDr-CXR.
NAMES = ("Image Index", "Path", "dicom_id", "ImageID", "image_id")
COLUMNS = (
    *("Dice RCA (Mean)", "Dice RCA (Max)", "Landmarks", "Left Lung", "Right Lung", "Heart"),
    *("Height", "Width"),
)


def encode(mask: np.ndarray) -> str:
    """Runs of a mask: starts from 1 along the rows, and lengths; one pixel after the other."""
    runs: list[list[int]] = []
    for place, covered in enumerate(mask.ravel(), start=1):
        if covered and runs and sum(runs[-1]) == place:
            runs[-1][1] += 1
        elif covered:
            runs.append([place, 1])
    return " ".join(f"{start} {length}" for start, length in runs)


def lungs(height=50, width=40) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    left, right = random.random((2, height, width)) < 0.3
    return left, right


def row(name, mean="0.9", **cells) -> dict[str, object]:
    left, right = lungs()
    known = {
        **{"name": name, "Dice RCA (Mean)": mean, "Dice RCA (Max)": "0.95"},
        **{"Landmarks": "[[1 2]\n [3 4]]", "Heart": "1 2000"},
        **{"Left Lung": encode(left), "Right Lung": encode(right), "Height": 50, "Width": 40},
    }
    return {**known, **cells}


def write(file, rows, name="Image Index", columns=COLUMNS, index=False):
    with open(file, "w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow([*([""] if index else []), name, *columns])
        for i, cells in enumerate(rows):
            writer.writerow([*([i] if index else []), cells["name"], *(cells[c] for c in columns)])
    return file


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", [False, True])
def test_a_row_gives_both_lungs_and_no_heart(tmp_path, name, index):
    """Whatever the order of the columns, with pandas' index or without."""
    file = write(tmp_path / "t.csv", [row("a.png"), row("b.png")], name, COLUMNS[::-1], index)
    found = list(list_runs(file))
    assert [(r.name, r.quality) for r in found] == [("a.png", 0.9), ("b.png", 0.9)]
    left, right = lungs()
    for r in found:
        mask = read_runs(file, r.first_byte, r.num_bytes)
        assert np.array_equal(mask, (left | right) * np.uint8(255))


def test_the_smaller_of_mean_and_maximum_counts(tmp_path):
    """In PadChest's table the names of the two are swapped."""
    rows = [row("a", mean="0.9", **{"Dice RCA (Max)": "0.6"})]
    assert next(list_runs(write(tmp_path / "t.csv", rows))).quality == 0.6
    columns = [c for c in COLUMNS if "Dice" not in c]
    assert np.isnan(next(list_runs(write(tmp_path / "t.csv", rows, columns=columns))).quality)


def test_long_cells_are_read_and_others_keep_their_limit(tmp_path):
    """A cell of more than the 131,072 characters that Python's csv allows."""
    runs = " ".join(f"{i} 1" for i in range(1, 40_000, 2))
    rows = [row("a", **{"Left Lung": runs, "Right Lung": "", "Height": 200, "Width": 200})]
    before = csv.field_size_limit()
    found = next(list_runs(write(tmp_path / "t.csv", rows)))
    assert len(runs) > before
    assert (read_runs(tmp_path / "t.csv", *found[2:4]) > 0).sum() == 20_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ({"Left Lung": "1 2 3"}, "not pairs of a start and a length"),
        ({"Left Lung": "0 5"}, "exceed the 2000 pixels"),
        ({"Left Lung": "1999 3"}, "exceed the 2000 pixels"),
        ({"Left Lung": "5 -3"}, "exceed the 2000 pixels"),
        ({"Left Lung": "9223372036854775807 9223372036854775807"}, "exceed the 2000 pixels"),
        ({"Left Lung": "1 99999999999999999999"}, "not whole numbers"),
        ({"Left Lung": "1 1500 900 501"}, "cover a pixel more than once"),
        ({"Left Lung": "1 x"}, "not whole numbers"),
        ({"Height": "1e9", "Width": "1e9"}, "Height or Width is '1e9'"),
        ({"Height": "10000000", "Width": "10000000"}, "expected at most 50000000 pixels"),
        ({"Height": ""}, "Height or Width is ''"),
        ({"Height": "50.5"}, "Height or Width is '50.5'"),
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(tmp_path, cells, problem):
    """Before anything of that size is made."""
    found = next(list_runs(write(tmp_path / "t.csv", [row("a", **cells)])))
    with pytest.raises(CxrdistError, match=rf"t\.csv .*{problem}"):
        read_runs(tmp_path / "t.csv", found.first_byte, found.num_bytes)


def test_a_compressed_table_is_refused_by_name(tmp_path):
    """With what to do about it."""
    data = write(tmp_path / "t.csv", [row("a")]).read_bytes()
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(data))
    with pytest.raises(CxrdistError, match=r"compressed \(gzip\).*unpack it first, such as by gun"):
        list(list_runs(tmp_path / "t.csv.gz"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a table of run lengths .* found no header"),
        ("path,label\n", "expected a table of run lengths .* found path, label"),
        ("Path,dicom_id,Left Lung,Right Lung,Height,Width\n", "one column that names the image"),
        ("Path,Left Lung,Left Lung,Right Lung,Height,Width\n", "each once"),
        ("Path,Left Lung,Right Lung,Height,Width\na,1 2,\n", "row 2: has 3 cells, expected 5"),
        ('Path,Left Lung,Right Lung,Height,Width\na,"1 2,,9,9\n', "row 2: is not a valid CSV row"),
        (
            "Path,Left Lung,Right Lung,Height,Width,Dice RCA (Mean)\na,,,9,9,good\n",
            "row 2: Dice RCA is 'good', expected 0 to 1",
        ),
    ],
)
def test_other_tables_are_refused(tmp_path, text, problem):
    """One line with the file, and the row where one is wrong."""
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(CxrdistError, match=rf"t\.csv.*{problem}"):
        list(list_runs(tmp_path / "t.csv"))


def test_a_row_without_an_end_is_bounded(tmp_path):
    """An open quote does not read the rest of a large file into memory."""
    header = "Path,Left Lung,Right Lung,Height,Width\n"
    with open(tmp_path / "t.csv", "w") as table:
        table.write(f'{header}a,"' + "1 1\n" * 1_100_000)
    with pytest.raises(CxrdistError, match="row 2: has more than 4194304 bytes, or an open quote"):
        list(list_runs(tmp_path / "t.csv"))
