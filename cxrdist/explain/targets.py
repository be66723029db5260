"""Choose what to explain: samples of a split, classes, and the contrast of two classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cxrdist.config import ExplainConfig
from cxrdist.data.index import Index
from cxrdist.data.labels import POSITIVE
from cxrdist.errors import CxrdistError, choices
from cxrdist.evaluate.metrics import Metrics
from cxrdist.evaluate.mistakes import find_mistakes
from cxrdist.evaluate.scored import MEND, read_scored
from cxrdist.explain.attribution import Attribution
from cxrdist.explain.relevance import Explainer
from cxrdist.files import read_document
from cxrdist.model.densenet import Classifier
from cxrdist.run import RunDirectory


@dataclass(frozen=True)
class Targets:
    """The classes to explain, and the contrast of two of them.

    Attributes:
        contrast: names of two classes, for every image; None for the two likeliest of each image,
            whose contrast is drawn but not stored, since it is the difference of two stored maps.
    """

    classes: list[str]
    contrast: tuple[str, str] | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the stored maps: the classes, then the contrast if it was given."""
        return [*self.classes, *([" minus ".join(self.contrast)] if self.contrast else [])]

    def leading(self, ledger: NDArray[np.float64]) -> tuple[int, int] | None:
        """Return the indices of an image's likeliest and second likeliest class.

        Their contrast depends on the learned weights more than maps of single classes do. None if
        a contrast was given, or only one class is explained. The ledger is that of a `Map`.
        """
        if self.contrast is not None or len(self.classes) < 2:
            return None
        # No contrast was given, so each row of the ledger is that of a class.
        first, second, *_ = np.argsort(-ledger[:, 0], kind="stable").tolist()
        return first, second

    def names_of(self, ledger: NDArray[np.float64]) -> list[str]:
        """Return the names of an image's pictures and rows: maps, then its leading contrast."""
        pair = self.leading(ledger)
        if pair is None:
            return self.names
        return [*self.names, " minus ".join(self.classes[index] for index in pair)]

    def with_leading(self, values: NDArray[Any], ledger: NDArray[np.float64]) -> NDArray[Any]:
        """Append the leading contrast to values of each map of an image, [K, ...]."""
        pair = self.leading(ledger)
        if pair is None:
            return values
        return np.concatenate([values, (values[pair[0]] - values[pair[1]])[None]])

    def likeliest(self, ledger: NDArray[np.float64]) -> int:
        """Return the index of the image's likeliest class among the explained classes."""
        return int(ledger[: len(self.classes), 0].argmax())

    def attribute(self, explainer: Explainer, images: torch.Tensor) -> Attribution:
        """Return the relevance and ledger of each map; those of the contrast are differences.

        The rules are linear in the relevance of the logits, so R_a - R_b is the relevance of the
        difference of the two logits.
        """
        explained = list(dict.fromkeys([*self.classes, *(self.contrast or ())]))
        result = explainer.attribute(images, explained)
        if self.contrast is None:
            return result
        first, second = (explained.index(name) for name in self.contrast)
        count = len(self.classes)
        columns = [
            torch.cat([value[:, :count], (value[:, first] - value[:, second]).unsqueeze(1)], 1)
            for value in vars(result).values()
        ]
        return Attribution(*columns)


def choose_targets(config: ExplainConfig, model: Classifier) -> Targets:
    """Parse the options ``classes`` and ``contrast``.

    Raises:
        CxrdistError: a name is not a class of the model, or a contrast does not have two classes.
    """
    listed = [name.strip() for name in config.classes.split(",")]
    classes = list(model.classes) if config.classes == "all" else listed
    for name in classes:
        _refuse_unknown("--classes", name, model.classes)
    if config.contrast is None:
        return Targets(classes)
    pair = [name.strip() for name in config.contrast.split(",")]
    if len(set(pair)) != 2 or len(pair) != 2:
        raise CxrdistError(
            f"--contrast {config.contrast}: expected two of {', '.join(model.classes)}, separated "
            "by a comma"
        )
    for name in pair:
        _refuse_unknown("--contrast", name, model.classes)
    return Targets(classes, (pair[0], pair[1]))


def _refuse_unknown(option: str, name: str, classes: list[str]) -> None:
    if name not in classes:
        raise CxrdistError(f"{option}: no class {name!r} in the model; {choices(name, classes)}")


def choose_samples(
    index: Index, split: str, limit: int | None, first: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Choose samples to explain; with a limit, classes and images without findings take turns.

    The samples in `first`, such as mistakes, come before all others. Images without any known label
    come last, since their maps cannot be compared with labels.

    Returns:
        int64 [n], ascending.
    """
    numbers, targets = index.numbers(split), index.targets()
    positive, known = targets == POSITIVE, (targets >= 0).any(axis=1)
    groups = (*positive.T, known & ~positive.any(axis=1))
    by_class = [[n for n in numbers if has[n]] for has in groups]
    in_turn = dict.fromkeys(first)
    in_turn |= dict.fromkeys(n for turn in zip_longest(*by_class) for n in turn if n is not None)
    in_turn |= dict.fromkeys(numbers)
    return np.array(sorted(list(in_turn)[:limit]), dtype=np.int64)


def mistaken_samples(
    run: RunDirectory, subset: str, index: Index, thresholds: Mapping[str, float] | None
) -> list[int]:
    """Return the wrongly predicted samples of an evaluation, the most confident first.

    Without an evaluation of the subset on these shards the result is empty.

    Raises:
        CxrdistError: its files were not written by `cxrdist evaluate`.
    """
    if not (run.predictions(subset).is_file() and run.metrics(subset).is_file()):
        return []
    metrics = read_document(run.metrics(subset), Metrics, MEND)
    if metrics.get("index_sha256") != index.sha256:
        return []
    scored = read_scored(run.predictions(subset), index.task)
    number_of = {sample.key: number for number, sample in enumerate(index.samples)}
    keys = [scored.keys[mistake.position] for mistake in find_mistakes(scored, thresholds)]
    return [number_of[key] for key in keys if key in number_of]
