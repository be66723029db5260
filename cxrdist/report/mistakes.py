"""What the report shows of mistakes: X-ray, heat maps and nearest training image of each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.special import expit

from cxrdist.evaluate.mistakes import MOST_PICTURED, Mistake, find_mistakes
from cxrdist.evaluate.scored import Prediction, score_predictions
from cxrdist.explain.nearest import Nearest, read_nearest
from cxrdist.model.prediction import THRESHOLD_LOGIT
from cxrdist.report import pictures
from cxrdist.report.files import Explanation, read_calibration, reading, within
from cxrdist.report.view import View
from cxrdist.run import RunDirectory

MOST_LISTED = 1000
"""Number of mistakes shown as a table row only."""
MOST_MAPS = 3
"""Heat maps per mistake: the contrast, then those of the wrong labels."""
MOST_VALUES = 24
"""Values per filter, the most frequent; all others are one value, `OTHERS`."""
OTHERS, NOT_KNOWN = "others", "not known"

_FILTERED_GROUPS = ("view", "sex", "source")


class Case(NamedTuple):
    """A `Mistake` as the page shows it."""

    sample: Prediction
    missed: list[str]
    called: list[str]
    tags: str
    """CSS classes that the filters select by."""


class Pictures(NamedTuple):
    """The pictures of a mistake; None where they were not made."""

    xray: pictures.Picture | None
    """The square as the network saw it."""
    maps: list[tuple[Explanation, pictures.Picture]]
    """Heat maps of the contrast and of the wrong labels."""
    nearest: tuple[Nearest, pictures.Picture] | None
    """The training image most similar for the network, and its picture."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the pictures in the page in bytes."""
        nearest = [self.nearest] if self.nearest else []
        embedded = [self.xray, *(picture for _, picture in (*self.maps, *nearest))]
        return sum(len(picture.uri) for picture in embedded if picture)


def mistakes_view(
    run: RunDirectory,
    subset: str,
    samples: Sequence[Prediction],
    task: str,
    relevance: Mapping[str, list[Explanation]],
) -> View:
    """Gather the values for the images that the model got wrong, with their heat maps by key.

    Raises:
        CxrdistError: a file is damaged.
    """
    calibration = read_calibration(run) if task == "multilabel" else None
    limits = calibration.thresholds if calibration else {}
    mistakes = find_mistakes(score_predictions(samples, task), limits)
    filters, tags = _filters(mistakes, samples, task)
    cases = [
        Case(samples[mistake.position], mistake.missed, mistake.called, of_one)
        for mistake, of_one in zip(mistakes, tags, strict=True)
    ]
    nearest = read_nearest(run.nearest(subset))
    seen = [_pictures(run, subset, case, relevance, nearest) for case in cases[:MOST_PICTURED]]
    listed = cases[MOST_PICTURED : MOST_PICTURED + MOST_LISTED]
    return {
        "several": task == "multilabel",
        "is_run": run.info.is_file(),
        "num": len(cases),
        "num_images": len(samples),
        "num_patients": len({case.sample.patient for case in cases}),
        "cards": list(zip(cases[:MOST_PICTURED], seen, strict=True)),
        "listed": listed,
        "num_left": len(cases) - len(seen) - len(listed),
        "num_bare": sum(shown.xray is None for shown in seen),
        "num_unexplained": sum(not shown.maps for shown in seen),
        "megabytes": sum(shown.num_bytes for shown in seen) / 1e6,
        "filters": filters,
        "rule": calibration.rule if calibration else None,
        "labels": _label_rows(mistakes, samples, limits) if task == "multilabel" else [],
    }


