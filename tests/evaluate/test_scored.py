import pytest

from cxrdist.errors import CxrdistError
from cxrdist.evaluate.scored import read_scored


@pytest.mark.parametrize("cell", ["nan", "inf", "much", ""])
def test_the_line_of_a_bad_logit_is_named(tmp_path, cell):
    """It is the third of five lines."""
    rows = [f"k{n},p{n},A,0.5,{value}" for n, value in enumerate(["1", cell, "2", "3"])]
    file = tmp_path / "predictions.csv"
    file.write_text("\n".join(["key,patient,label,logit_A,logit_B", *rows]) + "\n")
    with pytest.raises(CxrdistError, match=r"predictions\.csv: line 3: "):
        read_scored(file, "multiclass")
