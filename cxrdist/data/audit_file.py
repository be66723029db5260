"""The format of audit.json, which the audit writes and the report reads."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from cxrdist.data.masks import MasksEntry
from cxrdist.documents import Between, Correlation, Matching, Real, Share
from cxrdist.files import judging, read_document
from cxrdist.info import Count, Task

# 32 KiB; the audit's own thumbnails have 3 kB.
Thumbnail = Annotated[
    str, Matching(r"[A-Za-z0-9+/]{1,43690}={0,2}", "a JPEG of at most 32 KiB in base64")
]
COUNTED = ("counts", "in_pre_training")  # tables with a column of all images
FlatKind = Literal["constant", "nearly black", "nearly white"]
# Written as a call, because the keys have blanks: names in a class statement cannot.
MaskCounts = TypedDict("MaskCounts", {"with a mask": Count, "without a mask": Count})


class ShownImage(TypedDict):
    """An image in a list of the audit."""

    key: str
    path: str
    split: str
    label: str
    patient: str


class FlatImage(ShownImage):
    """An image that is constant, nearly black or nearly white."""

    kind: FlatKind


class Pair(TypedDict):
    """Two images that are the same, or of which one is an altered copy of the other."""

    kind: Literal["exact", "near"]
    bits: Count
    """Bits in which their perceptual hashes differ, of 256."""
    correlation: Correlation
    """Correlation of their fine structure."""
    two_splits: bool
    two_classes: bool
    images: Annotated[list[ShownImage], Between(2, 2)]


class Pairs(TypedDict):
    """All pairs, and how many there are of each kind; those in two splits or classes come first."""

    exact: Count
    near: Count
    in_two_splits: Count
    in_two_classes: Count
    pairs: list[Pair]


class SharedPatient(TypedDict):
    """A patient with images in several splits or classes, and how many there are in each."""

    patient: str
    images: dict[str, Count]


class Origins(TypedDict):
    """How closely the classes are related to the origin (source, view or mask) of their images."""

    counts: dict[str, dict[str, Count]]
    """Images per class, and ``all``, by origin."""
    association: dict[str, Share | None]
    """Cramér's V of each class against the others; None if there is nothing to compare."""
    own: dict[str, Share]
    """The share of each class's images whose origin no image of another class has."""


class MaskOrigins(MasksEntry, Origins):
    """Masks of the images, and how well having one predicts the class."""

    splits: dict[str, MaskCounts]


class Moments(TypedDict):
    """Mean and standard deviation."""

    mean: Real
    spread: Real


class Estimate(TypedDict):
    """A score and the limits of its 95 % interval over patients."""

    value: Share
    low: Share
    high: Share


class Judgement(TypedDict):
    """How well a model separates the classes; None if classes have too few patients."""

    accuracy: Estimate | None
    auroc: dict[str, Estimate | None]
    """AUROC per class; chance is 0.5."""
    mean_auroc: Estimate | None


class Shortcut(TypedDict):
    """How well size, border and brightness separate the classes, as in `Judgement`.

    Old versions lack means.
    """

    features: list[str]
    folds: Count
    accuracy: NotRequired[Estimate | None]
    auroc: dict[str, Estimate | None]
    mean_auroc: NotRequired[Estimate | None]


class Baseline(TypedDict):
    """How well simple models separate the classes on thumbnails."""

    size_px: Count
    folds: Count
    images: Count
    """Images that the models were trained and tested on."""
    of_images: Count
    patients: Count
    largest_class: Share
    """Share of the images in the largest class."""
    logistic_regression: Judgement
    perceptron: Judgement


class PreTraining(TypedDict):
    """Images of the data set that CheXNet was trained on, by split: per class and ``all``."""

    data_set: str
    splits: dict[str, dict[str, Count]]


class AuditFile(TypedDict):
    """The content of audit.json.

    A member that could not be computed is None, with the reason in ``not_made``. Audits of older
    versions lack the members that are not required.
    """

    format: Literal["cxrdist-audit-1"]
    task: Task
    classes: list[str]
    images: Count
    patients: Count
    duplicates: Pairs | None
    patients_in_several_splits: list[SharedPatient]
    patients_in_several_classes: list[SharedPatient]
    sources: Origins | None
    views: Origins | None
    masks: NotRequired[MaskOrigins | None]
    statistics: dict[str, dict[str, Moments | None]] | None
    """By feature and class."""
    shortcut: Shortcut | None
    baseline: NotRequired[Baseline | None]
    flat: NotRequired[list[FlatImage]]
    in_pre_training: PreTraining | None
    thumbnails: dict[str, Thumbnail]
    """JPEGs of the first pairs, by key."""
    not_made: NotRequired[dict[str, str]]
    warnings: list[str]


def read_audit(path: Path) -> AuditFile:
    """Read audit.json.

    Raises:
        CxrdistError: it is damaged, or a table in it lacks a class.
    """
    mend = "run `cxrdist check --audit` again"
    audit = read_document(path, AuditFile, mend)
    with judging(path, mend):
        # No type ties the tables to `classes`, and the report looks up each class in each table.
        for name, columns in _columns(audit):
            needed = [*audit["classes"], *(["all"] if name in COUNTED else [])]
            if lacking := [label for label in needed if label not in columns]:
                raise ValueError(f"{name}: lacks the class {lacking[0]!r:.80}")
    return audit


def _columns(audit: AuditFile) -> Iterator[tuple[str, Collection[str]]]:
    """Yield the name of each table by class, and the classes that each of its rows has."""
    for origins in filter(None, (audit["sources"], audit["views"], audit.get("masks"))):
        yield from (("counts", row) for row in origins["counts"].values())
        yield "association", origins["association"]
        yield "own", origins["own"]
    yield from (("statistics", row) for row in (audit["statistics"] or {}).values())
    if audit["shortcut"]:
        yield "shortcut", audit["shortcut"]["auroc"]
    if baseline := audit.get("baseline"):
        for model in (baseline["logistic_regression"], baseline["perceptron"]):
            yield "baseline", model["auroc"]
    if audit["in_pre_training"]:
        yield from (("in_pre_training", row) for row in audit["in_pre_training"]["splits"].values())
