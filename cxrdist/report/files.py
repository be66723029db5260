"""The files of a run as the report reads them: each is checked whole, so that the page is sound."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cxrdist.data.records import SPLITS, labels_of
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.metrics import predicted_classes
from cxrdist.report.values import MEASURES, count, moment, number, rate
from cxrdist.run import RUN_FORMAT, RunDirectory


@dataclass(frozen=True)
class Sample:
    """One row of predictions.csv."""

    key: str
    label: str
    """The truth; of several labels with ``|`` between them, empty for none."""
    probabilities: dict[str, float]
    """By class, 0 to 1; for display only."""
    logits: dict[str, float]
    """By class; what is predicted, and how surely, is read from these."""
    task: str = "multiclass"
    """multiclass or multilabel."""

    @property
    def labels(self) -> list[str]:
        """The truth as a list."""
        return labels_of(self.label)

    @property
    def predicted(self) -> list[str]:
        """The predicted class, or all predicted labels, by the rule of `evaluate`."""
        return predicted_classes(list(self.logits.values()), list(self.logits), self.task)

    @property
    def is_right(self) -> bool:
        """Whether the predicted class is the truth."""
        return self.predicted == self.labels

    @property
    def confidence(self) -> float:
        """The largest logit."""
        return max(self.logits.values())


@dataclass(frozen=True)
class Explanation:
    """One row of relevance.csv: ``logit = pixels + bias + epsilon``, all in logit units.

    Rules that keep no ledger leave the two shares empty.
    """

    key: str
    target: str
    """The class that is explained."""
    logit: float
    pixels: float
    bias: float | None
    epsilon: float | None
    picture: Path | None
    """The heat map; None where none was written."""


@contextmanager
def reading(path: Path, command: str) -> Iterator[None]:
    """Turn whatever is wrong with a file into one line with the command that writes it.

    Raises:
        CxrdistError: the file cannot be read or does not hold what the command writes.
    """
    try:
        yield
    except CxrdistError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        problem = f"misses {error}" if isinstance(error, KeyError) else str(error)
        problem = " ".join(problem.split())
        raise CxrdistError(
            f"{path}: expected what `cxrdist {command}` writes, but: {problem}; "
            f"run `cxrdist {command}` again"
        ) from error


def read_info(run: RunDirectory) -> dict[str, Any]:
    """Read run.json.

    Raises:
        CxrdistError: there is none, or it is not one of this format.
    """
    if not run.info.is_file():
        raise CxrdistError(
            f"--run {run.root}: holds no run.json; give the directory of a `cxrdist train`"
        )
    with reading(run.info, "train"):
        info = json.loads(run.info.read_text(encoding="utf-8"))
        if info["format"] != RUN_FORMAT:
            raise ValueError(f"format is {info['format']!r} and not {RUN_FORMAT!r}")
        shards = info["shards"]
        for name in ("index_sha256", "image_size_px", "split"):
            shards[name]
        MEASURES[shards["task"]]
        for classes in shards["counts"].values():
            for name in shards["classes"]:
                count(classes[name]["images"]), count(classes[name]["patients"])
        for total in shards["totals"].values():
            count(total["images"]), count(total["patients"])
        for name in ("world_size", "device", "mixed_precision", "git_revision"):
            info[name]
        dict(info["versions"]), info["weights"]["source"], dict(info["stages"])
        moment(info["started"]), moment(info["finished"])
    return dict(info)


def weights_chain(path: Path, info: dict[str, Any]) -> list[dict[str, Any]]:
    """List what a run's weights were made from, the first one first.

    Args:
        path: run.json, for the error line.
        info: what it holds.

    Returns:
        For each: source, sha256, layout, labels, tensors, trained_on; None for what is not known.
    """
    names = ("source", "sha256", "layout", "labels", "tensors", "trained_on")
    chain = []
    with reading(path, "train"):
        link = info["weights"]
        while link:
            chain.append({name: link.get(name) for name in names})
            list(chain[-1]["labels"] or []), dict(chain[-1]["trained_on"] or {})
            link = link.get("started_from")
    return chain[::-1]


def read_recipe(path: Path) -> tuple[str, list[str]] | None:
    """Read the resolved recipe.

    Returns:
        The text as it stands and the names of the stages in order; None if there is no recipe.
    """
    if not path.is_file():
        return None
    with reading(path, "train"):
        text = path.read_text(encoding="utf-8")
        return text, [str(name) for name in yaml.safe_load(text).get("stages") or {}]


def read_epochs(path: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """Read the epochs of each stage from the log, those that were done twice as done last.

    A last line without an end was cut off when the run was killed; it is left out. ``val_score``
    is the validation score of the task.
    """
    if not path.is_file():
        return {}
    epochs: dict[str, dict[int, dict[str, Any]]] = {}
    with reading(path, "train"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            if row.get("kind") == "speed":
                epochs[row["stage"]][int(row["epoch"])] |= {
                    name: float(row[name]) for name in ("images_per_second", "seconds")
                }
            if row.get("kind") != "epoch":
                continue
            # What a stage begins with is its epoch 0, which has trained nothing.
            row = {"loss": None, "images_per_second": None, "seconds": None, **row}
            row["val_score"] = row["val_auroc" if task == "multilabel" else "val_accuracy"]
            for name in ("loss", "val_loss", "val_score", "images_per_second", "seconds"):
                row[name] = math.nan if row[name] is None else float(row[name])
            epochs.setdefault(row["stage"], {})[int(row["epoch"])] = row
    return {stage: [rows[epoch] for epoch in sorted(rows)] for stage, rows in epochs.items()}


def read_metrics(path: Path, task: str) -> dict[str, Any] | None:
    """Read the metrics of a split; None if it was not evaluated."""
    if not path.is_file():
        return None
    with reading(path, "evaluate"):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["task"] != task:
            raise ValueError(f"they are {metrics['task']}, the run is {task}")
        scores = MEASURES[task]
        for values in (*metrics["classes"].values(), metrics["macro"]):
            for score in scores:
                number(values[score])
        if task == "multilabel":
            number(metrics["threshold"])
            for values in metrics["classes"].values():
                count(values["positives"])
            for score in scores:
                count(metrics["macro_labels"][score])
        else:
            number(metrics["accuracy"])
            _check_confusion(metrics)
    return dict(metrics)


def _check_confusion(metrics: dict[str, Any]) -> None:
    confusion = np.array(metrics["confusion_matrix"], dtype=np.int64)
    side = len(metrics["classes"])
    if confusion.shape != (side, side) or confusion.sum() != metrics["samples"]:
        raise ValueError(
            f"the confusion matrix does not hold {metrics['samples']} samples of {side} classes"
        )


def read_predictions(path: Path, task: str) -> list[Sample] | None:
    """Read the predictions of a split; None if it was not evaluated.

    Raises:
        CxrdistError: it is broken, or an older version wrote it, without logits.
    """
    if not path.is_file():
        return None
    samples = []
    with reading(path, "evaluate"), open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, strict=True)
        columns = table.fieldnames or []
        classes = [name.removeprefix("prob_") for name in columns if name.startswith("prob_")]
        if not classes:
            raise ValueError("there is no column prob_CLASS")
        # Probabilities cannot stand in for logits: those of sure predictions are equal.
        if missing := [name for name in classes if f"logit_{name}" not in columns]:
            raise ValueError(
                f"there is no column logit_{missing[0]}, which an older cxrdist did not write"
            )
        for row in table:
            try:
                samples.append(_read_sample(row, classes, task))
            except ValueError as error:
                raise ValueError(f"line {table.line_num}: {error}") from error
    return samples


def _read_sample(row: Mapping[str, str], classes: Sequence[str], task: str) -> Sample:
    """Read a row of predictions.csv.

    Raises:
        ValueError: it names no class of the table, or holds an impossible number.
    """
    probabilities = {name: float(row[f"prob_{name}"]) for name in classes}
    logits = {name: _finite(row[f"logit_{name}"]) for name in classes}
    sample = Sample(row["key"], row["label"], probabilities, logits, task)
    if task == "multiclass" and len(sample.labels) != 1:
        raise ValueError(f"{row['label']!r} is not one label")
    if unknown := [label for label in sample.labels if label not in probabilities]:
        raise ValueError(f"no probability of {unknown[0]!r}")
    if not all(0 <= value <= 1 for value in probabilities.values()):
        raise ValueError("a probability is not within 0 and 1")
    return sample


def read_relevance(run: RunDirectory, split: str) -> dict[str, list[Explanation]] | None:
    """Read the ledger of a split by key, in the order of the file; None if not explained."""
    path = run.relevance_table(split)
    if not path.is_file():
        return None
    found: dict[str, list[Explanation]] = {}
    with reading(path, "explain"), open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for row in table:
            logit, pixels = (_finite(row[name]) for name in ("logit", "relevance_sum"))
            shares = [row[name] for name in ("bias_share", "epsilon_share")]
            bias, epsilon = (_finite(text) if any(shares) else None for text in shares)
            picture = within(run.heatmaps(split), row["picture"]) if row["picture"] else None
            explanation = Explanation(
                row["key"], row["class"], logit, pixels, bias, epsilon, picture
            )
            found.setdefault(row["key"], []).append(explanation)
    return found


def read_sanity(run: RunDirectory, split: str) -> dict[str, Any] | None:
    """Read how the relevance of a split was made and tested; None if that is not known.

    Returns:
        relevance.json with ``sanity``: ledger_residual (or None) and pixel_flipping.
    """
    path = run.relevance_info(split)
    if not path.is_file():
        return None
    with reading(path, "explain"):
        info = json.loads(path.read_text(encoding="utf-8"))
        how, sanity = dict(info["how"]), info["sanity"]
        for name in ("preset", "composite", "flat", "biases"):
            how[name]
        if sanity is None:
            return None
        rate(sanity["ledger_residual"] or 0)
        flipping = sanity["pixel_flipping"]
        count(flipping["images"]), number(flipping["covered_share"])
        curves = [flipping["relevant_first"], flipping["random_order"]]
        if np.shape(curves) != (2, len(curves[0])) or not np.isfinite(curves).all():
            raise ValueError("the curves of pixel_flipping are not two rows of numbers")
        for name in ("area_over_relevant_first", "area_over_random_order"):
            number(flipping[name])
    return dict(info)


def _finite(text: str) -> float:
    """Read a number.

    Raises:
        ValueError: it is none, or not a finite one.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def within(directory: Path, name: str) -> Path:
    """Name a file of a directory.

    Raises:
        ValueError: the name leads elsewhere.
    """
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file in {directory.name}/")
    return directory / name


def known_splits(root: Path) -> list[str]:
    """List the splits that were evaluated or explained, test first."""
    found = {
        file.parent.name
        for name in ("metrics.json", "relevance.csv")
        for file in root.glob(f"*/{name}")
    }
    rank = {split: place for place, split in enumerate(reversed(SPLITS))}
    return sorted(found, key=lambda split: (rank.get(split, len(rank)), split))
