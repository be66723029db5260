"""The audit of the shards as the report shows it."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxrdist.data.audit import FORMAT, MOST_PICTURED, best_model
from cxrdist.report.files import reading
from cxrdist.report.values import count, number, percent
from cxrdist.run import read_document

MOST_PATIENTS = 50
MOST_THUMBNAIL_BYTES = 1 << 15  # pack's have 3 kB
MOST_IN_SIGHT = 10  # pairs that need no click


def audit_view(path: Path) -> dict[str, Any] | None:
    """Gather what the page shows of an audit; None if there was none when the training began.

    A part that the audit could not make is None; ``not_made`` has the reasons.

    Raises:
        CxrdistError: the file is not what the audit writes.
    """
    if not path.is_file():
        return None
    with reading(path, "check --audit"):
        found = read_document(path, dict[str, Any], "run `cxrdist check --audit` again")
        if found["format"] != FORMAT:
            raise ValueError(f"format is {found['format']!r} and not {FORMAT!r}")
        duplicates = found["duplicates"] or {"pairs": []}
        pairs = _pictured(duplicates["pairs"], found["thumbnails"])
        return {
            "images": count(found["images"]),
            "patients": count(found["patients"]),
            "warnings": [str(line) for line in found["warnings"]],
            "classes": [str(name) for name in found["classes"]],
            "not_made": [(name, str(why)) for name, why in found.get("not_made", {}).items()],
            "duplicates": found["duplicates"]
            and {
                name: int(duplicates[name])
                for name in ("exact", "near", "in_two_splits", "in_two_classes")
            },
            "pairs": [pairs[:MOST_IN_SIGHT], pairs[MOST_IN_SIGHT:]],
            "num_unpictured": len(duplicates["pairs"]) - len(pairs),
            "shared": [
                (what, len(found[f"patients_in_several_{what}"]), _patients(found, what))
                for what in ("splits", "classes")
            ],
            "origins": [
                (what, _origin(found[f"{what}s"]))
                for what in ("source", "view", "mask")
                if found.get(f"{what}s")  # audits of older versions know no masks
            ],
            "masks": found.get("masks") and _masks(found["masks"]),
            "statistics": found["statistics"]
            and _statistics(found["statistics"], found["classes"]),
            "shortcut": found["shortcut"] and _shortcut(found["shortcut"], found["classes"]),
            # Audits of older versions know no baseline.
            "baseline": found.get("baseline") and _baseline(found["baseline"], found["classes"]),
            "trivial": _trivial(found),
            "seen": found["in_pre_training"] and _seen(found["in_pre_training"]),
        }


def _pictured(
    pairs: Sequence[Mapping[str, Any]], thumbnails: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The pairs that have pictures, as the page shows them; equal images have one in common."""
    shown = []
    for about in pairs[:MOST_PICTURED]:
        images = [
            {name: str(image[name]) for name in ("key", "path", "split", "label", "patient")}
            for image in about["images"]
        ]
        pictures = [thumbnails[image["key"]] for image in images if image["key"] in thumbnails]
        if not pictures:
            continue
        for code in pictures:
            if len(base64.b64decode(code, validate=True)) > MOST_THUMBNAIL_BYTES:
                raise ValueError(f"a thumbnail has more than {MOST_THUMBNAIL_BYTES} bytes")
        shown.append(
            {
                "exact": about["kind"] == "exact",
                "correlation": number(about["correlation"]),
                "bits": count(about["bits"]),
                "two_splits": bool(about["two_splits"]),
                "two_classes": bool(about["two_classes"]),
                "images": images,
                "pictures": pictures[:1] if about["kind"] == "exact" else pictures,
            }
        )
    return shown


def _patients(found: Mapping[str, Any], what: str) -> list[tuple[str, str]]:
    """The first patients with images in several places: who, and how many where."""
    return [
        (
            str(about["patient"]),
            ", ".join(f"{name} {count(images)}" for name, images in about["images"].items()),
        )
        for about in found[f"patients_in_several_{what}"][:MOST_PATIENTS]
    ]


