"""What the report shows of localisation: heat maps against human boxes and masks."""

from cxrdist.explain.localisation import ALL, FEWEST_CASES, Group, Localisation, Pictured
from cxrdist.files import read_document
from cxrdist.report import pictures
from cxrdist.report.files import reading, subsets_with, within
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
    return [_view(run, subset) for subset in subsets_with(run.root, "localisation.json")]


def _view(run: RunDirectory, subset: str) -> View:
    path = run.localisation(subset)
    with reading(path, "localise"):
        content = read_document(path, Localisation, "run `cxrdist localise` again")
        if not content["groups"] or content["groups"][0]["name"] != ALL:
            raise ValueError(f"the first group is not {ALL!r}")
        return {
            **content,
            "subset": subset.replace("external/", "external set "),
            "fewest": FEWEST_CASES,
            "groups": [_group(group) for group in content["groups"]],
            "pictures": [_picture(run, subset, item) for item in content["pictures"]],
        }


def _group(group: Group) -> View:
    """Gather the values of a group, with a row per kind of map."""
    return {
        **group,
        "name": "All" if group["name"] == ALL else group["name"],
        "rows": [{**row, "name": NAMES[row["method"]]} for row in group["methods"]],
    }


def _picture(run: RunDirectory, subset: str, item: Pictured) -> View:
    directory = run.localisation_pictures(subset)
    contrast = item["contrast"]
    return {
        **item,
        "xray": pictures.embed(within(directory, item["xray"])),
        "lrp": pictures.embed(within(directory, item["lrp"])),
        "contrast": None if contrast is None else pictures.embed(within(directory, contrast)),
    }
