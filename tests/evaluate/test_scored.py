import numpy as np
import pytest

from cxrdist.errors import CxrdistError
from cxrdist.evaluate.scored import read_scored

COLUMNS = "key,patient,label,uncertain,prob_A,prob_B,logit_A,logit_B"


@pytest.mark.parametrize("cell", ["nan", "inf", "3.5e38", "much", ""])
def test_the_line_of_a_bad_logit_is_named(tmp_path, cell):
    """It is the third of five lines; the largest float32 is 3.4028235e38."""
    rows = [f"k{n},p{n},A,,0.5,0.5,0,{value}" for n, value in enumerate(["1", cell, "2", "3"])]
    file = tmp_path / "predictions.csv"
    file.write_text("\n".join([COLUMNS, *rows]) + "\n")
    with pytest.raises(CxrdistError, match=r"predictions\.csv: line 3: "):
        read_scored(file, "multiclass")


@pytest.mark.parametrize(
    ("columns", "row", "fault"),
    [
        (COLUMNS, "", "there are no rows; run `cxrdist evaluate` again"),
        (COLUMNS, "k,p,A,,0.5,0.5,0", "line 2: expected 8 fields"),
        (COLUMNS, "k,p,A,,0.5,0.5,0,0,0", "line 2: expected 8 fields"),
        (COLUMNS, "k,p,A|B,,0.5,0.5,0,0", "'A|B' is not one label"),
        (COLUMNS, "k,p,C,,0.5,0.5,0,0", "there is no column prob_C"),
        (COLUMNS, "k,p,A,A,0.5,0.5,0,0", "a label is named twice"),
        (COLUMNS, "k,p,A,,1.5,0.5,0,0", "a probability is not within 0 and 1"),
        (COLUMNS.replace("uncertain", "label"), "k,p,A,A,0.5,0.5,0,0", "the same name"),
        (COLUMNS.replace("logit_B", "other"), "k,p,A,,0.5,0.5,0,0", "there is no column logit_B"),
        (COLUMNS.replace("patient", "other"), "k,p,A,,0.5,0.5,0,0", "line 2: misses 'patient'"),
    ],
)
def test_a_damaged_table_is_refused_by_every_reader_of_it(tmp_path, columns, row, fault):
    """All commands read predictions.csv by the same function, with the checks of the report."""
    file = tmp_path / "predictions.csv"
    file.write_text(f"{columns}\n{row}\n" if row else f"{columns}\n")
    with pytest.raises(CxrdistError) as error:
        read_scored(file, "multiclass")
    assert fault in str(error.value)
    assert str(error.value).startswith(f"{file}: ")


def test_rows_become_arrays_with_codes_of_labels(tmp_path):
    """1 is present, 0 absent, -1 uncertain and -2 missing; a group is kept where it is a column."""
    file = tmp_path / "predictions.csv"
    file.write_text(
        "key,patient,label,uncertain,missing,sex,prob_A,prob_B,logit_A,logit_B\n"
        "k,p,B,A,,F,0.5,0.88,0,2\nl,q,,,A|B,,0.5,0.12,0.25,-2\n"
    )
    scored = read_scored(file, "multilabel")
    assert scored.targets.tolist() == [[-1, 1], [-2, -2]]
    assert scored.logits.tolist() == [[0, 2], [0.25, -2]]
    assert (scored.keys, scored.patients, scored.groups) == (
        ["k", "l"],
        ["p", "q"],
        {"sex": ["F", ""]},
    )
    assert np.array_equal(scored.predicted, [[True, True], [True, False]])
