"""Two models on thumbnails of 32 px, which a network must beat for its result to mean anything.

A thumbnail shows age, position, collimation and the hospital's processing, and hardly any disease.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cxrdist.data.baseline import DECAY, EPOCHS, FREEDOM, UNITS
from cxrdist.data.cache import open_cache
from cxrdist.data.fingerprint import shrink
from cxrdist.data.index import Index, read_index
from cxrdist.distributed import start
from cxrdist.errors import CxrdistError
from cxrdist.files import scratch_directory, write_json, write_table
from cxrdist.info import Count
from cxrdist.report.foreign import report_predictions
from cxrdist.run import environment

SPLITS = ("val", "test")  # val for temperatures and thresholds only


class ThumbnailsInfo(TypedDict):
    """The content of thumbnails.json."""

    format: Literal["cxrdist-thumbnails-1"]
    parameters: Count
    seconds: float
    seed: Count
    index_sha256: str
    git_revision: str | None


def models(seed: int) -> dict[str, Pipeline]:
    """The two models, with the settings of the audit's baseline (`cxrdist.data.baseline`).

    Both see standardised grey levels. The logistic regression has scikit-learn's C of 0.01; the
    perceptron one hidden layer of 128 ReLU units, Adam with 1e-3, batches of 200, an L2 penalty
    (alpha) of 1 and 30 epochs. They were chosen by cross-validation over all of paper_like, its
    test images among them, which favours the thumbnails, not the networks.
    """
    regression = LogisticRegression(C=FREEDOM, max_iter=1000, random_state=seed)
    perceptron = MLPClassifier((UNITS,), alpha=DECAY, max_iter=EPOCHS, random_state=seed)
    found = {"logistic_regression": regression, "perceptron": perceptron}
    return {name: make_pipeline(StandardScaler(), model) for name, model in found.items()}


def num_parameters(model: Pipeline) -> int:
    """Count the weights and biases of a fitted model."""
    fitted: Any = model[-1]
    if isinstance(fitted, MLPClassifier):
        return sum(part.size for part in (*fitted.coefs_, *fitted.intercepts_))
    return int(fitted.coef_.size + fitted.intercept_.size)


def thumbnails(shards: Path, out: Path, seed: int, cache: Path | None = None) -> None:
    """Train both models on train, and write what they predict as runs that `compare` reads.

    Args:
        shards: of one class per image.
        out: directory for OUT/MODEL-SEED; a model that is there is left as it is.
        seed: of the models, and in the names of their directories.
        cache: of the decoded images.

    Raises:
        CxrdistError: the shards have several labels per image, or cannot be used.
    """
    index = read_index(shards)
    if index.task != "multiclass":
        raise CxrdistError(f"{shards}: has several labels per image, expected one class per image")
    waiting = {
        name: model
        for name, model in models(seed).items()
        if not (out / f"{name}-{seed}" / "thumbnails.json").is_file()
    }
    if not waiting:
        return
    images = open_cache(index, cache, start())
    values = np.stack([shrink(image).ravel() for image in images]).astype(np.float32)
    for name, model in waiting.items():
        seconds = fit(model, values, index)
        run = out / f"{name}-{seed}"
        _write_predictions(index, model, values, run)
        info: ThumbnailsInfo = {
            "format": "cxrdist-thumbnails-1",
            "parameters": num_parameters(model),
            "seconds": seconds,
            "seed": seed,
            "index_sha256": index.sha256,
            "git_revision": environment()["git_revision"],
        }
        write_json(run / "thumbnails.json", info)


def fit(model: Pipeline, values: NDArray[np.float32], index: Index) -> float:
    """Train a model on the images of train; return the seconds that it took.

    Args:
        model: a classifier of scikit-learn.
        values: float32 [N, pixels] of all samples.
        index: the shards.
    """
    numbers, began = index.numbers("train"), time.perf_counter()
    labels = index.targets()[numbers].argmax(axis=1)
    # In products as small as these, threads mostly wait for each other (data/shortcut).
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are a choice
        model.fit(values[numbers], labels)
    return round(time.perf_counter() - began, 3)


def _write_predictions(
    index: Index, model: Pipeline, values: NDArray[np.float32], run: Path
) -> None:
    """Write RUN/test as `cxrdist report --predictions` does, unless a killed call has done it."""
    if (run / "test" / "metrics.json").is_file():
        return
    with scratch_directory() as folder:
        file = folder / f"{run.name}.csv"
        names = [f"prob_{name}" for name in index.classes]
        write_table(file, ["key", "patient", "split", "label", *names], _rows(index, model, values))
        report_predictions(file, run / "test")


def _rows(index: Index, model: Pipeline, values: NDArray[np.float32]) -> Iterator[list[str]]:
    for split in SPLITS:
        numbers = index.numbers(split)
        for number, row in zip(numbers, model.predict_proba(values[numbers]), strict=True):
            sample = index.samples[number]
            about = [sample.key, sample.patient, split, sample.label]
            yield [*about, *(f"{value:.17g}" for value in row)]  # 17 digits keep each float64


def main() -> int:
    """Read the command line; 2 for bad input, with one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path, help="directory for OUT/MODEL-SEED")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    try:
        thumbnails(**vars(parser.parse_args()))
    except CxrdistError as error:
        print(f"thumbnails: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
