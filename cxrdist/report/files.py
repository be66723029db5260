"""Readers of a run's files for the report; each file is checked completely before use."""

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from cxrdist.data.records import SPLITS
from cxrdist.documents import Between, Real, typed
from cxrdist.errors import CxrdistError, RunFailedError, failure_of
from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.scored import MEND
from cxrdist.explain.description import RelevanceInfo, read_description
from cxrdist.files import MEND_OPTIONAL, finite, open_table, read_document, read_log, read_recipe
from cxrdist.info import RunInfo, origins
from cxrdist.model.description import Calibration
from cxrdist.report.values import COUNTS, MEASURES
from cxrdist.run import RunDirectory

MOST_EPOCHS = 100_000  # of all stages
NEEDED = {
    "multiclass": ("accuracy", "confusion_matrix"),
    "multilabel": ("threshold", "macro_labels"),
}
"""Members of metrics.json that only one task has."""


@dataclass(frozen=True)
class Explanation:
    """One row of relevance.csv: ``logit = pixels + bias + epsilon``, all in logit units.

    `bias` and `epsilon` are None for rules without a ledger.
    """

    key: str
    target: str
    """The explained class."""
    logit: float
    pixels: float
    bias: float | None
    epsilon: float | None
    picture: Path | None
    """The heat map; None if none was written."""
    is_contrast: bool = False
    """Whether the target is one class minus another."""


@contextmanager
def reading(path: Path, command: str) -> Iterator[None]:
    """Turn any error while reading a file into one line that names the command to repeat.

    Raises:
        CxrdistError: the file is not what the command writes.
        RunFailedError: there is no permission to read it.
    """
    try:
        yield
    except (CxrdistError, RunFailedError):
        raise
    except OSError as error:
        raise failure_of(error, path) or error from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        problem = f"misses {error}" if isinstance(error, KeyError) else str(error)
        problem = " ".join(problem.split())[:300]
        raise CxrdistError(
            f"{path}: expected what `cxrdist {command}` writes, but: {problem}; "
            f"run `cxrdist {command}` again"
        ) from error


def weights_chain(info: RunInfo) -> list[dict[str, object]]:
    """List the weights that a run derives from, the oldest first.

    Returns:
        For each: source, sha256, layout, labels, tensors, trained_on; None where unknown.
    """
    names = ("source", "sha256", "layout", "labels", "tensors", "trained_on")
    return [{name: link.get(name) for name in names} for link in origins(info["weights"])][::-1]


class Recipe(NamedTuple):
    """The resolved recipe of a run."""

    text: str
    """The text of the file."""
    stages: list[str]
    """Names of the stages, in order."""
    uncertain: str
    """What uncertain labels count as in training."""
    content: Mapping[str, Any]
    """All of it; `augmentation` and `copies` are objects or missing."""


def read_resolved(path: Path) -> Recipe | None:
    """Read the resolved recipe; None if there is none."""
    if not path.is_file():
        return None
    text, recipe = read_recipe(path, MEND_OPTIONAL)
    with reading(path, "train"):
        stages = typed(recipe.get("stages") or {}, dict[str, object])
        uncertain = typed(recipe.get("uncertain", "ignore"), str)
        for name in ("augmentation", "copies"):
            typed(recipe.get(name) or {}, dict[str, object], name)
        return Recipe(text, list(stages), uncertain, recipe)


class EpochRow(TypedDict):
    """A log row of an epoch; epoch 0 is the start of a stage, before training."""

    stage: str
    epoch: Annotated[int, Between(0, MOST_EPOCHS)]
    val_loss: Real | None
    val_accuracy: NotRequired[Real | None]
    val_auroc: NotRequired[Real | None]
    loss: NotRequired[Real | None]
    background: NotRequired[Real]
    val_background: NotRequired[Real]
    images_per_second: NotRequired[Real | None]
    seconds: NotRequired[Real | None]


class SpeedRow(TypedDict):
    """A log row of the speed of an epoch."""

    stage: str
    epoch: int
    images_per_second: Real | None
    seconds: Real


class Epoch(TypedDict):
    """The numbers of an epoch, NaN where undefined or missing."""

    epoch: int
    val_score: float
    """The validation score of the task."""
    loss: float
    val_loss: float
    background: float
    val_background: float
    images_per_second: float
    seconds: float


def read_epochs(path: Path, task: str) -> dict[str, list[Epoch]]:
    """Read the epochs of each stage from the log; of repeated epochs the last one counts.

    Raises:
        CxrdistError: the log is damaged.
    """
    if not path.is_file():
        return {}
    epochs: dict[str, dict[int, Epoch]] = {}
    with reading(path, "train"):
        for row in read_log(path):
            if row.get("kind") == "speed":
                speed = typed(row, SpeedRow)
                # The row of the epoch itself comes before; a KeyError means a damaged log.
                epoch = epochs[speed["stage"]][speed["epoch"]]
                per_second = speed["images_per_second"]
                epoch["images_per_second"] = math.nan if per_second is None else per_second
                epoch["seconds"] = speed["seconds"]
            elif row.get("kind") == "epoch":
                logged = typed(row, EpochRow)
                epochs.setdefault(logged["stage"], {})[logged["epoch"]] = _numbers(logged, task)
                if sum(map(len, epochs.values())) > MOST_EPOCHS:
                    raise ValueError(f"it has more than {MOST_EPOCHS} epochs")
    return {stage: [rows[epoch] for epoch in sorted(rows)] for stage, rows in epochs.items()}


