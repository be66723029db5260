"""What the report shows of operating points, calibration and decision curves."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from cxrdist.evaluate.calibration import CalibrationFigures
from cxrdist.evaluate.decision_curve import ClassCurve, DecisionCurve
from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.operating_points import OperatingPoints
from cxrdist.report import pictures
from cxrdist.report.values import cell
from cxrdist.report.view import View

RATES = {
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
}
RULES = {
    "youden": "the largest sensitivity + specificity (Youden)",
    "sensitivity": "a sensitivity of at least {least}, and then the best specificity",
    "specificity": "a specificity of at least {least}, and then the best sensitivity",
}
ERRORS = {"calibration_error": "Calibration error", "brier": "Brier score"}


def calibration_view(element: str, metrics: Metrics) -> View:
    """Gather the values for thresholds and probabilities; None for what was not measured.

    Older versions measured none of this. The ids of the charts begin with `element`.
    """
    points, errors = metrics.get("operating_points"), metrics.get("calibration")
    curves = metrics.get("decision_curve")
    return {
        "rates": RATES,
        "errors": ERRORS,
        "points": _points(points) if points else None,
        "calibration": _calibration(element, errors) if errors else None,
        "curves": _curves(element, curves) if curves else None,
    }


def _points(figures: OperatingPoints) -> View:
    """Write the rows of the table: class, probability, counts, rates with intervals."""
    rows, few = [], []
    for name, point in figures["classes"].items():
        having = point["true_positives"] + point["false_negatives"]
        lacking = point["false_positives"] + point["true_negatives"]
        counts = (point["true_positives"], having), (point["true_negatives"], lacking)
        rows.append((name, point, counts, [cell(point, rate, "percent") for rate in RATES]))
        if min(having, lacking) < figures["chosen_on"]["fewest"]:
            few.append(f"{name}: {having} images with it, {lacking} without")
    elsewhere = [
        (name, [cell(point["at_prevalence"], rate, "percent") for rate in ("ppv", "npv")])
        for name, point in figures["classes"].items()
        if "at_prevalence" in point
    ]
    rule, _, least = figures["rule"].partition("=")
    described = RULES.get(rule, figures["rule"]).format(least=least)
    return {**figures, "described": described, "rows": rows, "few": few, "elsewhere": elsewhere}


def _calibration(element: str, figures: CalibrationFigures) -> View:
    """Write the rows of the table (name, values, cells) and a chart per class."""
    rows, charts = [], []
    for i, (name, values) in enumerate(figures["classes"].items()):
        rows.append((name, values, _cells(values["before"], values["after"])))
        bins = values["bins"]
        chart = pictures.reliability_chart(
            f"{element}-reliability{i}",
            bins["positives"],
            bins["positives_interval"],
            bins["probability"],
            bins["calibrated"],
        )
        charts.append((name, values, chart))
    mean = figures["mean_before"]
    cells = _cells(mean, figures["mean_after"]) if mean else None
    return {**figures, "rows": rows, "mean": mean, "mean_cells": cells, "charts": charts}


def _cells(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [cell(values, name) for name in ERRORS for values in (before, after)]


def _curves(element: str, figures: DecisionCurve) -> list[tuple[str, ClassCurve, Markup]]:
    """Draw a chart per class; return it with the name and the curve."""
    charts = []
    for i, (name, curve) in enumerate(figures["classes"].items()):
        chart = pictures.decision_chart(
            f"{element}-decision{i}",
            figures["thresholds"],
            curve["net_benefit"],
            curve["net_benefit_interval"],
            curve["treat_all"],
        )
        charts.append((name, curve, chart))
    return charts