def _filters(
    mistakes: Sequence[Mistake], samples: Sequence[Prediction], task: str
) -> tuple[list[View], list[str]]:
    """Return the filters with at least two values, and the CSS classes of each mistake.

    A filter has a name, the prefix of its CSS classes, a title for readers, and the values: CSS
    class, value and number of mistakes.
    """
    several = task == "multilabel"
    titles = {
        "missed": "Missed label" if several else "Truth",
        "called": "Label called in error" if several else "Predicted class",
        **{name: name.capitalize() for name in _FILTERED_GROUPS},
    }
    values: dict[str, list[list[str]]] = {
        "missed": [mistake.missed for mistake in mistakes],
        "called": [mistake.called for mistake in mistakes],
    }
    groups = [samples[mistake.position].groups for mistake in mistakes]
    for name in _FILTERED_GROUPS:
        values[name] = [[of_one.get(name) or NOT_KNOWN] for of_one in groups]
    tags: list[list[str]] = [[] for _ in mistakes]
    filters: list[View] = []
    for name, title in titles.items():
        counted = Counter(value for of_one in values[name] for value in of_one)
        if len(counted) < 2:
            continue
        frequent = [value for value, _ in counted.most_common(MOST_VALUES)]
        shown = [*sorted(frequent), *([OTHERS] if len(counted) > MOST_VALUES else [])]
        classes = {value: f"{name}-{i}" for i, value in enumerate(shown)}
        other_tag = classes.get(OTHERS, "")
        amounts: Counter[str] = Counter()
        for of_one, texts in zip(tags, values[name], strict=True):
            # A set, since several labels of a mistake may be among the others.
            selected = {classes.get(value, other_tag) for value in texts}
            amounts.update(selected)
            of_one += sorted(selected)
        counts = [(tag, value, amounts[tag]) for value, tag in classes.items()]
        filters.append({"name": name, "title": title, "values": counts})
    return filters, [" ".join(of_one) for of_one in tags]


def _pictures(
    run: RunDirectory,
    subset: str,
    case: Case,
    relevance: Mapping[str, list[Explanation]],
    nearest: Mapping[str, Nearest],
) -> Pictures:
    """Embed the pictures that evaluate and explain wrote for a mistake, the contrast first."""
    key = case.sample.key
    # Older versions of evaluate wrote no pictures, but explain may have written this one.
    xray = embed_key(run.mistakes(subset), key, "evaluate") or embed_key(
        run.heatmaps(subset), key, "explain"
    )
    drawn = [item for item in relevance.get(key, []) if item.picture]
    wrong = [item for item in drawn if item.target in case.called + case.missed]
    wrong.sort(key=lambda item: item.target not in case.called)
    contrasts = [item for item in drawn if item.is_contrast]
    maps = [
        (item, pictures.embed(item.picture))
        for item in (contrasts + (wrong or drawn[:1]))[:MOST_MAPS]
        if item.picture
    ]
    alike = nearest.get(key)
    picture = embed_key(run.nearest_pictures(subset), alike.nearest, "explain") if alike else None
    return Pictures(xray, maps, (alike, picture) if alike and picture else None)


def embed_key(directory: Path, key: str, command: str) -> pictures.Picture | None:
    """Embed KEY.png of a directory, if it exists."""
    if not directory.is_dir():
        return None
    with reading(directory, command):
        path = within(directory, f"{key}.png")
    return pictures.embed(path) if path.is_file() else None


def _label_rows(
    mistakes: Sequence[Mistake], samples: Sequence[Prediction], limits: Mapping[str, float]
) -> list[View]:
    """Count the mistakes of each label, and the images that could be mistaken."""
    missed = Counter(label for mistake in mistakes for label in mistake.missed)
    called = Counter(label for mistake in mistakes for label in mistake.called)
    rows: list[View] = []
    for name in samples[0].logits:
        known = [sample for sample in samples if sample.is_known(name)]
        positives = sum(name in sample.labels for sample in known)
        threshold = limits.get(name, THRESHOLD_LOGIT)
        rows.append(
            {
                "name": name,
                "threshold": float(expit(threshold)),
                "missed": (missed[name], positives),
                "called": (called[name], len(known) - positives),
            }
        )
    return rows
