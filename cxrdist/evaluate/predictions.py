"""Predictions: each sample of a split once, on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.config import EvaluateConfig
from cxrdist.data.cache import Images, open_cache, read_rows
from cxrdist.data.folds import cut_fold
from cxrdist.data.index import Index, read_index
from cxrdist.distributed import finish, gather, start, together
from cxrdist.errors import CxrdistError, refuse_below_one
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.metrics import headline, metrics_table, to_probabilities
from cxrdist.evaluate.scored import GROUP_COLUMNS, score_samples
from cxrdist.model.densenet import Classifier
from cxrdist.model.ensemble import Ensemble, load_predictor
from cxrdist.run import RunDirectory, refuse_unwritable, sweep, write_json, write_table
from cxrdist.terminal import progress


@dataclass(frozen=True)
class Subject:
    """A trained model and the shards that it is used on, on this rank.

    Attributes:
        accelerator: of this rank.
        run: the run directory of the model.
        model: in evaluation mode, on the device; one network or an ensemble.
        index: the shards.
        images: uint8 [samples, size, size].
    """

    accelerator: Accelerator
    run: RunDirectory
    model: Classifier | Ensemble
    index: Index
    images: Images


def open_subject(run: Path, shards: Path, cache: Path | None, split: str) -> Subject:
    """Load a model and the images to use it on.

    Raises:
        CxrdistError: there is no model, the shards are not whole, their task, classes or image
            size are not the model's, or they have no image in the split.
    """
    accelerator = start()
    model = together(accelerator, lambda: load_predictor(run))
    index = together(accelerator, lambda: _matching_index(shards, model, split))
    images = open_cache(index, cache, accelerator)
    return Subject(accelerator, RunDirectory(run), model.to(accelerator.device), index, images)


def _matching_index(shards: Path, model: Classifier | Ensemble, split: str) -> Index:
    index = _splits_of_training(read_index(shards), model, split)
    if index.classes != model.classes:
        raise CxrdistError(
            f"--shards {shards}: have the classes {', '.join(index.classes)}, the model "
            f"{', '.join(model.classes)}; give shards of the model's classes"
        )
    if index.task != model.task:
        raise CxrdistError(
            f"--shards {shards}: are {index.task}, the model is {model.task}; give shards like "
            "those that it was trained on"
        )
    if index.image_size_px != model.image_size_px:
        raise CxrdistError(
            f"--shards {shards}: have images of {index.image_size_px} px, the model was trained "
            f"at {model.image_size_px} px; pack with --size {model.image_size_px}"
        )
    if not index.numbers(split):
        there = [name for name, counts in index.totals().items() if counts["images"]]
        raise CxrdistError(
            f"--split {split}: --shards {shards} have no images in it, only in "
            f"{' and '.join(there)}; choose another split"
        )
    return index


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

    Raises:
        CxrdistError: run, shards or split cannot be used.
    """
    refuse_below_one(config, "batch_size")
    subject = open_subject(config.run, config.shards, config.cache, config.split)
    together(subject.accelerator, lambda: refuse_unwritable(subject.run.predictions(config.split)))
    numbers = np.array(subject.index.numbers(config.split), dtype=np.int64)
    rows = predict_split(subject, numbers, config.batch_size)
    accelerator = subject.accelerator
    if accelerator.is_main_process:
        logits = in_order(rows, numbers)
        sweep(subject.run.metrics(config.split).parent)
        write_predictions(subject, config.split, numbers, logits)
        settings = Settings(config.fewest, config.prevalence, subject.model.calibration)
        metrics = measure(score_samples(subject.index, numbers, logits), settings)
        metrics |= {"split": config.split, "index_sha256": subject.index.sha256}
        write_json(subject.run.metrics(config.split), metrics)
        print(metrics_table(metrics))
        print(f"{config.split}: {headline(metrics)}")
    finish(accelerator)


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
    """Logits of some samples, gathered from all ranks; in float32 for any launch.

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
    """Logits in the order of the samples; each must be there once.

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
    subject: Subject, split: str, numbers: NDArray[np.int64], logits: NDArray[np.float32]
) -> None:
    """Write predictions.csv: key, patient, label, prob_CLASS..., logit_CLASS...

    After label stand uncertain and missing where labels of the shards are not known, then source,
    view, sex and age where they say something. Nine significant digits each: a logit, float32, is
    read back exactly.
    """
    names = [f"{what}_{name}" for what in ("prob", "logit") for name in subject.index.classes]
    has_unknown = any(sample.uncertain or sample.missing for sample in subject.index.samples)
    unknown = ["uncertain", "missing"] if has_unknown else []
    samples = [subject.index.samples[number] for number in numbers]
    groups = [name for name in GROUP_COLUMNS if any(getattr(s, name) for s in samples)]
    about = ["key", "patient", "label", *unknown, *groups]
    rows = []
    for sample, values in zip(samples, np.hstack([to_probabilities(logits), logits]), strict=True):
        cells = [getattr(sample, column) for column in about]
        rows.append([*cells, *(f"{value:.9g}" for value in values)])
    write_table(subject.run.predictions(split), [*about, *names], rows)
