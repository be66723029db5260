"""What is explained: samples of a split, classes, and the contrast of two classes."""

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
from cxrdist.model.densenet import Classifier
from cxrdist.run import RunDirectory, read_document


@dataclass(frozen=True)
class Targets:
    """What is explained: classes, and one of them minus another.

    Attributes:
        classes: names of the classes.
        contrast: names of two classes, of every image; None for the two likeliest of each image,
            whose contrast is drawn and not kept as a map: it is the difference of two that are.
    """

    classes: list[str]
    contrast: tuple[str, str] | None = None

    @property
    def names(self) -> list[str]:
        """The name of each map that is kept: the classes, then the contrast of every image."""
        return [*self.classes, *([" minus ".join(self.contrast)] if self.contrast else [])]

    def leading(self, ledger: NDArray[np.float64]) -> tuple[int, int] | None:
        """Return the places of an image's likeliest class and of the second likeliest one.

        Their contrast is the map of an image that changes when the network does. None where a
        contrast was asked for, or only one class is explained.

        Args:
            ledger: float64 [K, 4], as in `Map`.
        """
        if self.contrast is not None or len(self.classes) < 2:
            return None
        first, second, *_ = np.argsort(-ledger[:, 0], kind="stable").tolist()
        return first, second

    def names_of(self, ledger: NDArray[np.float64]) -> list[str]:
        """The name of each picture and row of an image: its maps, then its leading contrast."""
        places = self.leading(ledger)
        if places is None:
            return self.names
        return [*self.names, " minus ".join(self.classes[place] for place in places)]

    def with_leading(self, values: NDArray[Any], ledger: NDArray[np.float64]) -> NDArray[Any]:
        """Add the leading contrast to what is known of each map of an image, [K, ...]."""
        places = self.leading(ledger)
        if places is None:
            return values
        return np.concatenate([values, (values[places[0]] - values[places[1]])[None]])

    def likeliest(self, ledger: NDArray[np.float64]) -> int:
        """Return the place of the image's likeliest class among those that are explained."""
        return int(ledger[: len(self.classes), 0].argmax())

    def attribute(self, explainer: Explainer, images: torch.Tensor) -> Attribution:
        """Return the relevance and ledger of each map; those of the contrast are differences.

        The rules behind the logits are linear in the relevance, so R_a - R_b is the relevance of
        the difference of the two logits.
        """
        explained = list(dict.fromkeys([*self.classes, *(self.contrast or ())]))
        found = explainer.attribute(images, explained)
        if self.contrast is None:
            return found
        first, second = (explained.index(name) for name in self.contrast)
        count = len(self.classes)
        columns = [
            torch.cat([value[:, :count], (value[:, first] - value[:, second]).unsqueeze(1)], 1)
            for value in vars(found).values()
        ]
        return Attribution(*columns)


def choose_targets(config: ExplainConfig, model: Classifier) -> Targets:
    """Read the options ``classes`` and ``contrast``.

    Raises:
        CxrdistError: a name is no class of the model, or a contrast is not of two classes.
    """
    classes = choose_classes(config.classes, model)
    if config.contrast is None:
        return Targets(classes)
    pair = [name.strip() for name in config.contrast.split(",")]
    if len(set(pair)) != 2 or len(pair) != 2:
        raise CxrdistError(
            f"--contrast {config.contrast}: expected two of {', '.join(model.classes)} with a "
            "comma between them"
        )
    for name in pair:
        _refuse_unknown("--contrast", name, model.classes)
    return Targets(classes, (pair[0], pair[1]))


def choose_classes(classes: str, model: Classifier) -> list[str]:
    """Read ``all`` or names with commas between them.

    Raises:
        CxrdistError: a name is no class of the model.
    """
    names = model.classes if classes == "all" else [name.strip() for name in classes.split(",")]
    for name in names:
        _refuse_unknown("--classes", name, model.classes)
    return list(names)


def _refuse_unknown(option: str, name: str, classes: list[str]) -> None:
    if name not in classes:
        raise CxrdistError(f"{option}: no class {name!r} in the model; {choices(name, classes)}")


def choose_samples(
    index: Index, split: str, limit: int | None, first: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Sample numbers to explain; with a limit the classes take turns, and images without label.

    Images of which no label is known come last: nothing can be compared with their maps.

    Args:
        index: the shards.
        split: of the samples.
        limit: how many; None for all.
        first: samples of the split that come before all others, such as mistakes.

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
    run: RunDirectory, place: str, index: Index, thresholds: Mapping[str, float] | None
) -> list[int]:
    """Numbers of the samples that an evaluation on these shards got wrong, the surest first.

    Args:
        run: the run directory.
        place: of the evaluation; none if it was not made, or on other shards.
        index: the shards.
        thresholds: as in `find_mistakes`.

    Raises:
        CxrdistError: its files are not what `cxrdist evaluate` writes.
    """
    if not (run.predictions(place).is_file() and run.metrics(place).is_file()):
        return []
    metrics = read_document(run.metrics(place), Metrics, MEND)
    if metrics.get("index_sha256") != index.sha256:
        return []
    scored = read_scored(run.predictions(place), index.task)
    number_of = {sample.key: number for number, sample in enumerate(index.samples)}
    keys = [scored.keys[mistake.place] for mistake in find_mistakes(scored, thresholds)]
    return [number_of[key] for key in keys if key in number_of]
