"""Localise: score where a network looks against boxes and masks drawn by people."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from cxrdist.config import LocaliseConfig
from cxrdist.data.cache import open_masks, read_rows
from cxrdist.data.outlines import (
    Case,
    Outlines,
    boxes_of_shards,
    boxes_of_table,
    masks_of_files,
    masks_of_shards,
)
from cxrdist.data.regions import is_constant
from cxrdist.data.shards import describe_samples
from cxrdist.distributed import finish, gather, say, together
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.loaded_run import LoadedRun, OpenedRun, load_images, open_run_on, writing
from cxrdist.evaluate.predictions import in_order, predict_split, rank_batches
from cxrdist.explain.heatmap import OUTLINE, enlarged, overlay
from cxrdist.explain.localisation import (
    ALL,
    FEWEST_CASES,
    INSIDE,
    POINTING,
    Group,
    Localisation,
    Method,
    Pictured,
    Scored,
    choose_tops,
    score_chance,
    score_map,
    summarise,
)
from cxrdist.explain.pictures import replace_pictures
from cxrdist.explain.relevance import Explainer
from cxrdist.explain.rivals import centre_prior, grad_cam, plain_gradient
from cxrdist.files import write_json
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import one_network
from cxrdist.terminal import percentage, progress, table, with_limits

CONSTANT = "that cover nothing or everything"
SEEN = "of images that the network has seen"
PICTURED = 4  # number of the best cases that get pictures, and of the worst
DIGITS = 7  # decimals of shares; float32 has no more
Maps = Mapping[Method, NDArray[np.floating]]  # [B, S, S] each
NAMES: Mapping[Method, str] = {
    "lrp": "LRP, the class",
    "contrast": "LRP, contrast",
    "grad_cam": "Grad-CAM",
    "gradient": "plain gradient",
    "mean_outline": "mean outline of train",
    "centre": "centre prior",
    "chance": "chance",
}


@dataclass(frozen=True)
class _Inputs:
    """Inputs that each rank needs to score its share of the cases."""

    loaded: LoadedRun
    split: str
    model: Classifier
    explainer: Explainer
    outlines: Outlines
    means: Mapping[str, NDArray[np.float64]]
    """Mean outline [S, S] of train by class, and of `ALL`; empty without cases."""
    batch_size: int


def localise(config: LocaliseConfig) -> None:
    """Score maps against outlines; write RUN/SPLIT/localisation.json and pictures; print a table.

    Relevance is compared with other maps of the same images: the contrast with the likeliest other
    class, Grad-CAM, the plain gradient, the mean outline of train, a centre prior, and chance.
    The result is the same for any number of ranks, since each explains whole batches.
    """
    if config.boxes is not None and config.masks is not None:
        raise CxrdistError("localise: --boxes and --masks exclude each other; give one of them")
    opened = open_run_on(config.run, config.shards, config.split, config.name)
    run = opened.run
    with writing(opened, run.localisation, run.localisation_pictures) as file:
        _localise(config, opened, file)


def _localise(config: LocaliseConfig, opened: OpenedRun, file: Path) -> None:
    accelerator = opened.accelerator
    model = together(accelerator, lambda: one_network(opened.model))
    explainer = together(accelerator, lambda: Explainer(model))
    outlines = together(accelerator, lambda: _read_outlines(config, opened))
    together(accelerator, lambda: _cases_by_split(opened, outlines))  # refuse before decoding
    loaded = load_images(opened, config.cache)
    if outlines.kind == "masks" and config.masks is None:
        # Only after load_images, which has compared the shards with their index (open_cache).
        masks = open_masks(loaded.packed, config.cache, accelerator)
        outlines = masks_of_shards(opened.index, masks, _numbers(opened))
    outlines = _without_seen(outlines, loaded)
    for note in outlines.notes:
        say(accelerator, f"{outlines.origin}: {note}")
    cases = together(accelerator, lambda: _cases_by_split(loaded, outlines))
    means, num_train = _mean_outlines(loaded, outlines, cases["train"])
    inputs = _Inputs(loaded, config.split, model, explainer, outlines, means, config.batch_size)
    val = _score_cases(inputs, cases["val"]) if len(cases["val"]) >= FEWEST_CASES else []
    # Outlines of nothing or everything are not scored.
    val = val if len(val) >= FEWEST_CASES else []
    scored = _score_cases(inputs, cases[ALL])
    if accelerator.is_main_process:
        scores = _describe(inputs, scored, val, num_train, len(cases[ALL]))
        write_json(file, scores)
        print(summary(scores))
        print(f"all scores: {file}, and in the report")
    finish(accelerator)


def _numbers(opened: OpenedRun) -> list[int]:
    """List the samples of the split, and of train and val if the shards are the run's own."""
    splits = {opened.split} | ({"train", "val"} if opened.choices is None else set())
    return [i for i, sample in enumerate(opened.index.samples) if sample.split in splits]


