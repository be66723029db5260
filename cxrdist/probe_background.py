"""Probe how well the classes can be predicted from images without their lungs.

The same small network is trained on the images, on the images with the lungs made black (Maguolo &
Nanni 2021, DeGrave et al. 2021), on the lungs alone, and on the pixels shuffled within each image.
Shuffling leaves only the grey values, which depend on the acquisition (Ong Ly et al. 2024, npj
Digital Medicine 7:124). Each of the four is a run, so that a killed probe resumes as a training
does.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.bootstrap import Limits
from cxrdist.config import (
    Augmentation,
    EvaluateConfig,
    Network,
    ProbeBackgroundConfig,
    Stage,
    TrainConfig,
    deciding,
)
from cxrdist.data.derived import PackedSample, derive_shards
from cxrdist.data.found import find_images, path_below
from cxrdist.data.index import Classes, Index, read_index
from cxrdist.data.lungs import Kind, Lungs, count_left_out, find_lungs, lost_class
from cxrdist.distributed import start
from cxrdist.documents import Between, Distinct, Sha256, Share, Text
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.compare import Difference, compare_scored
from cxrdist.evaluate.measure import Settings
from cxrdist.evaluate.metrics import Metrics, headline_means
from cxrdist.evaluate.predictions import evaluate
from cxrdist.evaluate.scored import read_scored
from cxrdist.fields import hyphened
from cxrdist.files import atomic_directory, locked, read_document, sha256_of, sweep, write_json
from cxrdist.info import Amount, Count, Task
from cxrdist.intervals import Intervals
from cxrdist.model.networks import block_names
from cxrdist.run import RunDirectory
from cxrdist.terminal import table
from cxrdist.train.loop import train

Variant = Literal["images", "no_lungs", "lungs", "shuffled"]
VARIANTS: dict[Variant, str] = {
    "images": "The images as they are",
    "no_lungs": "The lungs made black",
    "lungs": "Only the lungs",
    "shuffled": "Pixels shuffled",
}
CONTENTS = {"index_sha256": "index of --shards", "masks_sha256": "content of --masks"}
SIZE_PX = 64
# The shape of the network of recipes/lungs.yaml, which a CPU trains in minutes.
NETWORK = Network(growth_rate=8, block_config=(2, 2, 2, 2), dropout=0.0)
LEARNING_RATE = 3e-3
BATCH_SIZE = 16
PASSES = 15_000
"""Number of images that a training takes in all epochs together."""
EPOCHS = (3, 40)
"""Least and largest number of epochs."""
OUTLINE = (
    "The outline of the masks remains visible without the lungs, and in the lungs alone: what it "
    "shows of the lungs' shape counts there, too."
)
ESTIMATE = (
    "AUROC of the images - AUROC of the shuffled pixels + 0.5: what Ong Ly et al. (2024) expect on "
    "images from elsewhere"
)


class Region(TypedDict):
    """What counts as lung."""

    kind: Kind
    why: Text
    """Where the masks are from, or why there is an ellipse."""
    share: Share
    """Share of the square that is lung, mean over the images."""
    left_out: Count
    """Images without a usable mask, which all four trainings leave out."""
    left_out_classes: dict[str, Count]


class Begun(TypedDict):
    """The content of shards/probe.json: what the four sets of shards were made of."""

    format: Literal["cxrdist-probe-1"]
    index_sha256: Sha256
    masks: Text | None
    masks_sha256: NotRequired[Sha256 | None]
    """Of the names and contents of the masks."""
    seed: Count
    region: Region


class ClassScore(TypedDict):
    """The AUROC of one class against the rest, or of one label."""

    auroc: Share | None
    auroc_interval: Limits | None
    positives: Count
    positive_patients: Count
    too_few: Text | None
    difference: Difference
    """Difference from the AUROC of the unchanged images."""


class VariantScore(TypedDict):
    """The scores of a network on one kind of images."""

    auroc: Share | None
    """The mean over the classes with enough images."""
    auroc_interval: Limits | None
    difference: Difference
    """Difference from the AUROC of the unchanged images."""
    accuracy: Share | None
    """None for a multilabel task."""
    accuracy_interval: Limits | None
    classes: dict[str, ClassScore]


class Estimate(TypedDict):
    """The estimated AUROC on images from elsewhere, clipped to 0..1."""

    auroc: Share
    interval: Limits


class BackgroundFile(TypedDict):
    """The content of background.json."""

    format: Literal["cxrdist-background-1"]
    index_sha256: Sha256
    task: Task
    classes: Classes
    totals: dict[str, Amount]
    """Images and patients by split."""
    image_size_px: Count
    epochs: Count
    seed: Count
    region: Region
    fewest: Count
    """Least number of positives, and of negatives, for a statement about a class."""
    intervals: Intervals
    variants: dict[Variant, VariantScore]
    estimate: Estimate | None
    """None if an AUROC is not defined."""
    says: Annotated[list[Text], Between(1, 10), Distinct()]


def probe_background(config: ProbeBackgroundConfig) -> None:
    """Train the four networks, write OUT/background.json, and print the table.

    The same command resumes: shards that are made and networks that are trained are kept.
    """
    if start().num_processes > 1:
        raise CxrdistError(
            "probe-background: trains small networks in one process; run it without a launcher"
        )
    index = read_index(config.shards)
    _refuse_unusable(index)
    with locked(config.out):
        sweep(config.out, alone=True)
        begun = _derive_once(config, index)
        print(_describe_region(begun["region"], len(index.samples)))
        for variant, title in VARIANTS.items():
            print(f"\n{title}:")
            _train_once(config, variant)
        content = _describe(config, begun)
        write_json(config.out / "background.json", content)
    print(f"\n{summary(content)}")
    print(f"all results: {config.out / 'background.json'}")


def _refuse_unusable(index: Index) -> None:
    if index.lungs_only:
        raise CxrdistError(
            f"--shards {index.directory}: are of the lungs only; give shards that "
            "were packed without --lungs-only"
        )
    for split in ("train", "val", "test"):
        if not index.numbers(split):
            raise CxrdistError(
                f"--shards {index.directory}: have no images in {split}; the probe needs train, "
                "val and test, pack with --split 0.7/0.1/0.2"
            )


def _derive_once(config: ProbeBackgroundConfig, index: Index) -> Begun:
    """Make the four sets of shards, or keep those of an earlier command with the same inputs."""
    made = config.out / "shards"
    masks, masks_sha256 = None, None
    if config.masks is not None:
        masks, masks_sha256 = str(config.masks), _digest_of(config.masks)
    # A directory that is there is complete, as atomic_directory renames it at the end.
    if made.is_dir():
        begun = read_document(made / "probe.json", Begun, f"remove {config.out} to begin anew")
        given = {"index_sha256": index.sha256, "masks": masks, "masks_sha256": masks_sha256}
        for field, value in (deciding(config) | given).items():
            before = {**begun}.get(field)
            if before != value:
                name = CONTENTS.get(field, f"--{hyphened(field)}")
                raise CxrdistError(
                    f"--out {config.out}: contains another probe (the {name} was {before}, is "
                    f"{value}); give the same to resume, or another directory"
                )
        return begun
    lungs = find_lungs(index, config.masks)
    with atomic_directory(made) as directory:
        begun = {
            "format": "cxrdist-probe-1",
            "index_sha256": index.sha256,
            "masks": masks,
            "masks_sha256": masks_sha256,
            "seed": config.seed,
            "region": _derive(index, lungs, directory, config.seed),
        }
        write_json(directory / "probe.json", begun)
    return begun


def _digest_of(masks: Path) -> str:
    """Return the hash of a table of masks, or of the names and contents of those in a folder."""
    if not masks.exists():
        raise CxrdistError(f"--masks {masks}: no such folder or table")
    digest = hashlib.sha256()
    for file in find_images(masks).images if masks.is_dir() else (masks,):
        digest.update(f"{path_below(masks, file)}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _derive(index: Index, lungs: Lungs, directory: Path, seed: int) -> Region:
    """Write the four sets of shards; return what counts as lung in them."""
    size_px, shares = min(SIZE_PX, index.image_size_px), list[float]()

    def change(packed: PackedSample) -> list[NDArray[np.uint8]] | None:
        lung = lungs.of(packed)
        if lung is None:
            return None
        shares.append(float(lung.mean()))
        sample = index.samples[packed.number]
        return variants_of(packed.pixels, lung, size_px, f"{seed} {sample.key}")

    outs = [directory / name for name in VARIANTS]
    for out in outs:
        out.mkdir()
    left_out = derive_shards(index, outs, size_px, change)
    if lost := lost_class(index, left_out):
        raise CxrdistError(
            f"--masks: apart from masks that cover nothing or everything, {lost}; give masks of "
            "all classes, or none for an ellipse"
        )
    return {
        "kind": lungs.kind,
        "why": lungs.why,
        "share": round(float(np.mean(shares)), 4),
        "left_out": len(left_out),
        "left_out_classes": count_left_out(index, left_out),
    }


def variants_of(
    pixels: NDArray[np.uint8], lung: NDArray[np.bool_], size_px: int, key: str
) -> list[NDArray[np.uint8]]:
    """Change a square [S, S] in the ways of `VARIANTS`, in their order; uint8 [size, size] each.

    Pixels are made black before the square becomes smaller, so that none of them counts in a mean;
    they are shuffled afterwards, since means of shuffled pixels are all alike. The permutation is
    seeded by `key`.
    """
    size = (size_px, size_px)
    whole, without, alone = (
        np.asarray(Image.fromarray(square).resize(size, Image.Resampling.BOX))
        for square in (pixels, pixels * ~lung, pixels * lung)
    )
    digest = hashlib.sha256(key.encode()).digest()
    random = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    shuffled = random.permutation(whole.ravel()).reshape(whole.shape)
    return [whole, without, alone, shuffled]


def _train_once(config: ProbeBackgroundConfig, variant: Variant) -> None:
    """Train and evaluate a network, unless an earlier command has done it."""
    run, shards = _run_of(config, variant), _shards_of(config, variant)
    epochs = _epochs(read_index(shards))
    rates = dict.fromkeys(block_names(NETWORK), LEARNING_RATE)
    # Patience is all epochs: stopping early would cut off the low rates at the cosine's end.
    stage = Stage(rates, epochs, epochs, weight_decay=0.01, schedule="cosine")
    train(
        TrainConfig(
            shards,
            run.root,
            {"all": stage},
            init="none",
            global_batch_size=BATCH_SIZE,
            # A turn or a shift would blur shuffled pixels, and so change their grey values.
            augmentation=Augmentation(degrees=0, shift_x=0, shift_y=0),
            network=NETWORK,
            optimizer="adamw",
            seed=config.seed,
            cache=config.cache,
        )
    )
    if not run.metrics("test").is_file():
        evaluate(EvaluateConfig(run.root, shards, cache=config.cache))


def _run_of(config: ProbeBackgroundConfig, variant: Variant) -> RunDirectory:
    return RunDirectory(config.out / "runs" / variant)


def _shards_of(config: ProbeBackgroundConfig, variant: Variant) -> Path:
    return config.out / "shards" / variant


def _epochs(index: Index) -> int:
    """Return the epochs of a training: the more images, the fewer, so that it takes minutes."""
    return int(np.clip(round(PASSES / len(index.numbers("train"))), *EPOCHS))


def _describe(config: ProbeBackgroundConfig, begun: Begun) -> BackgroundFile:
    """Gather the figures of the four runs, and compare each with the images as they are."""
    index = read_index(_shards_of(config, "images"))
    metrics = {name: _read_metrics(config, name) for name in VARIANTS}
    own = metrics["images"]
    variants = {name: _score(config, name, metrics[name]) for name in VARIANTS}
    content: BackgroundFile = {
        "format": "cxrdist-background-1",
        "index_sha256": begun["index_sha256"],
        "task": index.task,
        "classes": index.classes,
        "totals": index.totals(),
        "image_size_px": index.image_size_px,
        "epochs": _epochs(index),
        "seed": config.seed,
        "region": begun["region"],
        "fewest": own["fewest"],
        "intervals": own["intervals"],
        "variants": variants,
        "estimate": _estimate(variants["shuffled"]["difference"]),
        "says": [],
    }
    content["says"] = _says(content)
    return content


def _read_metrics(config: ProbeBackgroundConfig, variant: Variant) -> Metrics:
    file = _run_of(config, variant).metrics("test")
    return read_document(file, Metrics, f"remove {file} and run the same command again")


def _score(config: ProbeBackgroundConfig, variant: Variant, metrics: Metrics) -> VariantScore:
    """Return the figures of a run, and how they differ from those of the images as they are."""
    images, here = (
        read_scored(_run_of(config, name).predictions("test"), metrics["task"])
        for name in ("images", variant)
    )
    compared = compare_scored(images, here, Settings(metrics["fewest"]))
    means = headline_means(metrics)
    classes: dict[str, ClassScore] = {
        name: {
            "auroc": scores["auroc"],
            "auroc_interval": scores["auroc_interval"],
            "positives": scores["positives"],
            "positive_patients": scores["positive_patients"],
            "too_few": scores["too_few"],
            "difference": compared["classes"][name]["figures"]["auroc"],
        }
        for name, scores in metrics["classes"].items()
    }
    return {
        "auroc": means["auroc"],
        "auroc_interval": means["auroc_interval"],
        "difference": compared["macro"]["auroc"],
        "accuracy": metrics.get("accuracy"),
        "accuracy_interval": metrics.get("accuracy_interval"),
        "classes": classes,
    }


def _estimate(difference: Difference) -> Estimate | None:
    """Return the AUROC that Ong Ly et al. (2024) expect elsewhere, P_Est = P_Source - P_DABIS + O.

    P_DABIS is the AUROC of shuffled pixels, and O is 0.5 for an AUROC (their equations are in the
    README of github.com/mcintoshML/Data-Bias-Analysis). The result is clipped to 0..1.
    """
    if difference["difference"] is None or difference["interval"] is None:
        return None
    # The difference is P_DABIS - P_Source: it is subtracted, and its limits change places.
    low, high = difference["interval"]
    figures = (0.5 - difference["difference"], 0.5 - high, 0.5 - low)
    auroc, least, most = (round(min(1.0, max(0.0, figure)), 6) for figure in figures)
    return {"auroc": auroc, "interval": [least, most]}


def _describe_region(region: Region, num_images: int) -> str:
    """Return one or two lines on what counts as lung."""
    share = f"{region['share']:.0%} of the square on average"
    if region["kind"] == "ellipse":
        return f"lungs: a fixed ellipse around the thorax, {share} ({region['why']})"
    line = f"lungs: {region['why']}, {share}"
    if not region["left_out"]:
        return line
    classes = ", ".join(f"{name} {number}" for name, number in region["left_out_classes"].items())
    return (
        f"{line}\n{region['left_out']} of {num_images} images have no usable mask and are left out "
        f"of all four trainings ({classes})"
    )


def _says(content: BackgroundFile) -> list[str]:
    """Return the result in plain sentences, without figures of too few images."""
    classes = content["variants"]["images"]["classes"]
    few = [name for name, scores in classes.items() if scores["too_few"]]
    says = [] if len(few) == len(classes) else _says_of_scores(content)
    if few:
        left_out = "" if len(few) == len(classes) else ", and left out of the means"
        says.append(
            f"Fewer than {content['fewest']} test images with or without {', '.join(few)}: too few "
            f"to say{left_out}."
        )
    if content["region"]["kind"] == "masks":
        says.append(OUTLINE)
    return says


def _says_of_scores(content: BackgroundFile) -> list[str]:
    of = {name: content["variants"][name]["auroc"] for name in VARIANTS}
    if None in of.values():
        return ["An AUROC is not defined in test, so that there is nothing to say."]
    says = [
        f"AUROC without lungs {of['no_lungs']:.2f}, from grey values alone "
        f"{of['shuffled']:.2f}, from the whole images {of['images']:.2f} (0.5 is chance)."
    ]
    without, whole = (content["variants"][name]["classes"] for name in ("no_lungs", "images"))
    known = {name: own["auroc"] for name, own in without.items() if not own["too_few"]}
    if len(known) > 1:
        most = max(known, key=lambda name: known[name] or 0.0)
        says.append(
            f"Without lungs it is highest for {most}: {known[most]:.2f}, from the whole images "
            f"{whole[most]['auroc']:.2f}."
        )
    if estimate := content["estimate"]:
        low, high = estimate["interval"]
        says.append(f"{ESTIMATE}: {estimate['auroc']:.2f} ({low:.2f} to {high:.2f}).")
    return says


def summary(content: BackgroundFile) -> str:
    """Return the figures of the four trainings for the terminal."""
    rows, has_accuracy = [], content["task"] == "multiclass"
    for name, title in VARIANTS.items():
        scores = content["variants"][name]
        change = scores["difference"]
        rows.append(
            [
                title,
                _cell(scores["auroc"], scores["auroc_interval"]),
                "" if name == "images" else _cell(change["difference"], change["interval"]),
                *([_cell(scores["accuracy"], scores["accuracy_interval"])] * has_accuracy),
                *(_cell(own["auroc"], own["auroc_interval"]) for own in scores["classes"].values()),
            ]
        )
    headers = [
        *("Trained and tested on", "AUROC, mean", "Difference"),
        *(["Accuracy"] * has_accuracy),
        *(f"AUROC {name}" for name in content["classes"]),
    ]
    test = content["totals"]["test"]
    of = (
        f"test: {test['images']} images of {test['patients']} patients, over which the intervals "
        "are; another --seed trains other networks"
    )
    return "\n".join([table(rows, headers), of, *content["says"]])


def _cell(value: float | None, limits: Limits | None) -> str:
    """Return a figure with its interval below it."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f"\n{limits[0]:.3f} to {limits[1]:.3f}" if limits else "")
