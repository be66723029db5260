"""Predictions of a split: each sample once, on any number of ranks."""

from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from cxrdist.config import EvaluateConfig
from cxrdist.data.cache import read_rows
from cxrdist.data.gallery import write_gallery
from cxrdist.data.label_map import read_label_map
from cxrdist.distributed import finish, gather, together
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.calibration import choose_calibration, describe_calibration, rule_to_apply
from cxrdist.evaluate.external import Choices, summary, write_lists
from cxrdist.evaluate.loaded_run import LoadedRun, OpenedRun, load_images, open_run_on, writing
from cxrdist.evaluate.measure import Settings, measure
from cxrdist.evaluate.metrics import headline, metrics_table
from cxrdist.evaluate.mistakes import MOST_PICTURED, find_mistakes
from cxrdist.evaluate.operating_points import Rule, read_rule
from cxrdist.evaluate.scored import GROUP_COLUMNS, Scored, score_samples
from cxrdist.files import write_json, write_table
from cxrdist.model.densenet import save_calibration
from cxrdist.model.description import Calibration
from cxrdist.model.ensemble import Ensemble
from cxrdist.model.prediction import Predictions, probability_columns, to_probabilities
from cxrdist.terminal import progress


def evaluate(config: EvaluateConfig) -> None:
    """Predict a split, write predictions.csv and metrics.json, and print the paper's Table 2.

    Shards that are not the run's own are an external set with its own results; images that the
    network has seen are listed in seen.csv and left out, or marked (``seen``).

    Raises:
        CxrdistError: run, shards or split cannot be used.
    """
    rule = read_rule(config.operating_point) if config.operating_point else None
    labels = {} if config.label_map is None else read_label_map(config.label_map)
    choices = Choices(labels, config.seen)
    opened = open_run_on(config.run, config.shards, config.split, config.name, choices)
    # Entered before images are decoded and predicted, which takes long, so that it fails early.
    with writing(opened, opened.run.predictions, opened.run.mistakes):
        _evaluate(config, opened, rule)


def _evaluate(config: EvaluateConfig, opened: OpenedRun, rule: Rule | None) -> None:
    accelerator, subset = opened.accelerator, opened.subset
    loaded = load_images(opened, config.cache)
    calibration = _calibrate(loaded, config, rule)
    numbers = np.array(loaded.index.numbers(config.split), dtype=np.int64)
    rows = predict_split(loaded, numbers, config.batch_size)
    if accelerator.is_main_process:
        logits = in_order(rows, numbers)
        write_predictions(loaded, numbers, logits)
        settings = Settings(config.fewest, config.prevalence, calibration)
        scored = score_samples(loaded.index, numbers, logits)
        metrics = measure(scored, settings)
        picture_mistakes(loaded, scored, numbers)
        metrics["split"], metrics["index_sha256"] = config.split, loaded.index.sha256
        if loaded.external is not None:
            metrics["external"] = loaded.external.info
            write_lists(loaded.run, subset, loaded.external)
            print(summary(loaded.external.info))
        # The last file: other commands consider a subset with a metrics.json as evaluated.
        write_json(loaded.run.metrics(subset), metrics)
        print(metrics_table(metrics))
        print(describe_calibration(metrics))
        print(f"{subset}: {headline(metrics)}")
    finish(accelerator)


def _calibrate(loaded: LoadedRun, config: EvaluateConfig, rule: Rule | None) -> Calibration | None:
    """Set the model's temperatures and thresholds if the shards are its own.

    Returns:
        The model's calibration; None if its own validation split was not evaluated yet.
    """
    index, stored = loaded.index, loaded.model.calibration
    has_val = not (isinstance(loaded.model, Ensemble) and loaded.model.has_folds)
    is_own = loaded.external is None and loaded.run.info.is_file() and has_val
    wanted = together(
        loaded.accelerator,
        lambda: rule_to_apply(stored, rule, config.fewest, index.sha256 if is_own else None),
    )
    if wanted is not None:
        numbers = np.array(index.numbers("val"), dtype=np.int64)
        logits = in_order(predict_split(loaded, numbers, config.batch_size), numbers)
        scored = score_samples(index, numbers, logits)
        loaded.model.calibration = choose_calibration(scored, wanted, config.fewest, index.sha256)
        if loaded.accelerator.is_main_process:
            save_calibration(loaded.model.calibration, loaded.run.model)
    return loaded.model.calibration


