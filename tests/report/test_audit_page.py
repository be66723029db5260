import json
import re
from pathlib import Path

import pytest

from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.report.audit import audit_view
from cxrdist.report.html import report
from cxrdist.report.values import number


def test_what_needs_no_lung_is_given_for_the_first_line_of_the_page(run: Path) -> None:
    """The accuracy by size and border alone, and that of the better model on thumbnails.

    A class is marked from an AUROC of 0.556 on, a small effect.
    """
    path = run / "audit.json"
    found = json.loads(path.read_text())
    small, smaller, *others = found["classes"]
    found["shortcut"]["auroc"] = dict.fromkeys(others) | {
        small: {"value": 0.57, "low": 0.56, "high": 0.58},
        smaller: {"value": 0.54, "low": 0.53, "high": 0.55},
    }
    path.write_text(json.dumps(found))
    models = [found["baseline"][name]["accuracy"] for name in ("logistic_regression", "perceptron")]
    best = max(models, key=lambda score: score["value"])
    view = audit_view(path)
    assert view.trivial == [
        (
            "size, border and brightness alone, without the lungs",
            "accuracy",
            found["shortcut"]["accuracy"],
        ),
        ("thumbnails of 32 px alone, without a deep network", "accuracy", best),
    ]
    page = report(ReportConfig(run)).read_text()
    table = page.partition("Simple models on thumbnails")[2]
    row = table.partition(">Accuracy</th>")[2].partition("</tr>")[0]
    shown = [[number(score[end]) for end in ("value", "low", "high")] for score in models]
    assert [re.findall(r"\d\.\d{3}", cell) for cell in row.split("</td>")[:2]] == shown
    rows = page.partition('aria-label="Shortcuts"')[2].partition("</table>")[0].split("</tr>")
    marked = {"0.570": True, "0.540": False}
    for value, is_marked in marked.items():
        (row,) = (row for row in rows if f"<td>{value}</td>" in row)
        assert (">shortcut</span>" in row) is is_marked


def test_an_audit_of_an_older_version_has_no_baseline(run: Path) -> None:
    """It opens, and the first line has nothing to compare with."""
    path = run / "audit.json"
    found = json.loads(path.read_text())
    del found["baseline"], found["shortcut"]["accuracy"], found["shortcut"]["mean_auroc"]
    path.write_text(json.dumps(found))
    view = audit_view(path)
    assert (view.content.get("baseline"), view.trivial) == (None, [])
    page = report(ReportConfig(run)).read_text()
    assert "What thumbnails alone tell" not in page
    assert page.count("with an AUROC of") == 1
    path.write_text(json.dumps(found | {"classes": [*found["classes"], "another"]}))
    with pytest.raises(CxrdistError, match=r"audit.json: .*: lacks the class 'another'; run"):
        audit_view(path)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("sources", "association"), "NORMAL"),
        (("views", "own"), "NORMAL"),
        (("sources", "counts", "*"), "all"),
        (("statistics", "*"), "NORMAL"),
        (("shortcut", "auroc"), "NORMAL"),
        (("baseline", "perceptron", "auroc"), "NORMAL"),
        (("in_pre_training", "splits", "*"), "all"),
    ],
)
def test_each_table_of_an_audit_has_each_class(
    run: Path, names: tuple[str, ...], label: str
) -> None:
    """The page looks up each class, and all images where a table counts them, in each table."""
    path = run / "audit.json"
    audit = json.loads(path.read_text())
    table = audit
    for name in names:
        table = next(iter(table.values())) if name == "*" else table[name]
    del table[label]
    path.write_text(json.dumps(audit))
    with pytest.raises(CxrdistError, match=f"lacks the class '{label}'"):
        audit_view(path)
