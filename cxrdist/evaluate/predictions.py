"""Predictions: each sample of a split once, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.config import EvaluateConfig
from cxrdist.data.cache import Images, open_cache, read_rows
from cxrdist.data.folds import cut_fold
from cxrdist.data.gallery import write_gallery
from cxrdist.data.index import Index, read_index
from cxrdist.data.label_map import read_label_map
from cxrdist.distributed import finish, gather, start, together
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import (
    choose_calibration,
    describe_calibration,
    wanted_rule,
)
from cxrdist.evaluate.external import (
    Choices,
    External,
    as_model_takes,
    choose_place,
    find_overlap,
    read_choices,
    read_own,
    refuse_choices,
    refuse_other_set,
    summary,
    take_external,
    write_lists,
)
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.metrics import headline, metrics_table
from cxrdist.evaluate.mistakes import MOST_PICTURED, find_mistakes
from cxrdist.evaluate.operating_points import Rule, read_rule
from cxrdist.evaluate.scored import GROUP_COLUMNS, Scored, score_samples
from cxrdist.model.densenet import Classifier, save_calibration
from cxrdist.model.description import Calibration
from cxrdist.model.ensemble import Ensemble, load_predictor
from cxrdist.model.prediction import Predictions, probability_columns, to_probabilities
from cxrdist.run import RunDirectory, refuse_unwritable, sweep, write_json, write_table
from cxrdist.terminal import progress


@dataclass(frozen=True)
class Subject:
    """A trained model and the shards that it is used on, on this rank.

    Attributes:
        accelerator: of this rank.
        run: the run directory of the model.
        model: in evaluation mode, on the device; one network or an ensemble.
        index: the shards as the model takes them: of an external set, samples that are not used
            are in no split, and labels are the model's.
        images: uint8 [samples, size, size].
        place: of the results in the run directory.
        packed: the shards as they were packed; the same as `index` but for an external set.
        external: what is known of an external set; None for the run's own shards.
    """

    accelerator: Accelerator
    run: RunDirectory
    model: Classifier | Ensemble
    index: Index
    images: Images
    place: str
    packed: Index
    external: External | None = None


def open_subject(
    run: Path,
    shards: Path,
    cache: Path | None,
    split: str,
    name: str | None = None,
    choices: Choices | None = None,
) -> Subject:
    """Load a model and the images to use it on.

    Args:
        run: the run directory.
        shards: the run's own, or an external set.
        cache: directory of the decoded images.
        split: of the shards.
        name: of an external set; that of its directory if None.
        choices: how an external set is evaluated; as it was evaluated before if None.

    Raises:
        CxrdistError: there is no model, the shards are not whole, their task, classes or image
            size are not the model's, or they have no image in the split.
    """
    accelerator, directory = start(), RunDirectory(run)
    model = together(accelerator, lambda: load_predictor(run))

    def prepare() -> tuple[Index, str]:
        index = read_index(shards)
        place = choose_place(read_own(directory), index, split, name)
        if place == split:
            index = _splits_of_training(index, model, split)
        refuse_unlike(index, model, split)
        if place == split:
            _refuse_other_classes(index, model)
            refuse_choices(choices, shards)
        else:
            refuse_other_set(directory, place, index, split)
        return index, place

    index, place = together(accelerator, prepare)
    if place == split and not directory.info.is_file():
        accelerator.print(
            f"{run}: holds no run.json, so that nothing tells whether it was trained on {shards}; "
            "they count as its own, --name makes them an external set"
        )
    images = open_cache(index, cache, accelerator)
    subject = Subject(
        accelerator, directory, model.to(accelerator.device), index, images, place, index
    )
    if place == split:
        return subject
    external = _open_external(subject, split, choices, cache)
    return replace(subject, index=external.index, external=external)


def _open_external(
    subject: Subject, split: str, choices: Choices | None, cache: Path | None
) -> External:
    accelerator, run, place = subject.accelerator, subject.run, subject.place
    packed = subject.packed
    chosen = choices or together(accelerator, lambda: read_choices(run, place))
    mapped = together(
        accelerator, lambda: as_model_takes(packed, subject.model.classes, chosen.label_map)
    )
    numbers = np.array(mapped.numbers(split), dtype=np.int64)
    overlap = find_overlap(accelerator, run, packed, subject.images, numbers, cache)
    return together(
        accelerator, lambda: take_external(place, packed, mapped, split, chosen, overlap)
    )


def refuse_unlike(index: Index, model: Classifier | Ensemble, split: str) -> None:
    """Make sure that the model can take the images of a split."""
    shards = index.directory
    if index.task != model.task:
        raise CxrdistError(
            f"--shards {shards}: are {index.task}, the model is {model.task}; give shards like "
            "those that it was trained on"
        )
    if (index.image_size_px, index.fit) != (model.image_size_px, model.fit):
        raise CxrdistError(
            f"--shards {shards}: have images of {index.image_size_px} px (--fit {index.fit}), the "
            f"model was trained at {model.image_size_px} px (--fit {model.fit}); pack with --size "
            f"{model.image_size_px} --fit {model.fit}"
        )
    if index.lungs_only != model.lungs_only:
        kinds = {True: "of the lungs only", False: "of whole images"}
        raise CxrdistError(
            f"--shards {shards}: are {kinds[index.lungs_only]}, the model was trained on shards "
            f"{kinds[model.lungs_only]}; pack {'with' if model.lungs_only else 'without'} "
            "--lungs-only"
        )
    if not index.numbers(split):
        there = [name for name, counts in index.totals().items() if counts["images"]]
        raise CxrdistError(
            f"--split {split}: --shards {shards} have no images in it, only in "
            f"{' and '.join(there)}; choose another split"
        )


def _refuse_other_classes(index: Index, model: Classifier | Ensemble) -> None:
    if index.classes != model.classes:
        raise CxrdistError(
            f"--shards {index.directory}: have the classes {', '.join(index.classes)}, the model "
            f"{', '.join(model.classes)}; give shards of the model's classes"
        )


def _splits_of_training(index: Index, model: Classifier | Ensemble, split: str) -> Index:
    """Cut train and val as the model's training did.

    Raises:
        CxrdistError: the members of an ensemble have different ones, and one of them is asked for.
    """
    if not isinstance(model, Ensemble):
        return cut_fold(index, model.fold)
    if model.has_folds and split != "test":
        raise CxrdistError(
            f"--split {split}: each member of this ensemble was trained on other parts of train "
            f"and val; evaluate test, or the fold of a member with --run RUN/{model.names[0]}"
        )
    return index


def evaluate(config: EvaluateConfig) -> None:
    """Predict a split, write predictions.csv and metrics.json, and print the paper's Table 2.

    Shards that are not the run's own are an external set with a place of its own; what of it the
    network has seen is named in seen.csv and left out, or marked (``seen``).

    Raises:
        CxrdistError: run, shards or split cannot be used.
    """
    rule = read_rule(config.operating_point) if config.operating_point else None
    labels = {} if config.label_map is None else read_label_map(config.label_map)
    choices = Choices(labels, config.seen)
    subject = open_subject(
        config.run, config.shards, config.cache, config.split, config.name, choices
    )
    accelerator, place = subject.accelerator, subject.place
    together(accelerator, lambda: refuse_unwritable(subject.run.predictions(place)))
    calibration = _calibrate(subject, config, rule)
    numbers = np.array(subject.index.numbers(config.split), dtype=np.int64)
    rows = predict_split(subject, numbers, config.batch_size)
    if accelerator.is_main_process:
        logits = in_order(rows, numbers)
        sweep(subject.run.metrics(place).parent)
        write_predictions(subject, numbers, logits)
        settings = Settings(config.fewest, config.prevalence, calibration)
        scored = score_samples(subject.index, numbers, logits)
        metrics = measure(scored, settings)
        picture_mistakes(subject, scored, numbers)
        metrics["split"], metrics["index_sha256"] = config.split, subject.index.sha256
        if subject.external is not None:
            metrics["external"] = subject.external.info
            write_lists(subject.run, place, subject.external)
            print(summary(subject.external.info))
        write_json(subject.run.metrics(place), metrics)
        print(metrics_table(metrics))
        print(describe_calibration(metrics))
        print(f"{place}: {headline(metrics)}")
    finish(accelerator)


def _calibrate(subject: Subject, config: EvaluateConfig, rule: Rule | None) -> Calibration | None:
    """Give the model its temperatures and thresholds, as far as its own shards are given.

    Returns:
        Those of the model; None if its own validation split was not evaluated yet.

    Raises:
        CxrdistError: another rule is wished for, and the shards are not the model's.
    """
    index, stored = subject.index, subject.model.calibration
    has_val = not (isinstance(subject.model, Ensemble) and subject.model.has_folds)
    is_own = subject.external is None and subject.run.info.is_file() and has_val
    wanted = together(
        subject.accelerator,
        lambda: wanted_rule(stored, rule, config.fewest, index.sha256 if is_own else None),
    )
    if wanted is not None:
        numbers = np.array(index.numbers("val"), dtype=np.int64)
        logits = in_order(predict_split(subject, numbers, config.batch_size), numbers)
        scored = score_samples(index, numbers, logits)
        subject.model.calibration = choose_calibration(scored, wanted, config.fewest, index.sha256)
        if subject.accelerator.is_main_process:
            save_calibration(subject.model.calibration, subject.run.model)
    return subject.model.calibration


def rank_batches(
    numbers: NDArray[np.int64], batch_size: int, accelerator: Accelerator
) -> Iterator[NDArray[np.int64]]:
    """Cut batches before ranks are known, and give each rank whole ones.

    So each batch, and with it each result, is the same for any number of ranks; a rank may get
    fewer or none.
    """
    starts = range(0, len(numbers), batch_size)
    for begin in starts[accelerator.process_index :: accelerator.num_processes]:
        yield numbers[begin : begin + batch_size]


@torch.inference_mode()
def predict_split(
    subject: Subject, numbers: NDArray[np.int64], batch_size: int
) -> list[tuple[int, NDArray[np.float32]]]:
    """Return the logits of some samples, gathered from all ranks; in float32 for any launch.

    Returns:
        (sample number, float32 [classes]) of each, in no promised order, on every rank.
    """
    accelerator, mine = subject.accelerator, []
    batches = list(rank_batches(numbers, batch_size, accelerator))
    total = sum(map(len, batches))
    with progress(total, "predicting", "images", show=accelerator.is_main_process) as bar:
        for batch in batches:
            images = read_rows(subject.images, batch, accelerator.device)
            logits = subject.model(images).cpu().numpy()
            mine += list(zip(batch.tolist(), logits, strict=True))
            bar.update(len(batch))
    return gather(accelerator, mine)


def in_order(
    rows: list[tuple[int, NDArray[np.float32]]], numbers: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the logits in the order of the samples; each must be there once.

    Raises:
        CxrdistError: a sample is missing or was predicted twice.
    """
    by_number = dict(rows)
    if len(rows) != len(by_number) or by_number.keys() != set(numbers.tolist()):
        raise CxrdistError(
            f"predicted {len(rows)} rows of {len(by_number)} samples, the split has "
            f"{len(numbers)}; launch all ranks with the same shards"
        )
    return np.stack([by_number[number] for number in numbers.tolist()])


