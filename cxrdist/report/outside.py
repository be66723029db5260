"""What the report shows of relevance outside the body, and its lines in the verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from cxrdist.explain.description import OutsideInfo, OutsideRow, RegionInfo
from cxrdist.explain.pictures import safe_name
from cxrdist.explain.text_file import TextRelevance
from cxrdist.report import pictures
from cxrdist.report.text import TextView
from cxrdist.report.values import counted, interval, percent
from cxrdist.report.view import SplitView, View
from cxrdist.run import RunDirectory

REGIONS = {
    "border": "Border (outer tenth)",
    "corners": "Corners",
    "beside_lungs": "Beside the lungs",
}
PLACES = {
    "border": "in the outer tenth of the images",
    "corners": "in their corners",
    "beside_lungs": "beside the lungs",
    "text": "in burned-in text",
}


def outside_view(run: RunDirectory, split: str, info: OutsideInfo | None) -> View | None:
    """Gather the shares of relevance and the mean map of each class; None if not measured.

    Raises:
        CxrdistError: a mean map is not a valid picture.
    """
    if info is None or not info["all"]["images"]:
        return None
    named: list[tuple[str, OutsideRow]] = [*info["classes"].items(), ("All images", info["all"])]
    return {
        "all": info["all"],
        "maps": [(name, row, _mean_map(run, split, name)) for name, row in info["classes"].items()],
        "rows": [
            (name, REGIONS[region], row["regions"][region])
            for name, row in named
            for region in REGIONS
            if region in row["regions"]
        ],
    }


def _mean_map(run: RunDirectory, split: str, name: str) -> pictures.Picture | None:
    """Return the mean map of a class; None if no pictures were written."""
    path = run.mean_maps(split) / f"{safe_name(name)}.png"
    return pictures.embed(path) if path.is_file() else None


def outside_lines(split: SplitView, texts: Sequence[TextView]) -> list[str]:
    """Describe the regions whose share of relevance is significantly above their share of area."""
    info = split["tests"]["outside"] if split["tests"] else None
    regions: dict[str, RegionInfo | TextRelevance] = {}
    if info and info["all"]["images"]:
        regions |= info["all"]["regions"]
    for text in texts:
        if text.subset == split["subset"] and text.region:
            regions["text"] = text.region
    return [
        _line(name, regions[name])
        for name in PLACES
        if name in regions and regions[name]["share_interval"][0] > (regions[name]["area"] or 0)
    ]


def _line(name: str, region: Mapping[str, Any]) -> str:
    peaks = region.get("peaks")
    largest = f", and the largest one in {percent(peaks)} of the images" if peaks else ""
    within = interval(region["share_interval"], "percent")
    return (
        f"The network looks outside the lungs: {percent(region['share'])} of the relevance lies "
        f"{PLACES[name]} (95 % interval {within}){largest}. By chance it would be "
        f"{percent(region['area'])}, the share of the area "
        f"({counted(region['images'], 'explained image')} of "
        f"{counted(region['patients'], 'patient')})."
    )
