"""Types of the values that templates show."""

from typing import TypeAlias, TypedDict

from markupsafe import Markup

from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.scored import Prediction
from cxrdist.explain.description import RelevanceInfo

View: TypeAlias = dict[str, object]
"""Values by name that only templates read; values that Python code reads have a class."""


class SplitView(TypedDict):
    """All values for one split or external set; None for what was not made."""

    name: str
    """Name for readers."""
    subset: str
    """train, val, test or external/NAME: the directory in the run."""
    options: str
    """Options of the commands that make missing results."""
    element: str
    """Prefix of the ids of its elements, unique in the page."""
    metrics: Metrics | None
    scores: View | None
    calibration: View | None
    samples: list[Prediction] | None
    roc: list[tuple[str, int, Markup | None]] | None
    mistakes: View | None
    groups: View | None
    explained: bool
    ledger: list[View]
    tests: RelevanceInfo | None
    flipping_chart: Markup | None
    outside: View | None
    gallery: list[tuple[str | None, list[View]]]
    """Cards by class."""


class Verdict(TypedDict, total=False):
    """The main figure of a split, its interval and its basis, as text."""

    several: bool
    few: dict[str, str]
    """Classes with too few images, each with its number."""
    too_few: str
    value: str
    interval: list[str] | None
    labels: str
    """Number of labels that have a figure, if images have several."""
    all_labels: str
    split: str
    images: str
    patients: str | None
