from pathlib import Path

import pytest
from support import make_images

from cxrdist.config import PackConfig
from cxrdist.data.image_table import read_image_table
from cxrdist.data.index import read_index
from cxrdist.data.pack import pack
from cxrdist.data.sources import read_source
from cxrdist.errors import CxrdistError

SAVE = "save it as CSV UTF-8"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table to be written, beside three images and one outside."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "../out.png"):
        (folder / name).touch()
    return folder / "table.csv"


def read(table: Path, text: str | bytes, **options: object):
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_source(PackConfig("csv", table, Path("out"), **options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\na.png,x\n",
            "has no column path; expected path and label (or labels), found file",
        ),
        ("path,label\na.png,\n", "row 2: label is empty"),
        ("path,label\na.png,x\nlost.png,y\n", "row 3: no file"),
        (f"path,label\n{'a' * 5000}.png,x\n", "row 2: no file"),
        ("path,label\na.png,x\n\n\nlost.png,y\n", "row 5: no file"),
        ("path,label\na.png,x\na.png,y\n", "a.png is in 2 rows"),
        ("path,label\na.png,x\n./a.png,y\n", "a.png is in 2 rows"),
        ("path,label\na.png,x\nsub/../a.png,y\n", "a.png is in 2 rows"),
        ("path,label\na.png,x\n../out.png,y\n", "row 3: ../out.png is outside of the table's"),
        ("path,label\na.png,x\nsub/../../out.png,y\n", "is outside of the table's folder"),
        ("path,label\na.png,x\n/etc/hostname,y\n", "row 3: /etc/hostname is outside"),
        ("path,label\na.png,\x1b[1mx\nb.png,y\n", "class '\\x1b[1mx': expected a name without"),
        ("path,label,split\na.png,x,tset\n", "row 2: split is 'tset'"),
        ("path,label,split\na.png,x,test\nb.png,y,\n", "row 3: has no split"),
        ("path,label\na.png,x,1\n", "row 2: more cells than columns (3, expected 2)"),
        ("path,label,view\na.png,x\n", "row 2: fewer cells than columns (2, expected 3)"),
        ("path,label\na.png,x\n", "found 1 class (x), expected at least 2"),
        ("path,label\na.png,x\nb.png,nan\n", "row 3: label 'nan' stands for a missing value"),
        ("path,labels\na.png,x\nb.png,None\n", "row 3: label 'None' stands for a missing value"),
        ("path,label\na.png,0\nb.png,0.0\n", "'0' and '0.0' are two spellings of one name"),
        ("path,label\na.png,Normal\nb.png,normal\n", "'Normal' and 'normal' are two spellings"),
        ("path,labels,uncertain\na.png,x,x|y\n", "row 2: x is in two of labels, uncertain"),
        ("path,labels,missing\na.png,x,nan\n", "row 2: label 'nan' stands for a missing value"),
        ("path,label,uncertain\na.png,x,y\n", "the column 'uncertain' needs a column labels"),
        ("path,x,missing\na.png,1,y\n", "the column 'missing' needs a column labels"),
        ("path,x\na.png,1\nb.png,0\nsub/c.png,2\n", "row 4: x is '2', but most of its column"),
        ("path,x\na.png,1\nb.png,nan\n", "row 3: x is 'nan', but most of its column is 1, 0"),
        ("path,x,x\na.png,1,0\n", "two columns of labels are called x"),
        ("path,x\na.png,\n", "has no column label; expected path and label (or labels), or a col"),
        ("path,height\na.png,1.7\n", "has no column label; expected path and label (or labels)"),
        ("path,smoker,Diagnosis\na.png,1,x\n", "'Diagnosis' may be meant as the label"),
        ("path,x,fold\na.png,1,0\n", "the column 'fold' may be meant as the split"),
        ("path,labels\na.png,x|No Finding\n", "row 2: has No Finding beside x"),
        ("path,label,labels\na.png,x,x\n", "has the columns label and labels"),
        ("path,label,Patient,patient_id\n", "the columns 'Patient' and 'patient_id' are both the"),
        ("path,label,subject_id\na.png,x,1\n", "'subject_id' may be meant as the patient"),
        ("path,label,Partition\na.png,x,1\n", "'Partition' may be meant as the split"),
        ("path,label,patient_num\na.png,x,1\n", "'patient_num' may be meant as the patient"),
        ("path,label,Case.No\na.png,x,1\n", "'Case.No' may be meant as the patient"),
        ("path,label,Is_Val\na.png,x,1\n", "'Is_Val' may be meant as the split"),
        (
            "path,label,Dataset_type\na.png,x,TRAIN\nb.png,y,Test\n",
            "the column 'Dataset_type' has nothing but train, val and test; call it split",
        ),
        ("path,x,\na.png,1,test\nb.png,0,test\n", "the column '' has nothing but train, val"),
        (
            "path,label,patient\na.png,x,1\nb.png,y,1.0\n",
            "patients '1' and '1.0' are two spellings",
        ),
        (
            "path,label,patient\na.png,x,007\nb.png,y,8\nsub/c.png,y,7\n",
            "patients '007' and '7' are two spellings",
        ),
        ("path,label,patient\na.png,x,1.2E+15\n", "row 2: patient 1.2E+15 was rounded by a sprea"),
        ("path,label,patient\na.png,x,NaN\n", "row 2: patient 'NaN' stands for a missing value"),
    ],
)
def test_bad_tables_are_refused_with_the_row(table, text, message):
    """A bad table is one clear error that names the row as a spreadsheet counts it."""
    with pytest.raises(CxrdistError) as error:
        read(table, text)
    assert message in str(error.value)


