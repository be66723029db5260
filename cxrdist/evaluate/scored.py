"""Scored images: what is known of each, what a model said of it, and whose it is.

Every figure of an evaluation is computed from these and nothing else, so that it can be computed
anew from predictions.csv, and for the predictions of any other program.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.index import Index
from cxrdist.data.labels import MISSING, POSITIVE, UNCERTAIN, label_matrix
from cxrdist.run import judging, open_regular

MEND = "run `cxrdist evaluate` again"
GROUP_COLUMNS = ("source", "view", "sex", "age")
"""Columns of samples.csv by which figures are told apart; in predictions.csv those that say
something of an image."""


@dataclass(frozen=True)
class Scored:
    """The N images of a figure, in the order of predictions.csv.

    Attributes:
        task: multiclass or multilabel.
        classes: their order is that of the columns of targets and logits.
        keys: of the samples.
        patients: whose X-rays they are.
        targets: int8 [N, classes], codes of `cxrdist.data.labels`; below 0 where it is not known.
        logits: float64 [N, classes]; float32 as the network gave them.
        groups: texts of the N images by column, such as sex; empty where nothing tells.
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

    def take(self, places: NDArray[np.int64] | NDArray[np.bool_]) -> "Scored":
        """Some of the images, by place or by a mask [N]."""
        places = np.arange(len(self))[places]
        return Scored(
            self.task,
            self.classes,
            [self.keys[place] for place in places],
            [self.patients[place] for place in places],
            self.targets[places],
            self.logits[places],
            {name: [texts[place] for place in places] for name, texts in self.groups.items()},
        )


def score_samples(index: Index, numbers: NDArray[np.int64], logits: NDArray[np.float32]) -> Scored:
    """Put samples of shards together with the logits of a model.

    Args:
        index: the shards.
        numbers: of the samples, int64 [N].
        logits: float32 [N, classes], in their order.
    """
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
    """Read predictions.csv.

    Raises:
        CxrdistError: it is not what `cxrdist evaluate` writes.
    """
    with (
        judging(path, MEND),
        TextIOWrapper(open_regular(path, os.O_RDONLY), encoding="utf-8", newline="") as text,
    ):
        table = csv.DictReader(text, strict=True)
        try:
            return _scored(table, task)
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            reason = f"misses {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"line {table.line_num}: {reason:.200}") from error


def _scored(table: "csv.DictReader[str]", task: str) -> Scored:
    columns = list(table.fieldnames or [])
    classes = [name.removeprefix("logit_") for name in columns if name.startswith("logit_")]
    rows = list(table)
    texts = {name: [row[name] for row in rows] for name in columns if not _is_number(name)}
    logits = np.array([[float(row[f"logit_{name}"]) for name in classes] for row in rows])
    if not np.isfinite(logits).all():
        raise ValueError("a logit is not a finite number")
    nothing = [""] * len(rows)
    stated = {
        POSITIVE: texts["label"],
        UNCERTAIN: texts.get("uncertain", nothing),
        MISSING: texts.get("missing", nothing),
    }
    return Scored(
        task,
        classes,
        texts["key"],
        texts["patient"],
        label_matrix(stated, classes),
        logits.reshape(-1, len(classes)),
        {name: texts[name] for name in GROUP_COLUMNS if name in texts},
    )


def _is_number(column: str) -> bool:
    return column.startswith(("prob_", "logit_", "calibrated_", "softmax_"))
