"""Predictions of a model: from logits to probabilities, predicted and called classes.

Classes are always chosen by logits, since different logits can have the same probability: in
float32 the sigmoid of 18 and that of 25 are both 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, softmax

from cxrdist.info import Task
from cxrdist.model.description import Calibration

THRESHOLD = 0.5  # probability at or above which a label counts as predicted; not tuned
THRESHOLD_LOGIT = math.log(THRESHOLD / (1 - THRESHOLD))  # the logit of this probability: 0


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images, of logits float32 [N, classes]; the columns of `cxrdist predict`.

    Before the model is evaluated, there is no calibration.
    """

    logits: NDArray[np.float32] = field(repr=False)
    classes: list[str]
    task: Task
    calibration: Calibration | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.logits)

    @property
    def predicted(self) -> list[list[str]]:
        """Return the predicted classes of each image: one, or for multilabel all from 0.5 on."""
        return [predicted_classes(row, self.classes, self.task) for row in self.logits]

    @property
    def probabilities(self) -> dict[str, NDArray[np.float64]]:
        """Return the uncalibrated sigmoid of the logits of each class, float64 [N] each."""
        return dict(zip(self.classes, to_probabilities(self.logits).T, strict=True))

    @property
    def calibrated(self) -> dict[str, NDArray[np.float64]]:
        """Return the calibrated probability of each class against all others, float64 [N] each.

        It is the sigmoid of the logit divided by the temperature chosen on the validation split.
        Classes without a temperature are missing; before `cxrdist evaluate` these are all classes.
        """
        if self.calibration is None:
            return {}
        scaled = calibrated_logits(self.logits, self.classes, self.calibration)
        columns = zip(self.classes, expit(scaled).T, strict=True)
        return {name: v for name, v in columns if name in self.calibration.temperatures}

    @property
    def softmax(self) -> dict[str, NDArray[np.float64]]:
        """Return the softmax over all calibrated logits, float64 [N] each; sums to 1 per image.

        It is empty for multilabel models, and if any class is not calibrated.
        """
        if self.calibration is None or self.task == "multilabel":
            return {}
        calibrated = self.calibration.temperatures.keys()
        if calibrated != {*self.classes} or not self.calibration.reasons.keys() <= calibrated:
            return {}
        shares = softmax(calibrated_logits(self.logits, self.classes, self.calibration), axis=1)
        return dict(zip(self.classes, shares.T, strict=True))

    @property
    def called(self) -> dict[str, NDArray[np.bool_]]:
        """Return whether the logit reaches the threshold, bool [N] for each class that has one."""
        thresholds = self.calibration.thresholds if self.calibration else {}
        return {
            name: call(self.logits[:, i], thresholds[name])
            for i, name in enumerate(self.classes)
            if name in thresholds
        }


def to_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sigmoid of logits of any shape, in float64."""
    probabilities: NDArray[np.float64] = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
    return probabilities


def decide(logits: NDArray[Any], task: str) -> NDArray[np.bool_]:
    """Return which classes are predicted for each image, bool [N, classes].

    For multiclass it is the class of the largest logit, the first of equal ones; for multilabel all
    classes whose probability is at least `THRESHOLD`, possibly none.
    """
    if task == "multilabel":
        return call(logits, THRESHOLD_LOGIT)
    best: NDArray[np.bool_] = logits.argmax(axis=1)[:, None] == np.arange(logits.shape[1])
    return best


def predicted_classes(
    logits: Sequence[float] | NDArray[Any], classes: Sequence[str], task: str
) -> list[str]:
    """Return the names of the classes that are predicted for one image, as `decide` does."""
    (row,) = decide(np.array([logits]), task)
    return [name for name, is_predicted in zip(classes, row, strict=True) if is_predicted]


def calibrated_logits(
    logits: NDArray[Any], classes: Sequence[str], calibration: Calibration
) -> NDArray[np.float64]:
    """Divide logits [N, classes] by the temperatures; NaN for classes without one."""
    temperatures = [calibration.temperatures.get(name, np.nan) for name in classes]
    return logits.astype(np.float64) / np.array(temperatures)


def probability_columns(predictions: Predictions) -> dict[str, NDArray[np.float64]]:
    """Return the columns calibrated_CLASS and softmax_CLASS of a table, float64 [N] each."""
    kinds = {"calibrated": predictions.calibrated, "softmax": predictions.softmax}
    return {f"{kind}_{name}": v for kind, values in kinds.items() for name, v in values.items()}


def call(logits: NDArray[Any], threshold: float | NDArray[Any]) -> NDArray[np.bool_]:
    """Return whether each logit, of an array of any shape, reaches the threshold (of its class).

    Compared as float32, the precision of the network: logits read from a file of nine digits differ
    from the original as doubles, but not as float32.
    """
    return logits.astype(np.float32) >= np.asarray(threshold, np.float32)