def test_a_file_by_its_absolute_path_is_the_same_file(table):
    """Otherwise one image would be packed twice, as two patients."""
    with pytest.raises(CxrdistError, match=r"a\.png is in 2 rows; keep one of them"):
        read(table, f"path,label\na.png,x\n{table.parent}/a.png,y\n", allow_outside=True)


@pytest.mark.parametrize(
    "patient", ["patient", "Patient", "patient_id", "PatientID", "PATIENT ID", "Patient.ID"]
)
def test_columns_are_known_whatever_their_spelling(table, patient):
    """Nothing that a column tells is lost for a capital letter."""
    source = read(
        table,
        f"Path,Label,{patient},Split,SOURCE,View Position,Patient_Sex,Age,Height,\n"
        "a.png,x,7,Train,here,PA,female,045Y,1.7,\nb.png,y,8,TEST,there,AP,m,61.5,1.8,\n",
    )
    first, second = source.records
    assert (first.patient, first.split, first.source, first.view) == ("7", "train", "here", "PA")
    assert (first.sex, first.age) == ("F", 45)
    assert (second.patient, second.split, second.sex, second.age) == ("8", "test", "M", 61.5)
    assert source.notes == ("ignored columns: Height, (no name)",)


def test_a_table_may_have_a_column_for_each_label(table):
    """CheXpert's cells, as whole numbers or floats; which columns are labels is said."""
    source = read(
        table,
        "Path,Age,AP/PA,No Finding,Edema,Fracture,Days,Told,\n"
        "a.png,60,AP,1.0,,,3,nan,1\nb.png,61,PA,0,-1.0,,1,nan,0\nsub/c.png,62,AP,,U,,9,,1\n",
    )
    assert source.task == "multilabel"
    assert source.classes == ["No Finding", "Edema", "Fracture"]
    assert [(r.label, r.uncertain, r.missing) for r in source.records] == [
        ("No Finding", "", "Edema|Fracture"),
        ("", "Edema", "Fracture"),
        ("", "Edema", "No Finding|Fracture"),
    ]
    assert source.notes == (
        "columns of labels: No Finding, Edema, Fracture",
        "columns of labels without a filled cell: Fracture",
        "ignored columns: AP/PA, Days, Told, (no name)",
    )


def test_labels_may_be_uncertain_or_missing_by_name(table):
    """As samples.csv has them: a label that no row states is a class all the same."""
    source = read(
        table, "path,labels,Uncertain,missing\na.png,x,y| z,\nb.png,,,w|x\nsub/c.png,y|x,,\n"
    )
    assert source.classes == ["w", "x", "y", "z"]
    assert [(r.label, r.uncertain, r.missing) for r in source.records] == [
        ("x", "y|z", ""),
        ("", "", "w|x"),
        ("x|y", "", ""),
    ]


def test_a_view_is_one_of_the_known_and_other_texts_are_counted(table):
    """A text that names none is no view; an empty cell needs no note."""
    text = "path,label,view\na.png,x,Postero-anterior\nb.png,y,sideways\nsub/c.png,y,\n"
    table.write_text(text)
    source = read_image_table(table)
    assert [record.view for record in source.records] == ["PA", "", ""]
    (note,) = (note for note in source.notes if "view" in note)
    assert note == "view is not known in 1 rows, such as 'sideways'; it is left empty"


