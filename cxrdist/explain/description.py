"""relevance.json: the settings of the relevance, where it lies, and the results of its tests."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from cxrdist.bootstrap import Limits
from cxrdist.config import DENSENETS
from cxrdist.documents import Between, Correlation, Real, Share
from cxrdist.files import read_document
from cxrdist.info import Count
from cxrdist.intervals import Intervals

Curve = Annotated[list[Real], Between(2, 1000)]
WITH_RULES = (*DENSENETS, "resnet18", "alexnet", "squeezenet1_1")
"""Architectures whose relevance has proven rules (canonical.py)."""


class FlippingInfo(TypedDict):
    """Pixel flipping of several images."""

    images: Count
    covered_share: Real
    relevant_first: Curve
    """Mean curve, from 1."""
    random_order: Curve
    area_over_relevant_first: Real
    area_over_random_order: Real


class Similarity(TypedDict):
    """Similarity of the maps of two networks, means over images; None if all maps are constant."""

    spearman: Correlation | None
    """Rank correlation of the absolute relevance of the pixels."""
    pearson: Correlation | None
    """Correlation of the relevance of the pixels, with its sign."""


class Drawn(TypedDict):
    """Comparison of the maps of a network with those after some blocks were randomised."""

    blocks: list[str]
    class_map: Similarity
    """Of the likeliest class."""
    contrast: Similarity | None
    """Of the likeliest class minus the second likeliest; None if only one class is explained."""


class RandomisationInfo(TypedDict):
    """The randomisation test on several images, starting from the head."""

    images: Count
    drawn: list[Drawn]


class RegionInfo(TypedDict):
    """The share of the relevance in a region, mean over images."""

    images: Count
    patients: Count
    area: Share
    """The region's share of the area, the share expected by chance."""
    share: Share
    """Of the absolute relevance."""
    share_interval: Limits
    peaks: Share
    """Share of the images whose largest absolute relevance, smoothed, lies there."""
    peaks_interval: Limits


class OutsideRow(TypedDict):
    """Where the relevance of some images lies."""

    images: Count
    patients: Count
    regions: dict[str, RegionInfo]
    """border, corners, and beside_lungs where images have masks."""


class ClassRow(OutsideRow):
    """Where the relevance lies for images whose likeliest explained class is this one."""

    alike: Share
    """Share of the images whose largest relevance is at most a tenth of the side away from that of
    the mean map."""
    alike_interval: Limits
    alike_area: Share
    """Share of the area within this distance, the share expected by chance."""


class OutsideInfo(TypedDict):
    """Where the relevance for the likeliest explained class of each image lies."""

    all: OutsideRow
    classes: dict[str, ClassRow]
    """Classes that are the likeliest one of at least one image."""
    intervals: Intervals


class Rules(TypedDict):
    """Settings of the relevance that the report shows; explain adds more to detect changes."""

    preset: str
    composite: str | None
    flat: bool
    biases: bool


class RelevanceInfo(TypedDict):
    """The content of relevance.json.

    Results are None until explain is finished; older versions have only pixel flipping.
    """

    format: Literal["cxrdist-relevance-1"]
    how: Rules
    ledger_residual: Real | None
    """Largest |logit - sum of its shares|, relative to the largest |logit|; None for rules without
    a ledger."""
    pixel_flipping: FlippingInfo | None
    randomisation: RandomisationInfo | None
    outside: OutsideInfo | None


class _OlderTests(TypedDict):
    ledger_residual: Real | None
    pixel_flipping: FlippingInfo


class _Older(TypedDict):
    """relevance.json before it had a format, when pixel flipping was called a sanity check."""

    how: Rules
    sanity: _OlderTests | None


class _Versioned(TypedDict):
    format: NotRequired[str]


def under_way(how: Any) -> RelevanceInfo:
    """Return the content of relevance.json before explain is finished."""
    return {
        "format": "cxrdist-relevance-1",
        "how": how,
        "ledger_residual": None,
        "pixel_flipping": None,
        "randomisation": None,
        "outside": None,
    }


def read_description(path: Path, mend: str) -> RelevanceInfo:
    """Read relevance.json, also of an older version.

    Raises:
        CxrdistError: it is damaged; `mend` is what the user can do about it.
    """
    if "format" in read_document(path, _Versioned, mend):
        return read_document(path, RelevanceInfo, mend)
    older = read_document(path, _Older, mend)
    info = under_way(older["how"])
    if older["sanity"] is not None:
        info["ledger_residual"] = older["sanity"]["ledger_residual"]
        info["pixel_flipping"] = older["sanity"]["pixel_flipping"]
    return info
