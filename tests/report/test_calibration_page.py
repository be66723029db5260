"""Operating points, calibration and decision curves in the page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import choose_calibration
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.operating_points import read_rule
from cxrdist.evaluate.scored import read_scored
from cxrdist.report import pictures
from cxrdist.report.html import report
from cxrdist.report.page import template


class Tables(HTMLParser):
    """The cells of the tables of a page, by their label: rows of texts."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.label = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "div":
            self.label = dict(attrs).get("aria-label") or ""
        elif tag == "table":
            self.tables[self.label] = []
        elif tag == "tr" and self.label in self.tables:
            self.tables[self.label].append([])
        elif tag in ("td", "th") and self.tables.get(self.label):
            self.tables[self.label][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self.label = ""

    def handle_data(self, data: str) -> None:
        rows = self.tables.get(self.label)
        if rows and rows[-1]:
            rows[-1][-1] = " ".join(f"{rows[-1][-1]} {data}".split())


@pytest.fixture
def calibrated(run: Path) -> dict[str, Any]:
    """Measure the run with thresholds and temperatures; its metrics.json is written anew."""
    scored = read_scored(run / "test" / "predictions.csv", "multiclass")
    calibration = choose_calibration(scored, read_rule("sensitivity=0.9"), 10, "ab" * 32)
    metrics = measure(scored, Settings(10, 0.02, calibration, replicates=50))
    (run / "test" / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def test_the_page_shows_what_metrics_json_holds(run: Path, calibrated: dict, made: Any) -> None:
    """Each rate and error with its interval, the images that they are of, and how it was chosen."""
    page = report(ReportConfig(run=run)).read_text(encoding="utf-8")
    tables = Tables(page).tables
    rows = {row[0]: row for row in tables["Operating points on test"][1:]}
    assert [*rows] == made.CLASSES
    for name, point in calibrated["operating_points"]["classes"].items():
        row = rows[name]
        assert row[5] == f"{point['probability']:.3f}"
        having = point["true_positives"] + point["false_negatives"]
        assert row[6] == f"{point['true_positives']} of {having}"
        for cell, rate in zip(row[1:5], ("sensitivity", "specificity", "ppv", "npv"), strict=True):
            low, high = point[f"{rate}_interval"]
            assert cell == f"{point[rate]:.1%} {low:.1%} to {high:.1%}".replace("%", " %")
    rows = {row[0]: row for row in tables["Predictive values at another prevalence, test"][1:]}
    for name, point in calibrated["operating_points"]["classes"].items():
        for cell, rate in zip(rows.pop(name)[1:], ("ppv", "npv"), strict=True):
            low, high = point["at_prevalence"][f"{rate}_interval"]
            expected = f"{point['at_prevalence'][rate]:.1%} {low:.1%} to {high:.1%}"
            assert cell == expected.replace("%", " %")
    assert not rows
    rows = {row[0]: row for row in tables["Calibration on test"][1:]}
    for name, values in calibrated["calibration"]["classes"].items():
        low, high = values["after"]["calibration_error_interval"]
        shown = f"{values['after']['calibration_error']:.3f} {low:.3f} to {high:.3f}"
        assert rows[name][1:3] == ["60 of 180", f"{values['temperature']:.3f}"]
        assert rows[name][5] == shown
    words = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "a sensitivity of at least 0.9, and then the best specificity" in words
    assert "(180 images of 60 patients; sha256 of the index abababababab )" in words
    assert "Too few to say" not in words
    for kind in ("reliability", "decision"):
        assert len(set(re.findall(rf'id="split0-{kind}(\d)-figure_1"', page))) == 3


def test_classes_with_too_few_images_are_named(run: Path, calibrated: dict) -> None:
    """Where fewer than were asked for have a class or lack it."""
    calibrated["operating_points"]["chosen_on"]["fewest"] = 61
    (run / "test" / "metrics.json").write_text(json.dumps(calibrated))
    page = report(ReportConfig(run=run)).read_text(encoding="utf-8")
    words = " ".join(page.split())
    assert "Too few to say (at least 61 of each are needed): NORMAL: 60 images with it" in words


def test_without_a_threshold_or_a_temperature_no_table_of_them_is_begun(
    run: Path, calibrated: dict
) -> None:
    """Too few images of val: sentences in place of an empty table and of temperatures."""
    calibrated["operating_points"]["classes"] = {}
    for values in calibrated["calibration"]["classes"].values():
        values["temperature"] = values["after"] = None
    calibrated["calibration"]["mean_after"] = None
    (run / "test" / "metrics.json").write_text(json.dumps(calibrated))
    words = " ".join(report(ReportConfig(run=run)).read_text(encoding="utf-8").split())
    assert "No class has a threshold that could be chosen on the validation split (180" in words
    assert "The model has no temperatures: none could be fitted on the validation split" in words
    assert "PPV (precision)" not in words
    assert "A temperature of each class was fitted" not in words


def test_metrics_of_an_older_version_have_no_such_section(run: Path) -> None:
    """The page is there without it."""
    page = report(ReportConfig(run=run)).read_text(encoding="utf-8")
    assert "Operating points" not in page
    assert "Reliability" not in page


def test_mistakes_name_the_threshold_of_a_label_for_which_val_chose_none() -> None:
    """It is called from 0.5 on, and the caption does not say that val chose this as well."""
    view: dict[str, Any] = dict.fromkeys(("num", "num_images", "num_patients", "num_left"), 1)
    view |= dict.fromkeys(("cards", "listed", "filters"), ()) | {"megabytes": 0, "several": True}
    view["is_run"] = False
    view["labels"] = [{"name": "a", "threshold": 0.5, "missed": (1, 1), "called": (0, 3)}]
    split = {"element": "split0", "name": "test", "subset": "test"}
    for rule in ("youden", None):
        content = {"splits": [{**split, "mistakes": {**view, "rule": rule}}]}
        words = " ".join(template("mistakes.html.jinja").render(content).split())
        text = "Thresholds chosen on the validation split (youden), and 0.5 for a label without one"
        assert (text in words) == (rule is not None)
        assert "not tuned" in words


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("calibration", lambda part: part["classes"]["NORMAL"]["bins"]["positives"].pop()),
        ("calibration", lambda part: part["classes"]["NORMAL"]["bins"].update(positives=[])),
        ("calibration", lambda part: part["classes"]["NORMAL"]["before"].update(brier=2)),
        ("decision_curve", lambda part: part["thresholds"].pop()),
        ("decision_curve", lambda part: part["classes"]["NORMAL"]["treat_all"].pop()),
        ("operating_points", lambda part: part["classes"]["NORMAL"].update(ppv_interval=[0.1])),
        ("operating_points", lambda part: part["classes"]["NORMAL"].pop("npv")),
    ],
)
def test_a_damaged_part_is_one_line(run: Path, calibrated: dict, part: str, change: Any) -> None:
    """Lists of different lengths, and what is missing or out of bounds."""
    change(calibrated[part])
    (run / "test" / "metrics.json").write_text(json.dumps(calibrated))
    with pytest.raises(CxrdistError, match=r"test/metrics\.json: .*run `cxrdist evaluate` again"):
        report(ReportConfig(run=run))


def test_bins_of_a_class_without_a_temperature_stand_at_the_networks_means() -> None:
    """The marks of 0.2 and 0.8 are above the ticks 0.2 and 0.8 of the axis, that of 0.5 between."""
    shares, limits = [0.0, 0.5, 1.0], [None, [0.4, 0.6], None]
    chart = pictures.reliability_chart("x", shares, limits, [0.2, 0.5, 0.8], None)
    across = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', chart)]
    ticks, marks = across[:6], across[-4:-1]
    assert marks == pytest.approx([ticks[1], (ticks[2] + ticks[3]) / 2, ticks[4]], abs=1e-3)
