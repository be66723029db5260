"""The members of an ensemble: how much figures vary with the seed or the fold of the training."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy as np

from cxrdist.documents import Between, Real, Text
from cxrdist.evaluate.metrics import Metrics, headline_means
from cxrdist.evaluate.scored import MEND
from cxrdist.files import read_document
from cxrdist.model.description import MOST_MEMBERS, Member
from cxrdist.run import RunDirectory
from cxrdist.terminal import rounded, table

Figure = Literal[
    "accuracy", "auroc", "average_precision", "recall", "specificity", "precision", "f1"
]
FIGURES: dict[str, str] = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "recall": "Sensitivity",
    "specificity": "Specificity",
    "precision": "Precision",
    "f1": "F1 score",
}


class Spread(TypedDict):
    """One figure over the members; None where it is undefined for any of them."""

    figure: Figure
    of: Text | None
    """The class; None for the mean of the classes, and for the accuracy."""
    members: dict[str, Real | None]
    mean: Real | None
    standard_deviation: Real | None
    """Standard deviation over the members, with n - 1."""
    smallest: Real | None
    largest: Real | None
    ensemble: Real | None


class MembersFile(TypedDict):
    """The content of members.json."""

    format: Literal["cxrdist-members-1"]
    kind: Literal["seeds", "folds"]
    members: Annotated[list[Member], Between(2, MOST_MEMBERS)]
    splits: dict[str, list[Spread]]
    """By split: test; for folds also val, which has other images for each member."""


def read_members(run: RunDirectory) -> MembersFile | None:
    """Read members.json; return None if the run is not an ensemble.

    Raises:
        CxrdistError: it is damaged, or names an unknown figure.
    """
    if not run.members.is_file():
        return None
    return read_document(run.members, MembersFile, "run `cxrdist seeds` again")


def spreads(run: RunDirectory, names: list[str], split: str) -> list[Spread]:
    """Return the spread of each figure of metrics.json over the members."""
    rows = {name: _figures(RunDirectory(run.inside(name)).metrics(split)) for name in names}
    of_ensemble = _figures(run.metrics(split)) if run.metrics(split).is_file() else {}
    return [
        _spread(key, {name: figures.get(key) for name, figures in rows.items()}, of_ensemble)
        for key in rows[names[0]]
    ]


Key = tuple[Figure, str | None]


def _figures(file: Path) -> dict[Key, float | None]:
    """Read the figures of a metrics.json, by name and class."""
    metrics = read_document(file, Metrics, MEND)
    # The accuracy is at the top level of metrics.json, the other figures in the means.
    tables: dict[str | None, Any] = {None: {**metrics, **headline_means(metrics)}}
    tables.update(metrics["classes"])
    return {
        (figure, of): values[figure]
        for of, values in tables.items()
        for figure in get_args(Figure)
        if figure in values
    }


def _spread(key: Key, values: dict[str, float | None], of_ensemble: dict[Key, Any]) -> Spread:
    known = [value for value in values.values() if value is not None]
    if len(known) < len(values):  # a mean of some members would pass for that of all
        known = []
    return {
        "figure": key[0],
        "of": key[1],
        "members": values,
        "mean": round(float(np.mean(known)), 6) if known else None,
        "standard_deviation": round(float(np.std(known, ddof=1)), 6) if len(known) > 1 else None,
        "smallest": min(known, default=None),
        "largest": max(known, default=None),
        "ensemble": of_ensemble.get(key),
    }


def spread_table(spreads: list[Spread]) -> str:
    """Format the spread of figures for the terminal."""
    columns = ("mean", "standard_deviation", "smallest", "largest", "ensemble")
    rows = []
    for spread in spreads:
        cells = [rounded(spread[name]) for name in columns]  # type: ignore[literal-required]
        rows.append([FIGURES[spread["figure"]], *cells])
    return table(rows, ("Figure", "Mean", "Standard deviation", "Smallest", "Largest", "Ensemble"))
