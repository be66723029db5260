"""What templates show."""

from typing import TypeAlias, TypedDict

from markupsafe import Markup

from cxrdist.evaluate.metrics import Metrics
from cxrdist.explain.description import RelevanceInfo
from cxrdist.report.files import Sample

View: TypeAlias = dict[str, object]
"""Values by name that a template alone reads; what Python code reads as well has a class."""


class SplitView(TypedDict):
    """All that is shown of one split or external set; what was not made is None."""

    name: str
    """For people."""
    place: str
    """In the run directory."""
    options: str
    """Of the commands that make what is missing."""
    element: str
    """Begins the ids of its elements in the page; unique."""
    metrics: Metrics | None
    scores: View | None
    calibration: View | None
    samples: list[Sample] | None
    roc: list[tuple[str, int, Markup | None]] | None
    mistakes: View | None
    groups: View | None
    explained: bool
    ledger: list[View]
    tests: RelevanceInfo | None
    flipping_chart: Markup | None
    outside: View | None
    gallery: list[tuple[str | None, list[object]]]
    """Cards by class."""


class Verdict(TypedDict, total=False):
    """The figure of a split, its interval, and what both rest on, as text."""

    several: bool
    few: dict[str, str]
    """Classes of too few images, and how many there are."""
    too_few: str
    value: str
    interval: list[str] | None
    labels: str
    """That have a figure, where images have several."""
    all_labels: str
    split: str
    images: str
    patients: str | None