def _numbers(row: EpochRow, task: str) -> Epoch:
    score = row["val_auroc"] if task == "multilabel" else row["val_accuracy"]
    values: dict[str, Any] = {**row, "val_score": score}
    numbers = {name: values.get(name) for name in Epoch.__annotations__}
    return cast(Epoch, {n: math.nan if v is None else v for n, v in numbers.items()})


def read_metrics(path: Path, task: str) -> Metrics | None:
    """Read the metrics of a split; None if it was not evaluated.

    Raises:
        CxrdistError: metrics.json is damaged, or has another task than the run.
    """
    if not path.is_file():
        return None
    metrics = read_document(path, Metrics, MEND)
    with reading(path, "evaluate"):
        if metrics["task"] != task:
            raise ValueError(f"its task is {metrics['task']}, that of the run is {task}")
        if lacking := [name for name in NEEDED[task] if name not in metrics]:
            raise ValueError(f"{lacking[0]} is missing")
        if task == "multiclass":
            _check_confusion(metrics)
        _check_scores(metrics)
    return metrics


def _check_scores(metrics: Metrics) -> None:
    """Check that all classes and means have the same scores, and all classes the same counts.

    Older versions wrote fewer scores and counts, but the same ones for each class.
    """
    classes, several = list(metrics["classes"].values()), metrics["task"] == "multilabel"
    scores = MEASURES[metrics["task"]].keys() & metrics["macro"].keys()
    if several and ("average_precision" not in scores or scores - metrics["macro_labels"].keys()):
        raise ValueError(f"macro and macro_labels need {', '.join(MEASURES['multilabel'])}")
    counts = {name for names in COUNTS.values() for name in names} & classes[0].keys()
    counts |= {"positives"} if several else set()
    if any((scores | counts) - values.keys() for values in classes):
        raise ValueError(f"each class needs {', '.join(sorted(scores | counts))}")
    if scores - metrics.get("macro_enough", metrics["macro"]).keys():
        raise ValueError(f"macro_enough needs {', '.join(sorted(scores))}")


def _check_confusion(metrics: Metrics) -> None:
    confusion = np.array(metrics["confusion_matrix"], dtype=np.int64)
    side = len(metrics["classes"])
    if confusion.shape != (side, side) or confusion.sum() != metrics["samples"]:
        raise ValueError(
            f"the confusion matrix does not hold {metrics['samples']} samples of {side} classes"
        )


class _Calibrated(TypedDict):
    """The calibration in model.json of a network or an ensemble."""

    calibration: NotRequired[Calibration | None]


def read_calibration(run: RunDirectory) -> Calibration | None:
    """Read temperatures and thresholds from model.json; None if there are none yet.

    Raises:
        CxrdistError: model.json is damaged.
    """
    path = run.model / "model.json"
    if not path.is_file():
        return None
    return read_document(path, _Calibrated).get("calibration")


def read_relevance(
    run: RunDirectory, split: str, classes: Collection[str] | None
) -> dict[str, list[Explanation]] | None:
    """Read relevance.csv of a split by key, in the order of the file; None if not explained.

    Targets that are not among the model's `classes` are contrasts; if these are None, no target is.
    """
    path = run.relevance_table(split)
    if not path.is_file():
        return None
    by_key: dict[str, list[Explanation]] = {}
    with reading(path, "explain"), open_table(path) as (_, rows):
        for row in rows:
            logit, pixels = (finite(row[name]) for name in ("logit", "relevance_sum"))
            shares = [row[name] for name in ("bias_share", "epsilon_share")]
            # Rules without a ledger leave both cells empty; if only one is, `finite` raises.
            bias, epsilon = (finite(text) if any(shares) else None for text in shares)
            picture = within(run.heatmaps(split), row["picture"]) if row["picture"] else None
            explanation = Explanation(
                row["key"],
                row["class"],
                logit,
                pixels,
                bias,
                epsilon,
                picture,
                classes is not None and row["class"] not in classes,
            )
            by_key.setdefault(row["key"], []).append(explanation)
    return by_key


def read_tests(run: RunDirectory, split: str) -> RelevanceInfo | None:
    """Read relevance.json of a split: how the maps were made and tested, and where they point.

    Returns:
        None if there is none, or explain has not finished.

    Raises:
        CxrdistError: relevance.json is damaged.
    """
    path = run.relevance_info(split)
    if not path.is_file():
        return None
    info = read_description(path, "run `cxrdist explain` again")
    flipping = info["pixel_flipping"]
    if flipping is None:
        return None
    if len(flipping["relevant_first"]) != len(flipping["random_order"]):
        raise CxrdistError(
            f"{path}: the curves of pixel_flipping have different lengths; "
            "run `cxrdist explain` again"
        )
    return info


def within(directory: Path, name: str) -> Path:
    """Return the path of a file in a directory.

    Raises:
        ValueError: the name leads out of the directory.
    """
    if Path(name).name != name or name == ".." or (directory / name).is_symlink():
        raise ValueError(f"{name!r} is not the name of a file in {directory.name}/")
    return directory / name


def known_splits(root: Path) -> list[str]:
    """List the evaluated or explained subsets: splits, test first, then external sets."""
    splits = {*subsets_with(root, "metrics.json"), *subsets_with(root, "relevance.csv")}
    rank = {split: i for i, split in enumerate(reversed(SPLITS))}
    return sorted(splits, key=lambda split: (rank.get(split, len(rank)), split))


def subsets_with(root: Path, name: str) -> list[str]:
    """List the subsets of a run that have a file of this name, in alphabetical order."""
    files = [file for pattern in ("*", "external/*") for file in root.glob(f"{pattern}/{name}")]
    return sorted(file.parent.relative_to(root).as_posix() for file in files)
