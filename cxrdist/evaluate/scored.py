"""Scored images: the truth, the logits, the patient and the groups of each image.

Every figure of an evaluation is computed from these alone, so it can be recomputed from
predictions.csv, and computed for the predictions of any other program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.index import Index
from cxrdist.data.labels import MISSING, POSITIVE, UNCERTAIN, label_matrix, labels_of
from cxrdist.files import finite, judging, open_table
from cxrdist.model.prediction import decide, predicted_classes

MEND = "run `cxrdist evaluate` again"
GROUP_COLUMNS = ("source", "view", "sex", "age")
"""Columns of samples.csv that define groups; predictions.csv has those known for some image."""
STATED = {"label": POSITIVE, "uncertain": UNCERTAIN, "missing": MISSING}
"""Columns of labels, with the code of `cxrdist.data.labels` that their labels have."""


@dataclass(frozen=True)
class Prediction:
    """One row of predictions.csv."""

    key: str
    label: str
    """The truth; several labels with ``|`` between them, empty for none."""
    probabilities: dict[str, float]
    """By class, 0 to 1; for display only."""
    logits: dict[str, float]
    """By class; predictions and their confidence are computed from these."""
    task: str = "multiclass"
    """multiclass or multilabel."""
    uncertain: str = ""
    """Labels that the source marks as uncertain, with ``|`` between them."""
    missing: str = ""
    """Labels that the source does not state, with ``|`` between them."""
    patient: str = ""
    """Patient of the X-ray."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Source, view, sex and age if known in the split; empty where unknown."""

    @property
    def labels(self) -> list[str]:
        """Return the truth as a list."""
        return labels_of(self.label)

    def is_known(self, label: str) -> bool:
        """Return whether the truth of a label is known."""
        return label not in labels_of(self.uncertain) + labels_of(self.missing)

    @property
    def predicted(self) -> list[str]:
        """Return the predicted class, or all predicted labels, by the rule of `evaluate`."""
        return predicted_classes(list(self.logits.values()), list(self.logits), self.task)

    @property
    def is_right(self) -> bool:
        """Return whether the predicted class is the truth."""
        return self.predicted == self.labels


@dataclass(frozen=True)
class Scored:
    """N scored images, in the order of predictions.csv.

    Attributes:
        task: multiclass or multilabel.
        classes: names, in the order of the columns of targets and logits.
        targets: int8 [N, classes], codes of `cxrdist.data.labels`; below 0 where unknown.
        logits: float64 [N, classes]; the float32 values of the network.
        groups: cells of the N images by column, such as sex; empty where unknown.
    """

    task: str
    classes: list[str]
    keys: list[str]
    patients: list[str]
    targets: NDArray[np.int8]
    logits: NDArray[np.float64]
    groups: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Which classes are predicted for each image, bool [N, classes]."""
        return decide(self.logits, self.task)

    def take(self, positions: NDArray[np.int64] | NDArray[np.bool_]) -> "Scored":
        """Return some of the images, by position or by a mask, bool [N]."""
        # Lists cannot be indexed by a mask, so it becomes positions.
        positions = np.arange(len(self))[positions]
        return Scored(
            self.task,
            self.classes,
            [self.keys[i] for i in positions],
            [self.patients[i] for i in positions],
            self.targets[positions],
            self.logits[positions],
            {name: [texts[i] for i in positions] for name, texts in self.groups.items()},
        )


def score_samples(index: Index, numbers: NDArray[np.int64], logits: NDArray[np.float32]) -> Scored:
    """Combine samples of shards, given by number [N], with a model's logits [N, classes]."""
    samples = [index.samples[number] for number in numbers]
    groups = {name: [getattr(sample, name) for sample in samples] for name in GROUP_COLUMNS}
    return Scored(
        index.task,
        index.classes,
        [sample.key for sample in samples],
        [sample.patient for sample in samples],
        index.targets()[numbers],
        logits.astype(np.float64),
        {name: texts for name, texts in groups.items() if any(texts)},
    )


def read_scored(path: Path, task: str) -> Scored:
    """Read predictions.csv into arrays; errors are those of `read_predictions`."""
    return score_predictions(read_predictions(path, task), task)


def score_predictions(predictions: Sequence[Prediction], task: str) -> Scored:
    """Return the rows of predictions.csv, at least one, as arrays."""
    classes, groups = list(predictions[0].logits), predictions[0].groups
    stated = {code: [getattr(row, name) for row in predictions] for name, code in STATED.items()}
    return Scored(
        task,
        classes,
        [row.key for row in predictions],
        [row.patient for row in predictions],
        label_matrix(stated, classes),
        np.array([list(row.logits.values()) for row in predictions]),
        {name: [row.groups[name] for row in predictions] for name in groups},
    )


def read_predictions(path: Path, task: str) -> list[Prediction]:
    """Read predictions.csv row by row, as `cxrdist evaluate` and `report --predictions` write it.

    Raises:
        CxrdistError: it is damaged, has no rows, or is from an older version, without logits.
    """
    with judging(path, MEND), open_table(path) as (columns, rows):
        classes = [name.removeprefix("prob_") for name in columns if name.startswith("prob_")]
        if not classes:
            raise ValueError("there is no column prob_CLASS")
        # Probabilities cannot replace logits: those of confident predictions are equal.
        if missing := [name for name in classes if f"logit_{name}" not in columns]:
            raise ValueError(
                f"there is no column logit_{missing[0]}, which an older cxrdist did not write"
            )
        predictions = [_read_prediction(row, classes, task) for row in rows]
        if not predictions:
            raise ValueError("there are no rows")
        return predictions


def _read_prediction(row: Mapping[str, str], classes: Sequence[str], task: str) -> Prediction:
    """Read a row of predictions.csv."""
    probabilities = {name: float(row[f"prob_{name}"]) for name in classes}
    logits = {name: finite(row[f"logit_{name}"]) for name in classes}
    unknown = row.get("uncertain", ""), row.get("missing", "")
    groups = {name: row[name] for name in GROUP_COLUMNS if name in row}
    sample = Prediction(
        row["key"], row["label"], probabilities, logits, task, *unknown, row["patient"], groups
    )
    if task == "multiclass" and len(sample.labels) != 1:
        raise ValueError(f"{row['label']!r} is not one label")
    named = [*sample.labels, *(label for text in unknown for label in labels_of(text))]
    if stray := [label for label in named if label not in probabilities]:
        raise ValueError(f"there is no column prob_{stray[0]}")
    if len({*named}) != len(named):
        raise ValueError("a label is named twice in label, uncertain and missing")
    if not all(0 <= value <= 1 for value in probabilities.values()):
        raise ValueError("a probability is not within 0 and 1")
    return sample
