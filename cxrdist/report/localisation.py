"""The view of localisation for the report: heat maps against human boxes and masks."""

from collections.abc import Sequence

from cxrdist.explain.localisation import ALL, FEWEST_CASES, Group, Localisation, Pictured
from cxrdist.files import read_document
from cxrdist.report import pictures
from cxrdist.report.files import reading, within
from cxrdist.report.values import DASH, count, number, percent, signed
from cxrdist.report.view import View
from cxrdist.run import RunDirectory

NAMES = {
    "lrp": "LRP, the class",
    "contrast": "LRP, the class against the likeliest other",
    "grad_cam": "Grad-CAM",
    "gradient": "Plain gradient",
    "mean_outline": "Mean outline of the training images",
    "centre": "Centre prior: a Gaussian in the middle",
    "chance": "Chance",
}


def localisation_views(run: RunDirectory) -> list[View]:
    """Gather the values for each scored subset, sorted by name.

    Raises:
        CxrdistError: a file is not what `cxrdist localise` writes.
    """
    patterns = ("*/localisation.json", "external/*/localisation.json")
    files = [file for pattern in patterns for file in run.root.glob(pattern)]
    subsets = sorted(file.parent.relative_to(run.root).as_posix() for file in files)
    return [_view(run, subset) for subset in subsets]


def _view(run: RunDirectory, subset: str) -> View:
    path = run.localisation(subset)
    with reading(path, "localise"):
        content = read_document(path, Localisation, "run `cxrdist localise` again")
        if not content["groups"] or content["groups"][0]["name"] != ALL:
            raise ValueError(f"the first group is not {ALL!r}")
        return {
            "subset": subset.replace("external/", "external set "),
            "index_sha256": content["index_sha256"],
            "kind": content["kind"],
            "origin": content["origin"],
            "left_out": [(count(value), why) for why, value in content["left_out"].items()],
            "val_cases": content["val_cases"],
            "train_cases": content["train_cases"],
            "fewest": FEWEST_CASES,
            "groups": [_group(group) for group in content["groups"]],
            "unit": content["intervals"]["unit"],
            "pictures": [_picture(run, subset, item) for item in content["pictures"]],
        }


def _group(group: Group) -> View:
    """Gather the values of a group, with a row per kind of map."""
    return {
        "name": "All" if group["name"] == ALL else group["name"],
        "images": count(group["images"]),
        "patients": count(group["patients"]),
        "cases": count(group["cases"]),
        "shapes": count(group["shapes"]),
        "area": percent(group["area"]),
        "rows": [
            {
                "name": NAMES[row["method"]],
                "pointing": _interval(row["pointing"], row["pointing_interval"]),
                "inside": _interval(row["inside"], row["inside_interval"]),
                "times_chance": _interval(row["times_chance"], row["times_chance_interval"]),
                "gain": _limits(row["times_chance_gain_interval"]),
                "overlap": _interval(row["overlap"], row["overlap_interval"]),
                "marked": percent(row["marked"]),
                "blank": count(row["blank"]),
            }
            for row in group["methods"]
        ],
    }


def _interval(value: float, limits: Sequence[float]) -> str:
    return f"{number(value)} ({number(limits[0])} to {number(limits[1])})"


def _limits(limits: Sequence[float] | None) -> str:
    return DASH if limits is None else f"{signed(limits[0])} to {signed(limits[1])}"


def _picture(run: RunDirectory, subset: str, item: Pictured) -> View:
    directory = run.localisation_pictures(subset)
    contrast = item["contrast"]
    return {
        **item,
        "inside": percent(item["inside"]),
        "area": percent(item["area"]),
        "xray": pictures.embed(within(directory, item["xray"])),
        "lrp": pictures.embed(within(directory, item["lrp"])),
        "contrast": None if contrast is None else pictures.embed(within(directory, contrast)),
    }