def _read_outlines(config: LocaliseConfig, opened: OpenedRun) -> Outlines:
    """Read the outlines from the given file, or those of the shards: boxes, or else masks.

    Masks of the shards are only counted: their pixels are decoded with the images.
    """
    originals = dict(describe_samples(opened.packed.packed(), {*_numbers(opened)}))
    if config.boxes is not None:
        return boxes_of_table(opened.index, originals, config.boxes)
    if config.masks is not None:
        return masks_of_files(opened.index, originals, config.masks)
    boxes = boxes_of_shards(opened.index, originals)
    not_decoded = np.zeros((0, 0), np.uint8)
    return boxes if boxes.shapes else masks_of_shards(opened.index, not_decoded, _numbers(opened))


def _without_seen(outlines: Outlines, loaded: LoadedRun) -> Outlines:
    """Leave out the images of an external set that have left the split: the network saw them."""
    samples = loaded.index.samples
    kept = {case: count for case, count in outlines.shapes.items() if samples[case[0]].split}
    if len(kept) == len(outlines.shapes):
        return outlines
    seen = sum(outlines.shapes.values()) - sum(kept.values())
    return replace(outlines, shapes=kept, left_out={**outlines.left_out, SEEN: seen})


def _cases_by_split(opened: OpenedRun, outlines: Outlines) -> dict[str, list[Case]]:
    """Group the cases: the scored split under `ALL`, others of train and val by their names."""
    split, samples = opened.split, opened.index.samples
    cases: dict[str, list[Case]] = {name: [] for name in (ALL, "val", "train")}
    for case in outlines.shapes:
        own = samples[case[0]].split
        if own == split:
            cases[ALL].append(case)
        # Splits of an external set are not those that the network was trained and validated on.
        elif own in cases and opened.choices is None:
            cases[own].append(case)
    if not cases[ALL]:
        reasons = [f"{count} {reason}" for reason, count in outlines.left_out.items()]
        others = [f"{len(cases[name])} of images in {name}" for name in ("val", "train")]
        raise CxrdistError(
            f"--split {split}: has no image with {outlines.kind} of {outlines.origin} "
            f"({'; '.join([*reasons, *others])}); give --boxes or --masks of its images"
        )
    return cases


def _mean_outlines(
    loaded: LoadedRun, outlines: Outlines, cases: Sequence[Case]
) -> tuple[dict[str, NDArray[np.float64]], int]:
    """Return the mean outline of each class and of all cases, and the number of outlines.

    Outlines of nothing or everything are left out; without any other there is no mean.
    """
    accelerator = loaded.accelerator
    side = loaded.index.image_size_px

    def add() -> dict[str, tuple[NDArray[np.float64], int]]:
        # Sums of 0 and 1 are exact, so that they do not depend on how ranks share the cases.
        sums = {label: (np.zeros((side, side)), 0) for _, label in cases}
        for batch in rank_batches(np.arange(len(cases)), 1, accelerator):
            case = cases[int(batch[0])]
            outline = outlines.read(case)
            if not is_constant(outline):
                total, count = sums[case[1]]
                sums[case[1]] = total + outline, count + 1
        return sums

    gathered = gather(accelerator, [together(accelerator, add)])
    counts = {name: sum(own[name][1] for own in gathered) for name in gathered[0]}
    sums = {
        name: np.sum([own[name][0] for own in gathered], axis=0) for name in counts if counts[name]
    }
    if not sums:
        return {}, 0
    num_outlines = sum(counts.values())
    means = {name: total / counts[name] for name, total in sums.items()}
    return means | {ALL: np.sum([*sums.values()], axis=0) / num_outlines}, num_outlines