def rank_batches(
    numbers: NDArray[np.int64], batch_size: int, accelerator: Accelerator
) -> Iterator[NDArray[np.int64]]:
    """Yield this rank's batches; the batches do not depend on the number of ranks.

    Results depend slightly on the images in a batch, so splitting the samples among ranks first
    would change them with the number of ranks. A rank may get fewer batches than others, or none.
    """
    starts = range(0, len(numbers), batch_size)
    for begin in starts[accelerator.process_index :: accelerator.num_processes]:
        yield numbers[begin : begin + batch_size]


@torch.inference_mode()
def predict_split(
    loaded: LoadedRun, numbers: NDArray[np.int64], batch_size: int
) -> list[tuple[int, NDArray[np.float32]]]:
    """Return the logits of samples, gathered from all ranks; in float32 for any launch.

    Returns:
        (sample number, float32 [classes]) per sample, in any order, on every rank.
    """
    accelerator, mine = loaded.accelerator, []
    batches = list(rank_batches(numbers, batch_size, accelerator))
    total = sum(map(len, batches))
    with progress(total, "predicting", "images", show=accelerator.is_main_process) as bar:
        for batch in batches:
            images = read_rows(loaded.images, batch, accelerator.device)
            logits = loaded.model(images).cpu().numpy()
            mine += list(zip(batch.tolist(), logits, strict=True))
            bar.update(len(batch))
    return gather(accelerator, mine)


def in_order(
    rows: list[tuple[int, NDArray[np.float32]]], numbers: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the logits in the order of the samples; each must be present exactly once.

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
    loaded: LoadedRun, numbers: NDArray[np.int64], logits: NDArray[np.float32]
) -> None:
    """Write predictions.csv: key, patient, label, prob_CLASS..., logit_CLASS...

    There is one row per scored image. After label come uncertain and missing if the shards have
    unknown labels, then those of source, view, sex and age that are known, and ``seen``
    (`Match.why` or empty) if images that the network has seen are scored too. After the logits
    come the columns of a calibrated model. Numbers have nine significant digits, so a float32 logit
    is read back exactly.
    """
    classes = loaded.index.classes
    names = [f"{what}_{name}" for what in ("prob", "logit") for name in classes]
    calibration = loaded.model.calibration
    extra = probability_columns(Predictions(logits, classes, loaded.index.task, calibration))
    # Of all splits, so that each split has the same columns.
    has_unknown = any(sample.uncertain or sample.missing for sample in loaded.index.samples)
    unknown = ["uncertain", "missing"] if has_unknown else []
    samples = [loaded.index.samples[number] for number in numbers]
    groups = [name for name in GROUP_COLUMNS if any(getattr(s, name) for s in samples)]
    columns = ["key", "patient", "label", *unknown, *groups]
    external = loaded.external
    matches = external.matches if external and external.info["seen"] == "report" else None
    rows = []
    values_of_rows = np.column_stack([to_probabilities(logits), logits, *extra.values()])
    for number, sample, values in zip(numbers.tolist(), samples, values_of_rows, strict=True):
        cells = [getattr(sample, column) for column in columns]
        if matches is not None:
            cells.append(matches[number].why if number in matches else "")
        rows.append([*cells, *(f"{value:.9g}" for value in values)])
    seen = [] if matches is None else ["seen"]
    write_table(loaded.run.predictions(loaded.subset), [*columns, *seen, *names, *extra], rows)


def picture_mistakes(loaded: LoadedRun, scored: Scored, numbers: NDArray[np.int64]) -> None:
    """Write the X-rays of the most confident mistakes for the report, which has no shards.

    The N scored images are the samples with these numbers, int64 [N].
    """
    calibration = loaded.model.calibration
    mistakes = find_mistakes(scored, calibration.thresholds if calibration else None)
    pictured = [int(numbers[mistake.position]) for mistake in mistakes[:MOST_PICTURED]]
    directory = loaded.run.mistakes(loaded.subset)
    write_gallery(directory, loaded.index, loaded.images, pictured)
