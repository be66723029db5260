"""The probe for words on the images as the report shows it, beside what the paper says."""

from collections.abc import Mapping
from typing import Any

from cxrdist.report import pictures
from cxrdist.report.files import reading, within
from cxrdist.report.values import count, fine, number, percent
from cxrdist.run import TEXT_FORMAT, RunDirectory, read_document

CONDITIONS = ("as_it_is", "black", "fill")
MOST_SHOWN = 500  # pictures, of 50 kB each; the probe draws a few of each class


def text_views(run: RunDirectory) -> list[dict[str, Any]]:
    """Gather what is shown of each split that was probed, by name.

    Raises:
        CxrdistError: a file is not what the probe writes.
    """
    files = [file for name in ("*", "external/*") for file in run.root.glob(f"{name}/text.json")]
    places = sorted(file.parent.relative_to(run.root).as_posix() for file in files)
    return [_text_view(run, place) for place in places]


def _text_view(run: RunDirectory, split: str) -> dict[str, Any]:
    path = run.text(split)
    with reading(path, "probe-text"):
        found = read_document(path, dict[str, Any], "run `cxrdist probe-text` again")
        if found["format"] != TEXT_FORMAT:
            raise ValueError(f"format is {found['format']!r} and not {TEXT_FORMAT!r}")
        classes = [str(name) for name in found["classes"]]
        drawn = [_picture(run, split, about, classes) for about in found["pictures"][:MOST_SHOWN]]
        return {
            "place": split,
            "split": split.replace("external/", "external set "),
            "several": found["task"] == "multilabel",
            "classes": classes,
            "index_sha256": str(found["index_sha256"]),
            "paper": {
                name: str(found["paper"][name]) for name in ("covering", "paste", "relevance")
            },
            "text": _text(found["text"]),
            "covering": _covering(found["covering"], classes, found["task"]),
            "paste": _paste(found["paste"]),
            "relevance": _relevance(found["relevance"]),
            "in_text": _in_text(found["relevance"]["all"]),
            "found": [about for about in drawn if about["kind"] == "found"],
            "pasted": [about for about in drawn if about["kind"] == "pasted"],
        }


def _text(about: Mapping[str, Any]) -> dict[str, Any]:
    """How much text there is: for each class its images, those with text, and what it reads."""
    return {
        "found_in": str(about["found_in"]),
        "images": count(about["images"]),
        "with_text": int(about["with_text"]),
        "boxes": count(about["boxes"]),
        "rows": [
            (
                str(row["class"]),
                count(row["images"]),
                count(row["with_text"]),
                [(str(word), count(times)) for word, times in row["words"]],
            )
            for row in about["classes"]
        ],
    }


def _covering(about: Mapping[str, Any], classes: list[str], task: str) -> dict[str, Any]:
    """The scores in each condition: recall and accuracy, of several labels AUROC."""
    all_metrics = [about[name] for name in CONDITIONS]
    if task == "multilabel":
        score, total = "AUROC", [number(metrics["macro"]["auroc"]) for metrics in all_metrics]
    else:
        score, total = "Recall", [percent(metrics["accuracy"]) for metrics in all_metrics]
    return {
        "score": score,
        "rows": [
            (name, [number(metrics["classes"][name][score.lower()]) for metrics in all_metrics])
            for name in classes
        ],
        "total": total,
        "predicted_otherwise": [
            count(about["predicted_otherwise"][name]) for name in CONDITIONS[1:]
        ],
    }


def _paste(about: Mapping[str, Any]) -> dict[str, Any]:
    """Mean probabilities before and after, a row for each true class; None without images."""
    return {
        "word": str(about["word"]),
        "place": str(about["place"]).replace("-", " "),
        "letters_px": count(about["letters_px"]),
        "image_size_px": count(about["image_size_px"]),
        "rows": [
            (
                str(row["class"]),
                count(row["images"]),
                [(fine(b), fine(a)) for b, a in zip(row["before"], row["after"], strict=True)]
                if row["images"]
                else None,
                count(row["predicted_otherwise"]),
            )
            for row in about["classes"]
        ],
    }


def _relevance(about: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Share of |relevance| and of the area in the boxes, a row for each class and one for all."""
    named = [*((str(row["class"]), row) for row in about["classes"]), ("All images", about["all"])]
    return [
        (
            name,
            count(row["images"]),
            percent(row["share"]),
            percent(row["area"]),
            number(row["times_chance"]),
        )
        for name, row in named
    ]


def _in_text(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of all images for the verdict; None without an interval, as of older versions."""
    if not row["images"] or "share_interval" not in row:
        return None
    low, high = (float(limit) for limit in row["share_interval"])
    return {
        "images": int(row["images"]),
        "patients": int(row["patients"]),
        "share": float(row["share"]),
        "share_interval": [low, high],
        "area": float(row["area"]),
    }


def _picture(
    run: RunDirectory, split: str, about: Mapping[str, Any], classes: list[str]
) -> dict[str, Any]:
    """One image with its boxes: X-ray, heat map, and what the numbers say."""
    directory = run.text_pictures(split)
    changes = zip(classes, about["before"], about["after"], strict=True)
    return {
        "kind": str(about["kind"]),
        "key": str(about["key"]),
        "label": str(about["label"]),
        "explained": str(about["explained"]),
        "share": percent(about["share"]),
        "area": percent(about["area"]),
        "inside": number(about["relevance_inside"]),
        "changes": [(name, fine(before), fine(after)) for name, before, after in changes],
        "xray": pictures.embed(within(directory, about["xray"])),
        "map": pictures.embed(within(directory, about["map"])),
    }