def write_predictions(
    subject: Subject, numbers: NDArray[np.int64], logits: NDArray[np.float32]
) -> None:
    """Write predictions.csv: key, patient, label, prob_CLASS..., logit_CLASS...

    Its rows are the images that are scored. After label stand uncertain and missing where labels of
    the shards are not known, then source, view, sex and age where they say something, and ``seen``
    (`Match.why` or nothing) where images that the network has seen are scored too. After the logits
    stand the columns of a calibrated model. Nine significant digits each: a logit, float32, is read
    back exactly.
    """
    classes = subject.index.classes
    names = [f"{what}_{name}" for what in ("prob", "logit") for name in classes]
    calibration = subject.model.calibration
    more = probability_columns(Predictions(logits, classes, subject.index.task, calibration))
    has_unknown = any(sample.uncertain or sample.missing for sample in subject.index.samples)
    unknown = ["uncertain", "missing"] if has_unknown else []
    samples = [subject.index.samples[number] for number in numbers]
    groups = [name for name in GROUP_COLUMNS if any(getattr(s, name) for s in samples)]
    about = ["key", "patient", "label", *unknown, *groups]
    external = subject.external
    matches = external.matches if external and external.info["seen"] == "report" else None
    rows = []
    numbers_of = np.column_stack([to_probabilities(logits), logits, *more.values()])
    for number, sample, values in zip(numbers.tolist(), samples, numbers_of, strict=True):
        cells = [getattr(sample, column) for column in about]
        if matches is not None:
            cells.append(matches[number].why if number in matches else "")
        rows.append([*cells, *(f"{value:.9g}" for value in values)])
    seen = [] if matches is None else ["seen"]
    write_table(subject.run.predictions(subject.place), [*about, *seen, *names, *more], rows)


def picture_mistakes(subject: Subject, scored: Scored, numbers: NDArray[np.int64]) -> None:
    """Write the X-rays of the surest mistakes for the report, which has no shards.

    Args:
        subject: the model and the shards.
        scored: N images of an evaluation.
        numbers: of the samples, int64 [N].
    """
    calibration = subject.model.calibration
    found = find_mistakes(scored, calibration.thresholds if calibration else None)
    pictured = [int(numbers[mistake.place]) for mistake in found[:MOST_PICTURED]]
    directory = subject.run.mistakes(subject.place)
    write_gallery(directory, subject.index, subject.images, pictured)
