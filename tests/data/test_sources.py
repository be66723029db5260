import pytest
from support import make_images

from cxrdist.config import PackConfig
from cxrdist.data.class_folders import read_class_folders
from cxrdist.data.image_table import read_image_table
from cxrdist.data.records import count_unmatched
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError


def test_folder_source_reads_class_folders_and_patients(tmp_path):
    """Class folders give label, path and patient; what is no image is passed over."""
    folder = make_images(tmp_path / "in", {"x": 3, "y": 2})
    (folder / "x" / "notes.txt").write_text("no image")
    (folder / "table.csv").write_text("no class")
    records = read_class_folders(folder, r"^(\w+)_").records
    assert [(r.path, r.label, r.patient) for r in records] == [
        ("x/x000_0.png", "x", "x000"),
        ("x/x000_1.png", "x", "x000"),
        ("x/x001_0.png", "x", "x001"),
        ("y/y000_0.png", "y", "y000"),
        ("y/y000_1.png", "y", "y000"),
    ]
    assert count_unmatched(records) == 0


def test_names_that_tell_no_patient_are_patients_of_their_own(tmp_path):
    """Where the pattern does not match, images are not thrown together, and are counted."""
    folder = make_images(tmp_path / "in", {"x": 2, "y": 2})
    records = read_class_folders(folder, r"^(x\d+)_").records
    assert len({r.patient for r in records if r.label == "y"}) == 2
    assert count_unmatched(records) == 2


def test_the_first_group_that_matches_is_the_patient(tmp_path):
    """One pattern can hold one way to name patients for each class."""
    folder = make_images(tmp_path / "in", {"x": 1, "y": 1})
    records = read_class_folders(folder, r"^(x\d+)_|^(y\d)").records
    assert [r.patient for r in records] == ["x000", "y0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\na.png,x\n",
            "has no column path; expected path and label (or labels), found file",
        ),
        ("path,label\na.png,\n", "row 2: label is empty"),
        ("path,label\na.png,x\nlost.png,y\n", "row 3: no file"),
        ("path,label\na.png,x\na.png,y\n", "a.png stands in 2 rows"),
        ("path,label,split\na.png,x,tset\n", "row 2: split is 'tset'"),
        ("path,label,split\na.png,x,test\nb.png,y,\n", "row 3: has no split"),
        ("path,label\na.png,x,1\n", "row 2: more cells than columns"),
        ("path,label\na.png,x\n", "found 1 class (x), expected at least 2"),
    ],
)
def test_bad_tables_are_refused_with_the_row(tmp_path, text, message):
    """A bad table is one clear error that names the row as a spreadsheet counts it."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(CxrdistError) as error:
        read_source(PackConfig("csv", table, tmp_path / "out"))
    assert message in str(error.value)


def test_a_table_gives_patient_source_and_split(tmp_path):
    """Optional columns of the table are taken over; a byte-order mark does no harm."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffpath,label,patient,split,source\na.png,x,7,train,here\nb.png,y,8,test,there\n"
    )
    records = read_image_table(table).records
    assert [(r.patient, r.split, r.source) for r in records] == [
        ("7", "train", "here"),
        ("8", "test", "there"),
    ]


@pytest.mark.parametrize("pattern", ["(", r"^\d+_"])
def test_a_pattern_without_a_patient_is_refused(tmp_path, pattern):
    """A pattern that cannot tell a patient is an error, not a data set without patients."""
    with pytest.raises(CxrdistError, match="--patient-pattern"):
        read_class_folders(tmp_path, pattern)