def _score_cases(inputs: _Inputs, cases: Sequence[Case]) -> list[Scored]:
    """Score the maps of the cases on all ranks; outlines of nothing or everything are left out.

    The cases of a batch share their class and the likeliest other class. Batches do not depend on
    the number of ranks.
    """
    loaded, accelerator = inputs.loaded, inputs.loaded.accelerator
    numbers = np.array(sorted({number for number, _ in cases}), dtype=np.int64)
    rows_of_logits = in_order(predict_split(loaded, numbers, inputs.batch_size), numbers)
    logits = dict(zip(numbers.tolist(), rows_of_logits, strict=True))
    pairs: dict[tuple[str, str | None], list[int]] = {}
    for number, target in cases:
        other = likeliest_other(logits[number], target, loaded.index.classes)
        pairs.setdefault((target, other), []).append(number)
    batches = [
        (target, other, batch)
        for (target, other), own in pairs.items()
        for batch in rank_batches(np.array(own, dtype=np.int64), inputs.batch_size, accelerator)
    ]

    def score() -> list[Scored]:
        rows: list[Scored] = []
        total, show = sum(len(batch) for *_, batch in batches), accelerator.is_main_process
        with progress(total, "explaining", "images", show=show) as bar:
            for target, other, batch in batches:
                rows += _score_batch(inputs, batch.tolist(), target, other)
                bar.update(len(batch))
        return rows

    # By image and class: gathered rows are in the order of the ranks.
    return sorted(gather(accelerator, together(accelerator, score)), key=lambda row: row[:2])


def likeliest_other(
    logits: NDArray[np.floating], target: str, classes: Sequence[str]
) -> str | None:
    """Return the class with the largest logit besides the target; None if there is no other."""
    others = [i for i, name in enumerate(classes) if name != target]
    return classes[max(others, key=lambda i: logits[i])] if others else None


def _score_batch(
    inputs: _Inputs, numbers: Sequence[int], target: str, other: str | None
) -> Iterator[Scored]:
    outlines = {number: inputs.outlines.read((number, target)) for number in numbers}
    drawn = [number for number in numbers if not is_constant(outlines[number])]
    if not drawn:
        return
    loaded = inputs.loaded
    images = read_rows(loaded.images, np.array(drawn), loaded.accelerator.device)
    maps = _make_maps(inputs, images, target, other)
    for i, number in enumerate(drawn):
        outline = outlines[number]
        area = float(outline.mean())
        scores = {method: score_map(values[i], outline) for method, values in maps.items()}
        scores["chance"] = score_chance(area)
        shapes = inputs.outlines.shapes[number, target]
        yield Scored(number, target, shapes, area, scores, other)


def _make_maps(inputs: _Inputs, images: Tensor, target: str, other: str | None) -> Maps:
    """Return the maps of a batch for a class, in the order of the table."""
    size_px = images.shape[-1]
    shape = len(images), size_px, size_px
    class_index = inputs.model.classes.index(target)
    maps = _relevance(inputs.explainer, images, target, other)
    maps["grad_cam"] = grad_cam(inputs.model, images, class_index).float().cpu().numpy()
    maps["gradient"] = plain_gradient(inputs.model, images, class_index).float().cpu().numpy()
    if inputs.means:
        mean = inputs.means.get(target, inputs.means[ALL])
        maps["mean_outline"] = np.broadcast_to(mean, shape)
    maps["centre"] = np.broadcast_to(centre_prior(size_px), shape)
    return maps


def _relevance(
    explainer: Explainer, images: Tensor, target: str, other: str | None
) -> dict[Method, NDArray[np.floating]]:
    """Return the relevance for a class, and the contrast with another class if given."""
    targets = [target] if other is None else [target, other]
    relevance = explainer.attribute(images, targets).relevance.float().cpu().numpy()
    maps: dict[Method, NDArray[np.floating]] = {"lrp": relevance[:, 0]}
    if other is not None:
        maps["contrast"] = relevance[:, 0] - relevance[:, 1]
    return maps


def _describe(
    inputs: _Inputs, scored: Sequence[Scored], val: Sequence[Scored], num_train: int, num_cases: int
) -> Localisation:
    """Return the content of localisation.json, and write the pictures."""
    samples, outlines = inputs.loaded.index.samples, inputs.outlines
    constant = {CONSTANT: num_cases - len(scored)} if len(scored) < num_cases else {}
    if not scored:
        raise CxrdistError(
            f"{outlines.origin}: all {outlines.kind} of the split cover nothing or everything; "
            "check their positions"
        )
    patients = [samples[case.number].patient for case in scored]
    groups, intervals = summarise(scored, patients, choose_tops(val))
    return {
        "format": "cxrdist-localisation-1",
        "split": inputs.split,
        "index_sha256": inputs.loaded.index.sha256,
        "kind": outlines.kind,
        "origin": outlines.origin,
        "left_out": {**outlines.left_out, **constant},
        "val_cases": len(val),
        "train_cases": num_train,
        "groups": groups,
        "intervals": intervals,
        "pictures": _write_pictures(inputs, scored),
    }


