"""Predictions of any program are read as they stand, or refused in one line."""

import numpy as np
import pytest
from scipy.special import expit

from cxrdist.documents import Real, typed
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.prediction_table import read_prediction_table, to_logits
from cxrdist.files import finite

ONE = "key,label,prob_a,prob_b\nx,a,0.9,0.1\ny,b,0.2,0.8\n"


def table(tmp_path, text, encoding="utf-8"):
    """Write a table and read it."""
    file = tmp_path / "given.csv"
    file.write_bytes(text.encode(encoding))
    return read_prediction_table(file)


def test_a_spreadsheets_table_is_read(tmp_path):
    """Semicolons, decimal commas, Latin-1, other names of columns, No Finding, unknown patients."""
    read = table(
        tmp_path,
        "Path;Labels;Uncertain;Patient ID;Gender;Age;View Position;prob_Ödem;prob_b;more\r\n"
        "d/1.png;Ödem|b;;7;female;45Y;PA;0,25;1;x\r\n"
        "d/2.png;No Finding;b;;m;;??;0;0,5;x\r\n"
        ";;;;;;;;;\r\n",
        "latin-1",
    )
    scored = read.scored
    assert (scored.task, scored.classes) == ("multilabel", ["Ödem", "b"])
    assert (scored.keys, scored.patients) == (["d/1.png", "d/2.png"], ["7", "image:d/2.png"])
    assert scored.targets.tolist() == [[1, 1], [0, -1]]
    assert read.probabilities.tolist() == [[0.25, 1], [0, 0.5]]
    assert scored.groups == {"sex": ["F", "M"], "age": ["45", ""], "view": ["PA", ""]}
    assert read.splits == []
    assert any("windows-1252" in note for note in read.notes)
    assert {
        "view is not a known view in 1 rows, and counts as unknown",
        "columns that were not used: more",
    } <= {*read.notes}


def test_more_rows_than_fit_are_refused(tmp_path, monkeypatch):
    """The bound itself is still taken."""
    monkeypatch.setattr("cxrdist.evaluate.prediction_table.MOST_IMAGES", 2)
    assert table(tmp_path, ONE).scored.keys == ["x", "y"]
    with pytest.raises(CxrdistError, match="has more than 2 rows, expected fewer"):
        table(tmp_path, f"{ONE}z,a,0.5,0.5\nw,a,0.5,0.5\n")


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (ONE, "multiclass"),
        (ONE.replace("y,b", "y,a|b"), "multilabel"),
        (ONE.replace("label", "labels"), "multilabel"),
        ("key,label,missing,prob_a,prob_b\nx,a,b,0.9,0.1\n", "multilabel"),
        ("key,label,prob_a\nx,a,0.9\ny,,0.1\n", "multilabel"),
    ],
)
def test_the_labels_decide_the_task(tmp_path, text, task):
    """One class per image only if the column is label, no cell has several, and classes differ."""
    assert table(tmp_path, text).scored.task == task


def test_certain_probabilities_keep_their_order():
    """Exact 0 and 1 are finite, beyond the smallest double and the largest one below 1."""
    given = np.array([[0, 5e-324, 1e-30], [0.5, 1, 1 - 2**-53], [0, 1, 0.5]])
    logits = to_logits(given)
    assert np.isfinite(logits).all()
    order = np.argsort(given.ravel(), kind="stable")
    assert (np.diff(logits.ravel()[order]) > 0).tolist() == (
        np.diff(given.ravel()[order]) > 0
    ).tolist()
    assert expit(logits) == pytest.approx(given, abs=2e-16)
    assert np.abs(to_logits(np.array([[0.0, 1.0]]))).max() == 40


def test_logits_of_the_table_are_taken(tmp_path):
    """Probabilities of sure predictions are equal, the logits beside them are not."""
    read = table(tmp_path, "key,label,prob_a,prob_b,logit_b,logit_a\nx,a,1,1,50,60\n")
    assert read.scored.logits.tolist() == [[60, 50]]
    assert read.notes == ()


