import numpy as np
import pytest

from cxrdist.data.labels import (
    MISSING,
    UNCERTAIN,
    read_cells,
    read_uncertain,
    settle_uncertain,
)
from cxrdist.errors import CxrdistError


def test_cells_are_read_in_all_their_spellings():
    """1, 0, -1, U and nothing, also as floats, with commas and blanks, as published and resaved."""
    cells = {"a": "1.0", "b": " 1", "c": "0.0", "d": "-1.0", "e": "u", "f": "-1", "g": "", "h": " "}
    commas = {name: cell.replace(".", ",") for name, cell in cells.items()}
    assert read_cells("t.csv row 2", commas) == read_cells("t.csv row 2", cells)
    assert read_cells("t.csv row 2", cells) == {
        "label": "a|b",
        "uncertain": "d|e|f",
        "missing": "g|h",
    }


@pytest.mark.parametrize("text", ["2", "nan", "yes", "-2", "1.00", "01", "?"])
def test_another_cell_is_refused_with_its_row(text):
    """What is not one of them is never taken for missing."""
    with pytest.raises(CxrdistError, match=r"t.csv row 9: Edema is '.*', expected 1, 0, -1, U"):
        read_cells("t.csv row 9", {"Edema": text})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ignore", ("ignore", {})),
        ("positive,Edema=negative", ("positive", {"Edema": "negative"})),
        ("positive , Edema = negative", ("positive", {"Edema": "negative"})),
        ("Edema=negative, a=ignore", ("ignore", {"Edema": "negative", "a": "ignore"})),
        ("negative,a, b=c=positive", ("negative", {"a, b=c": "positive"})),
    ],
)
def test_ways_are_read_for_all_labels_and_for_single_ones(text, expected):
    """Names may hold commas and equals signs; without a word for all, the others are ignored."""
    assert read_uncertain(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "both",
        "positive,",
        "positive,negative",
        "a=positive,a=ignore",
        "=",
        "=positive",
        "U-Ones",
    ],
)
def test_ways_that_are_none_are_refused(text):
    """Also an empty one, and two for one label."""
    with pytest.raises(CxrdistError, match="expected ignore, positive or negative"):
        read_uncertain(text)


def test_uncertain_cells_count_as_asked_and_missing_ones_never():
    """U-Ones for all, U-Zeros for one label; what is known stays."""
    targets = np.array([[1, UNCERTAIN, MISSING], [UNCERTAIN, 0, UNCERTAIN]], np.int8)
    found = settle_uncertain(targets, ["a", "b", "c"], "positive,c=negative")
    assert found.tolist() == [[1, 1, MISSING], [1, 0, 0]]
    assert found.dtype == np.int8
    assert np.array_equal(settle_uncertain(targets, ["a", "b", "c"], "ignore"), targets)
    with pytest.raises(CxrdistError, match="no class 'd' in the shards; expected one of a, b"):
        settle_uncertain(targets, ["a", "b", "c"], "d=ignore")