def _write_pictures(inputs: _Inputs, scored: Sequence[Scored]) -> list[Pictured]:
    """Draw the cases with the largest and the least share of positive relevance inside."""
    ranked = sorted(scored, key=lambda case: -case.scores["lrp"][INSIDE])
    worst = ranked[PICTURED:][: -PICTURED - 1 : -1]  # no case is both a best and a worst one
    drawn = [_draw(inputs, case, "best") for case in ranked[:PICTURED]]
    drawn += [_draw(inputs, case, "worst") for case in worst]
    pictures = {name: picture for _, files in drawn for name, picture in files.items()}
    run, subset = inputs.loaded.run, inputs.loaded.subset
    replace_pictures(run.localisation(subset), run.localisation_pictures(subset), pictures)
    return [entry for entry, _ in drawn]


def _draw(
    inputs: _Inputs, case: Scored, rank: Literal["best", "worst"]
) -> tuple[Pictured, dict[str, Image.Image]]:
    """Return the entry of a case in localisation.json, and its pictures by file name."""
    loaded = inputs.loaded
    images = read_rows(loaded.images, np.array([case.number]), loaded.accelerator.device)
    pixels = np.asarray(loaded.images[case.number])
    outline = inputs.outlines.read((case.number, case.target))
    maps = _relevance(inputs.explainer, images, case.target, case.other)
    pictures = {"xray": Image.fromarray(pixels)}
    pictures |= {method: overlay(pixels, values[0]) for method, values in maps.items()}
    key = loaded.index.samples[case.number].key
    class_index = inputs.model.classes.index(case.target)
    # Not by the name of the class: replace_pictures finds earlier pictures by a pattern that some
    # names do not fit.
    names = {kind: f"{key}.{class_index}.{kind}.png" for kind in pictures}
    entry: Pictured = {
        "key": key,
        "target": case.target,
        "other": case.other,
        "rank": rank,
        "inside": round(float(case.scores["lrp"][INSIDE]), DIGITS),
        "area": round(case.area, DIGITS),
        "points": bool(case.scores["lrp"][POINTING] > 0),
        "xray": names["xray"],
        "lrp": names["lrp"],
        "contrast": names.get("contrast"),
    }
    return entry, {names[kind]: outlined(picture, outline) for kind, picture in pictures.items()}


def outlined(picture: Image.Image, outline: NDArray[np.bool_]) -> Image.Image:
    """Return a picture at least 300 px wide, with a thin line along an outline's inner edge."""
    resized, times = enlarged(picture)
    large = np.array(resized)
    area = outline.repeat(times, axis=0).repeat(times, axis=1)
    large[area & ~binary_erosion(area)] = OUTLINE
    return Image.fromarray(large)


def summary(scores: Localisation) -> str:
    """Return the scores as a table for the terminal."""
    whole = scores["groups"][0]
    headers = ["Map", "Points inside", "Inside", "Times chance", "Overlap", "of pixels"]
    measures = ("pointing", "inside", "times_chance", "overlap")
    methods: Sequence[Mapping[str, Any]] = whole["methods"]
    rows = [
        [
            NAMES[row["method"]],
            *(with_limits(row[name], row[f"{name}_interval"]) for name in measures),
            f"{row['marked']:.0%}",
        ]
        for row in methods
    ]
    marked = (
        f"chosen on {scores['val_cases']} outlines of val"
        if scores["val_cases"]
        else f"fixed, as choosing it takes {FEWEST_CASES} outlines of val that are not scored here"
    )
    lines = [_amount(scores, group) for group in scores["groups"]]
    left_out = [f"left out: {count} {why}" for why, count in scores["left_out"].items()]
    return "\n".join([*lines, *left_out, table(rows, headers), f"share of the pixels: {marked}"])


def _amount(scores: Localisation, group: Group) -> str:
    name = "" if group["name"] == ALL else f"{group['name']}: "
    return (
        f"{name}{group['shapes']} {scores['kind']} on {group['images']} images of "
        f"{group['patients']} patients, {percentage(group['area'])}% of the square on average"
    )