def test_every_reader_takes_the_numbers_of_float32(tmp_path):
    """Tables of predictions, cells of other tables and JSON: up to the largest, and not above."""
    largest = np.finfo(np.float32).max
    above = float(largest) * (1 + 1e-9)
    given = "key,label,prob_a,prob_b,logit_b,logit_a\nx,a,1,1,50,{}\n"
    assert table(tmp_path, given.format(float(largest))).scored.logits[0, 0] == largest
    assert finite(str(float(largest))) == typed(float(largest), Real) == largest
    with pytest.raises(CxrdistError, match=r"logit_a is '3\.402.*', expected -3\.402"):
        table(tmp_path, given.format(above))
    for read in (finite, lambda text: typed(float(text), Real)):
        with pytest.raises(ValueError, match=r"3\.402"):
            read(str(above))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.9", "1.01"), "given.csv row 2: prob_a is '1.01', expected 0 to 1"),
        (("0.9", "-0.1"), "row 2: prob_a is '-0.1', expected 0 to 1"),
        (("0.9", "nan"), "row 2: prob_a is 'nan', expected 0 to 1"),
        (("0.9", ""), "row 2: prob_a is '', expected 0 to 1"),
        (("y,b", "x,b"), "row 3: key 'x' is also in .*given.csv row 2; keep one"),
        (("y,b", ",b"), "row 3: key is empty; fill it or drop the row"),
        (("y,b", "y,c"), "row 3: label 'c' has no column prob_c; the table has a, b"),
        (("y,b", "y,"), "row 3: label is empty; fill it or drop the row"),
        (("y,b", "y,b|b"), "row 3: b is named twice"),
        (("0.8", "0.8,1"), "row 3: more cells than columns"),
        (("label", "truth"), "has no column label; expected key, label and prob_CLASS"),
        (("key", "image"), "has no column key"),
        (("prob_", "p_"), "has 0 columns prob_CLASS, expected 1 to"),
        (("prob_b", "prob_a"), "has the column 'prob_a' a second time"),
        (("prob_b", "prob_"), "has the column 'prob_' without a valid class name"),
        (("key,", "key,path,patient,"), "fewer cells"),
        ((",prob_a", ",labels,prob_a"), "has the columns label and labels"),
        (("\nx,a,0.9,0.1\ny,b,0.2,0.8", ""), "has no rows below the header"),
        (("key,label", "key,Subject_ID,label"), "'Subject_ID' may be meant as the patient"),
        ((ONE, "key,label,prob_a,Type\nx,a,1,Train\n"), "'Type' has nothing but train, val and"),
        (("key,label,", "key,split,label,"), "fewer cells"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, change, message):
    """The line names file, row and column, what was expected, and how to mend it."""
    with pytest.raises(CxrdistError, match=message) as caught:
        table(tmp_path, ONE.replace(*change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (("nan", "7"), "row 2: patient 'nan' stands for a missing value"),
        (("7", "8.1E+14"), "row 3: patient 8.1E.14 was rounded by a spreadsheet"),
        (("7", "007.0"), "patients '007.0' and '7' are two spellings of one"),
    ],
)
def test_a_patient_is_read_as_from_an_image_table(tmp_path, patients, message):
    """Images without a patient are not of one, and two spellings are; intervals rest on it."""
    rows = (f"{key},{who},{key},0.9,0.1\n" for key, who in zip("ab", patients, strict=True))
    with pytest.raises(CxrdistError, match=message):
        table(tmp_path, f"key,patient,label,prob_a,prob_b\n{''.join(rows)}")


def test_patients_of_test_and_of_another_split_are_noted(tmp_path):
    """What was fitted or calibrated on them is not tested on others."""
    splits = {"a": ("7", "val"), "b": ("7", "test"), "c": ("8", "test"), "d": ("9", "train")}
    rows = (f"{key},{who},{split},a,0.9,0.1\n" for key, (who, split) in splits.items())
    read = table(tmp_path, f"key,patient,split,label,prob_a,prob_b\n{''.join(rows)}")
    assert read.notes == ("1 patients of test images have images in train or val too",)
    assert read.splits == ["val", "test", "test", "train"]


def test_the_name_of_a_class_has_up_to_255_characters(tmp_path):
    """A name of one more is refused, as it is in shards and models."""
    longest = "a" * 255
    text = ONE.replace("x,a", f"x,{longest}").replace("prob_a", f"prob_{longest}")
    assert table(tmp_path, text).scored.classes == [longest, "b"]
    with pytest.raises(CxrdistError, match="without a valid class name"):
        table(tmp_path, text.replace(longest, longest + "a"))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("test", "later"), "row 3: split is 'later', expected train, val or test"),
        (("train", "val"), "no row has the split test"),
    ],
)
def test_splits_are_those_that_are_known(tmp_path, splits, message):
    """A split that is none, or no image to score, is refused."""
    text = "key,label,split,prob_a,prob_b\nx,a,{},0.9,0.1\ny,b,{},0.2,0.8\n".format(*splits)
    with pytest.raises(CxrdistError, match=message):
        table(tmp_path, text)
    read = table(tmp_path, text.replace(splits[0], "Testing").replace(splits[1], "dev"))
    assert read.splits == ["test", "val"]