def _origin(table: Mapping[str, Any]) -> dict[str, Any]:
    """A row for each class: its images by where they come from, and how far both are the same."""
    names = list(table["counts"])
    return {
        "names": names,
        "rows": [
            (
                label,
                [int(table["counts"][name][label]) for name in names],
                float(table["own"][label]),
                number(association),
            )
            for label, association in table["association"].items()
        ],
        "all": [int(table["counts"][name]["all"]) for name in names],
    }


def _masks(found: Mapping[str, Any]) -> dict[str, Any]:
    """Images with a mask by split, and the shares of the square that masks cover."""
    return {
        "splits": [
            (split, int(held["with a mask"]), sum(map(int, held.values())))
            for split, held in found["splits"].items()
        ],
        **{name: float(found[name]) for name in ("least", "median", "most")},
        **{name: int(found[name]) for name in ("empty", "full")},
    }


def _statistics(table: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """A row for each class: mean and spread of each number; empty where it has no images."""
    return {
        "names": [name.replace("_", " ") for name in table],
        "rows": [
            (
                label,
                [
                    (_short(values[label]["mean"]), _short(values[label]["spread"]))
                    if values[label]
                    else None
                    for values in table.values()
                ],
            )
            for label in classes
        ],
    }


def _short(value: float) -> str:
    return number(value) if abs(value) < 10 else f"{value:,.0f}"


def _shortcut(found: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """AUROC and interval of each class, None where too few patients."""
    rows = []
    for label in classes:
        score = found["auroc"][label]
        rows.append((label, _within(score), bool(score) and score["low"] > 0.5))
    accuracy = _within(found.get("accuracy"))
    return {"folds": count(found["folds"]), "rows": rows, "accuracy": accuracy}


def _baseline(found: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """What thumbnails alone tell: a row for each figure, a cell for each model."""
    models = found["logistic_regression"], found["perceptron"]
    rows = [("Accuracy", [_within(model["accuracy"]) for model in models])]
    rows += [
        (f"AUROC {name}", [_within(model["auroc"][name]) for model in models]) for name in classes
    ]
    rows.append(("Mean AUROC", [_within(model["mean_auroc"]) for model in models]))
    amounts = ("size_px", "folds", "images", "of_images", "patients")
    return {
        **{name: count(found[name]) for name in amounts},
        "is_part": found["images"] < found["of_images"],
        "largest_class": percent(found["largest_class"]),
        "rows": [row for row in rows if any(row[1]) or row[0] != "Accuracy"],
    }


def _within(score: Mapping[str, float] | None) -> list[str] | None:
    """A figure and the ends of its interval."""
    return [number(score[name]) for name in ("value", "low", "high")] if score else None


def _trivial(found: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """Gather what is reached without a deep network, for the first line of the page.

    Returns:
        What is looked at alone; accuracy of one class per image, else mean_auroc; the figure as
        value, low and high. Empty for audits of older versions, and for too few patients.
    """
    told: list[tuple[str, str, dict[str, float]]] = []
    shortcut, baseline = found["shortcut"] or {}, found.get("baseline")
    for figure in ("accuracy", "mean_auroc"):
        if not told and shortcut.get(figure):
            what = "size, border and brightness alone, without the lungs"
            told.append((what, figure, _checked(shortcut[figure])))
    best = best_model(baseline) if baseline else None
    if baseline and best:
        what = f"thumbnails of {count(baseline['size_px'])} px alone, without a deep network"
        told.append((what, best[1], _checked(best[2])))
    return told


def _checked(score: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(score[name]) for name in ("value", "low", "high")}


def _seen(found: Mapping[str, Any]) -> dict[str, Any]:
    """Images of the pre-training's data set by split."""
    return {
        "data_set": str(found["data_set"]),
        "splits": {split: int(counts["all"]) for split, counts in found["splits"].items()},
    }
