"""Scored images: the truth, the logits, the patient and the groups of each image.

Every figure of an evaluation is computed from these alone, so it can be recomputed from
predictions.csv, and computed for the predictions of any other program.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.index import Index
from cxrdist.data.labels import MISSING, POSITIVE, UNCERTAIN, label_matrix
from cxrdist.files import judging, open_table
from cxrdist.model.prediction import decide

MEND = "run `cxrdist evaluate` again"
GROUP_COLUMNS = ("source", "view", "sex", "age")
"""Columns of samples.csv that define groups; predictions.csv has those known for some image."""
STATED = {"label": POSITIVE, "uncertain": UNCERTAIN, "missing": MISSING}
"""Columns of labels, with the code of `cxrdist.data.labels` that their labels have."""


@dataclass(frozen=True)
class Scored:
    """N scored images, in the order of predictions.csv.

    Attributes:
        task: multiclass or multilabel.
        classes: names, in the order of the columns of targets and logits.
        keys: keys of the samples.
        patients: patient of each image.
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
    """Read predictions.csv.

    Raises:
        CxrdistError: it is not what `cxrdist evaluate` writes.
    """
    with judging(path, MEND), open_table(path) as table:
        columns = list(table.fieldnames or [])
        classes = [name.removeprefix("logit_") for name in columns if name.startswith("logit_")]
        rows, logits = [], []
        for row in table:  # one by one, so that an error names its line
            rows.append(row)
            logits.append([float(row[f"logit_{name}"]) for name in classes])
            if not all(map(math.isfinite, logits[-1])):
                raise ValueError("a logit is not a finite number")
        names = ("key", "patient", *STATED, *GROUP_COLUMNS)
        texts = {name: [row[name] for row in rows] for name in names if name in columns}
        # Of the columns of labels only `label` must exist; a KeyError here names it to the user.
        stated = {POSITIVE: texts["label"]}
        stated |= {code: texts[name] for name, code in STATED.items() if name in texts}
        return Scored(
            task,
            classes,
            texts["key"],
            texts["patient"],
            label_matrix(stated, classes),
            # Without rows the array has the shape [0] instead of [0, classes].
            np.array(logits).reshape(-1, len(classes)),
            {name: texts[name] for name in GROUP_COLUMNS if name in texts},
        )
