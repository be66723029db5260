import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cxrdist.bootstrap import draw
from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.groups import Groups, compare_groups
from cxrdist.evaluate.scored import Scored
from cxrdist.report.groups import flagged_gaps
from cxrdist.report.html import report
from cxrdist.report.values import number

ODD_SOURCE = "<i>$a$b$</i>"


def measured(classes: list[str], fewest: int = 10) -> Groups:
    """Groups of 900 patients; the network knows nothing of one sex."""
    random = np.random.default_rng(0)
    labels, sex = random.integers(0, len(classes), 900), random.integers(0, 2, 900)
    logits = random.normal(size=(900, len(classes)))
    logits += 3 * (sex == 1)[:, None] * (labels[:, None] == np.arange(len(classes)))
    names = [str(place) for place in range(900)]
    groups = {
        "sex": ["FM"[place] for place in sex],
        "source": [ODD_SOURCE if place % 2 else "other" for place in range(900)],
    }
    targets = (labels[:, None] == np.arange(len(classes))).astype(np.int8)
    scored = Scored("multiclass", classes, names, names, targets, logits, groups)
    return compare_groups(scored, draw(names, ["s"] * 900, 300), fewest)


def page_with(run: Path, groups: Groups) -> str:
    """The report of a run whose test split has these groups, with single spaces."""
    path = run / "test" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"groups": groups}))
    page = report(ReportConfig(run=run)).read_text(encoding="utf-8")
    return " ".join(page.split())


def test_flagged_gaps_are_told_in_words_with_both_figures(run: Path, made: SimpleNamespace):
    """Each with its interval; the figures are those of metrics.json."""
    groups = measured(made.CLASSES)
    gap = next(gap for gap in groups["gaps"] if gap["label"] == "COVID-19" and gap["flagged"])
    assert (gap["column"], gap["lower"], gap["higher"]) == ("sex", "F", "M")
    lines = flagged_gaps(groups)
    assert len(lines) == sum(gap["flagged"] for gap in groups["gaps"]) > 3
    line = next(line for line in lines if line.startswith("Sensitivity of COVID-19"))
    scores = [groups["columns"]["sex"][sex]["classes"]["COVID-19"] for sex in "FM"]
    told = [
        f"{number(s['recall'])} ({number(s['recall_interval'][0])} to "
        f"{number(s['recall_interval'][1])})"
        for s in scores
    ]
    assert f" is {told[0]} in female patients, {told[1]} in male patients; difference " in line
    assert line.endswith(f"corrected for {groups['comparisons']} comparisons of groups.")
    assert line in page_with(run, groups)


def test_names_of_groups_are_text_in_tables_and_charts(run: Path, made: SimpleNamespace):
    """Whatever a table calls a source; ids of the charts are unique."""
    page = page_with(run, measured(made.CLASSES))
    assert ODD_SOURCE not in page
    assert page.count("source: &lt;i&gt;$a$b$&lt;/i&gt;") >= 2 * len(made.CLASSES)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len({*ids})


def test_groups_of_few_patients_are_too_few_to_say(run: Path, made: SimpleNamespace):
    """Their figures stay in the tables, and nothing is compared."""
    page = page_with(run, measured(made.CLASSES, fewest=800))
    assert "Too few to say: no two groups have enough patients." in page
    assert "<br>too few to say" in page
    assert "Larger than chance" not in page


def test_groups_that_do_not_fit_together_are_named_in_one_line(run: Path, made: SimpleNamespace):
    """A gap of a column that is not there."""
    groups = measured(made.CLASSES)
    del groups["columns"]["sex"]
    with pytest.raises(CxrdistError, match=r"metrics\.json: expected .* misses 'sex'; run"):
        page_with(run, groups)


def test_metrics_without_groups_have_no_section(run: Path):
    """Those of older versions."""
    assert "Groups of patients" not in report(ReportConfig(run=run)).read_text(encoding="utf-8")
