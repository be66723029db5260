"""What the report shows of patient groups: flagged gaps in words, tables, a chart per class."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.evaluate.groups import Gap, Group, Groups
from cxrdist.evaluate.metrics import Metrics
from cxrdist.report import pictures
from cxrdist.report.values import interval, number
from cxrdist.report.view import View

MEASURES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "recall": "Sensitivity",
    "specificity": "Specificity",
    "recall_at_point": "Sensitivity at the operating point",
    "specificity_at_point": "Specificity at the operating point",
}
CHARTED = ("auroc", "recall", "specificity")
_SEXES = {"F": "female patients", "M": "male patients"}
Columns = dict[str, dict[str, Group]]
Cell = tuple[str, str, bool]  # figure, interval, has too few patients


def groups_view(element: str, metrics: Metrics) -> View | None:
    """Gather the values for the groups of a split; None for metrics of older versions.

    The ids of the charts begin with `element`.
    """
    groups = metrics.get("groups")
    if groups is None:
        return None
    columns = groups["columns"]
    return {
        "columns": list(columns),
        "comparisons": groups["comparisons"],
        "fewest": groups["fewest"],
        "flagged": flagged_gaps(groups),
        "gaps": [_gap(gap) for gap in groups["gaps"]],
        "overall": _overall(columns) if metrics["task"] == "multiclass" else [],
        "classes": [
            _class(f"{element}-groups{i}", name, columns)
            for i, name in enumerate(metrics["classes"] if columns else [])
        ],
    }


def flagged_gaps(groups: Groups) -> list[str]:
    """Describe each difference between groups that is larger than chance, the largest first."""
    return [_sentence(gap, groups) for gap in groups["gaps"] if gap["flagged"]]


def _sentence(gap: Gap, all_groups: Groups) -> str:
    groups = all_groups["columns"][gap["column"]]
    sides = []
    for side in ("lower", "higher"):
        group = groups[gap[side]]
        scores: Mapping[str, Any] = (
            group if gap["label"] is None else group["classes"][gap["label"]]
        )
        figure = _within(scores[gap["measure"]], scores[f"{gap['measure']}_interval"])
        sides.append(f"{figure} in {group_name(gap['column'], gap[side])}")
    what = MEASURES[gap["measure"]] + (f" of {gap['label']}" if gap["label"] is not None else "")
    difference = _within(gap["difference"], gap["interval"])
    return (
        f"{what} is {sides[0]}, {sides[1]}; difference {difference}, corrected for "
        f"{all_groups['comparisons']:,} comparisons of groups."
    )


def group_name(column: str, group: str) -> str:
    """Return the name of a group for use in a sentence."""
    if column == "sex":
        return _SEXES.get(group, f"patients of sex {group}")
    if column == "age":
        return f"patients of {group} years"
    return f"images of {column} {group}"


def _within(value: float, limits: Sequence[float] | None) -> str:
    return f"{number(value)} ({interval(limits)})" if limits else number(value)


def _gap(gap: Gap) -> View:
    """Write a row of the table of gaps."""
    return {
        **gap,
        "label": "all" if gap["label"] is None else gap["label"],
        "measure": MEASURES[gap["measure"]],
        "difference": number(gap["difference"]),
        "interval": interval(gap["interval"]),
    }


def _overall(columns: Columns) -> list[tuple[str, str, int, int, Cell | None]]:
    """Return a row for each group: column, group, images, patients, accuracy."""
    return [
        (column, name, group["images"], group["patients"], _cell(group, "accuracy"))
        for column, groups in columns.items()
        for name, group in groups.items()
    ]


def _class(element: str, name: str, columns: Columns) -> View:
    """Write the rows and the chart of one class."""
    members = [
        (column, group_of, group["classes"][name], group["patients"])
        for column, groups in columns.items()
        for group_of, group in groups.items()
    ]
    measures = [measure for measure in MEASURES if measure in members[0][2]]
    rows = [
        (
            f"{column}: {group_of}",
            patients,
            scores["positives"],
            scores["known"],
            [_cell(scores, measure) for measure in measures],
        )
        for column, group_of, scores, patients in members
    ]
    chart = pictures.forest_chart(
        element,
        [row[0] for row in rows],
        {MEASURES[m]: [_point(scores, m) for _, _, scores, _ in members] for m in CHARTED},
    )
    return {
        "name": name,
        "measures": [MEASURES[measure] for measure in measures],
        "rows": rows,
        "chart": chart,
    }


def _cell(scores: Mapping[str, Any], measure: str) -> Cell | None:
    """Return the table cell of a figure; None where undefined."""
    value, limits = scores[measure], scores[f"{measure}_interval"]
    if value is None or limits is None:
        return None
    return number(value), interval(limits), measure in scores["too_few"]


def _point(scores: Mapping[str, Any], measure: str) -> tuple[float, float, float] | None:
    """Return a figure and its limits for the chart; None if undefined or with too few patients."""
    value, limits = scores[measure], scores[f"{measure}_interval"]
    if value is None or limits is None or measure in scores["too_few"]:
        return None
    return value, limits[0], limits[1]