def test_what_is_no_sex_or_age_is_empty_and_counted(table):
    """An age of 411 years, as ChestX-ray14 has one, is nobody's."""
    source = read(table, "path,label,sex,age\na.png,x,O,411\nb.png,none,M,12\n")
    assert [(record.sex, record.age) for record in source.records] == [("", None), ("M", 12)]
    assert source.notes == (
        "sex is not M or F in 1 rows; it is left empty",
        "age is not 0 to 120 years in 1 rows; it is left empty",
        "1 images have the label 'none', which is a class like any other",
    )


def test_no_finding_is_none_of_several_labels(table):
    """Whatever its case; in a column of one label per image it is a class."""
    text = "path,labels\na.png,no finding\nb.png,x|y\nsub/c.png,No_Finding\n"
    source = read(table, text)
    assert source.classes == ["x", "y"]
    assert [record.label for record in source.records] == ["", "x|y", ""]
    source = read(table, "path,label\na.png,No Finding\nb.png,x\n")
    assert source.classes == ["No Finding", "x"]


def test_files_that_no_row_lists_are_named(table):
    """Those below the table's folder, the table too; images outside are read when that is meant."""
    source = read(table, "path,label\na.png,x\n../out.png,y\n", allow_outside=True)
    assert [record.path for record in source.records] == ["../out.png", "a.png"]
    assert source.left_out == (
        ("b.png", "not in the table"),
        ("sub/c.png", "not in the table"),
        ("table.csv", "the table itself"),
    )
    assert source.num_found == 5


def test_a_file_that_is_listed_through_a_link_is_one_file(table):
    """It is neither left out nor counted twice."""
    (table.parent / "link").symlink_to(table.parent / "sub")
    source = read(table, "path,label\na.png,x\nlink/c.png,y\n")
    assert {path for path, _ in source.left_out} == {"b.png", "link", "table.csv"}
    assert source.num_found == len(source.records) + len(source.left_out)


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("utf-8", ()),
        ("utf-8-sig", ()),
        ("utf-16", (f"the table is read as utf-16; {SAVE} if letters are wrong",)),
        (
            "cp1252",
            ("the table is read as windows-1252; save it as CSV UTF-8 if letters are wrong",),
        ),
    ],
)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_spreadsheets_of_all_kinds_are_read(table, encoding, note, separator):
    """With the encodings and separators that they write; what was assumed is said."""
    text = "path,label,patient\na.png,gesund,Müller\nb.png,krank,Größe\n".replace(",", separator)
    source = read(table, text.replace("\n", "\r\n").encode(encoding))
    assert [record.patient for record in source.records] == ["Müller", "Größe"]
    names = {";": "semicolons", "\t": "tabs"}
    said = f"the table is read with {names.get(separator)} between the cells"
    assert source.notes == (*note, *([said] if separator != "," else []))


def test_separators_of_lines_in_names_do_not_break_the_list_of_samples(tmp_path):
    """U+0085, U+2028 and both ends of lines in names, sources and patients come back unchanged."""
    folder = make_images(tmp_path / "in", {"a": 12, "b": 12})
    (folder / "a" / "a000_0.png").rename(folder / "a" / "x\u2028y\nz\r.png")
    rows = [
        f'"{file.relative_to(folder)}",{file.parent.name},"p\u0085\r{i // 2}","s\u2028\n{i % 2}"'
        for i, file in enumerate(sorted(folder.rglob("*.png")))
    ]
    (folder / "t.csv").write_text("\n".join(["path,label,patient,source", *rows]))
    options = {"size": 32, "split": "0.5/0.25/0.25", "workers": 1}
    pack(PackConfig("csv", folder / "t.csv", tmp_path / "out", **options))
    samples = read_index(tmp_path / "out").samples
    assert {sample.path for sample in samples} > {"a/x\u2028y\nz\r.png"}
    assert {sample.patient for sample in samples} == {f"p\u0085\r{i}" for i in range(12)}


def test_patients_of_names_are_taken_where_the_table_has_none(table):
    """--patient-pattern fills empty cells."""
    table.write_text("path,label,patient\na.png,x,7\nb.png,y,\n")
    records = read_image_table(table, r"^(\w)\.").records
    assert [record.patient for record in records] == ["7", "b"]


def test_a_folder_in_place_of_the_table_is_called_one(tmp_path):
    """It exists, so that "no such file" would be untrue."""
    with pytest.raises(CxrdistError, match=r"--input .*: is a folder; expected a CSV with path"):
        read_image_table(tmp_path)
