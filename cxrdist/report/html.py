"""The report: a run directory read and checked, shown as one HTML file that needs nothing else."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.explain import heatmap
from cxrdist.report import pictures
from cxrdist.run import RUN_FORMAT, RunDirectory, write_text

MEASURES = {"recall": "Recall", "precision": "Precision", "f1": "F1 score", "auroc": "AUROC"}
MOST_MISTAKES = 12
MOST_OF_A_CLASS = 4
MOST_IN_GALLERY = 24
MOST_MAPS_OF_A_SAMPLE = 4
DASH = "\N{EM DASH}"
_SPLITS_FIRST = ("test", "val", "train")


@dataclass(frozen=True)
class Sample:
    """One row of predictions.csv."""

    key: str
    label: str
    """The truth."""
    probabilities: dict[str, float]
    """By class, 0 to 1."""

    @property
    def predicted(self) -> str:
        """The class of the highest probability, the first one where they are equal."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def confidence(self) -> float:
        """The probability of the predicted class."""
        return self.probabilities[self.predicted]


@dataclass(frozen=True)
class Explanation:
    """One row of relevance.csv: ``logit = pixels + bias + epsilon``, all in logit units."""

    key: str
    target: str
    """The class that is explained."""
    logit: float
    pixels: float
    bias: float
    epsilon: float
    picture: Path | None
    """The heat map; None where none was written."""


@dataclass(frozen=True)
class Card:
    """One sample as the page shows it."""

    key: str
    sample: Sample | None
    """None where the split was explained and not evaluated."""
    xray: pictures.Picture | None
    maps: list[tuple[Explanation, pictures.Picture]]


def report(config: ReportConfig) -> Path:
    """Write ``RUN/report.html``: one file, the same bytes for the same run directory.

    Returns:
        The file.

    Raises:
        CxrdistError: there is no run, or one of its files is not what its command writes.
    """
    run = RunDirectory(config.run)
    info = _read_info(run)
    recipe = _read_recipe(run.recipe)
    splits = [
        _split_view(run, split, f"split{place}")
        for place, split in enumerate(_known_splits(run.root))
    ]
    page = _template().render(
        name=run.root.resolve().name,
        info=info,
        duration=_duration(run.info, info),
        recipe=recipe,
        stages=_stage_views(run, info, recipe),
        splits=splits,
        headline=next((split for split in splits if split["metrics"]), None),
        measures=MEASURES,
        heatmap=heatmap,
    )
    write_text(run.report, page)
    print(f"the report: {run.report}")
    return run.report


def _template() -> Template:
    """Load the page; whatever comes from a file is escaped, a name it misses is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        colour=colour,
        number=number,
        percent=percent,
        count=count,
        rate=rate,
        share=share,
        moment=moment,
    )
    return environment.get_template("report.html.jinja")


# How a value is written.


def number(value: float | None) -> str:
    """Write a value with three decimals; what is undefined is a dash."""
    return DASH if value is None or math.isnan(value) else f"{value:.3f}".replace("-", "\u2212")


def percent(value: float | None) -> str:
    """Write a share (0 to 1) in percent, from the three decimals that `number` shows."""
    if value is None or math.isnan(value):
        return DASH
    return f"{Decimal(f'{value:.3f}') * 100:.1f} %".replace(" ", "\N{NO-BREAK SPACE}")


def count(value: int | None) -> str:
    """Write a whole number with its thousands apart."""
    return DASH if value is None else f"{value:,}"


def rate(value: float) -> str:
    """Write a value of any magnitude with three digits, such as a learning rate."""
    return f"{value:.3g}"


def share(part: float, whole: float) -> float | None:
    """Divide; nothing of nothing is undefined."""
    return part / whole if whole else None


def colour(rgb: Sequence[float], opacity: float) -> str:
    """Write a colour (0 to 255 each) with its opacity (0 to 1) for CSS."""
    red, green, blue = rgb
    return f"rgb({red:.0f} {green:.0f} {blue:.0f} / {opacity:g})"


def moment(value: str | None) -> str:
    """Write an ISO time for people, to the minute, with its zone."""
    if value is None:
        return DASH
    time = datetime.fromisoformat(value)
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()


# What is read. Each reader checks the file whole, so that the page is built from sound values.


@contextmanager
def _reading(path: Path, command: str) -> Iterator[None]:
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


def _read_info(run: RunDirectory) -> dict[str, Any]:
    """Read run.json.

    Raises:
        CxrdistError: there is none, or it is not one of this format.
    """
    if not run.info.is_file():
        raise CxrdistError(
            f"--run {run.root}: holds no run.json; give the directory of a `cxrdist train`"
        )
    with _reading(run.info, "train"):
        info = json.loads(run.info.read_text(encoding="utf-8"))
        if info["format"] != RUN_FORMAT:
            raise ValueError(f"format is {info['format']!r} and not {RUN_FORMAT!r}")
        shards = info["shards"]
        for name in ("index_sha256", "image_size_px", "classes", "split"):
            shards[name]
        for classes in shards["counts"].values():
            for name in shards["classes"]:
                count(classes[name]["images"]), count(classes[name]["patients"])
        for name in ("world_size", "device", "mixed_precision", "git_revision"):
            info[name]
        dict(info["versions"]), info["weights"]["source"], dict(info["stages"])
        moment(info["started"]), moment(info["finished"])
    return dict(info)


def _read_recipe(path: Path) -> tuple[str, list[str]] | None:
    """Read the resolved recipe.

    Returns:
        The text as it stands and the names of the stages in order; None if there is no recipe.
    """
    if not path.is_file():
        return None
    with _reading(path, "train"):
        text = path.read_text(encoding="utf-8")
        return text, [str(name) for name in yaml.safe_load(text).get("stages") or {}]


def _read_epochs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the epochs of each stage from the log, those that were done twice as done last.

    A last line without an end was cut off when the run was killed; it is left out.
    """
    if not path.is_file():
        return {}
    epochs: dict[str, dict[int, dict[str, Any]]] = {}
    with _reading(path, "train"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            if row.get("kind") != "epoch":
                continue
            for name in ("loss", "val_loss", "val_accuracy", "images_per_second", "seconds"):
                row[name] = math.nan if row[name] is None else float(row[name])
            epochs.setdefault(row["stage"], {})[int(row["epoch"])] = row
    return {stage: [rows[epoch] for epoch in sorted(rows)] for stage, rows in epochs.items()}


def _read_metrics(path: Path) -> dict[str, Any] | None:
    """Read the metrics of a split; None if it was not evaluated."""
    if not path.is_file():
        return None
    with _reading(path, "evaluate"):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        for values in (*metrics["classes"].values(), metrics["macro"]):
            for measure in MEASURES:
                number(values[measure])
        number(metrics["accuracy"])
        confusion = np.array(metrics["confusion_matrix"], dtype=np.int64)
        side = len(metrics["classes"])
        if confusion.shape != (side, side) or confusion.sum() != metrics["samples"]:
            raise ValueError(
                f"the confusion matrix does not hold {metrics['samples']} samples of {side} classes"
            )
    return dict(metrics)


def _read_predictions(path: Path) -> list[Sample] | None:
    """Read the predictions of a split; None if it was not evaluated."""
    if not path.is_file():
        return None
    samples = []
    with _reading(path, "evaluate"), open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, strict=True)
        columns = [name for name in table.fieldnames or [] if name.startswith("prob_")]
        if not columns:
            raise ValueError("there is no column prob_CLASS")
        for row in table:
            probabilities = {name.removeprefix("prob_"): float(row[name]) for name in columns}
            if row["label"] not in probabilities:
                raise ValueError(f"line {table.line_num}: no probability of {row['label']!r}")
            if not all(0 <= value <= 1 for value in probabilities.values()):
                raise ValueError(f"line {table.line_num}: a probability is not within 0 and 1")
            samples.append(Sample(row["key"], row["label"], probabilities))
    return samples


def _read_relevance(run: RunDirectory, split: str) -> dict[str, list[Explanation]] | None:
    """Read the ledger of a split by key, in the order of the file; None if not explained."""
    path = run.relevance_table(split)
    if not path.is_file():
        return None
    found: dict[str, list[Explanation]] = {}
    with _reading(path, "explain"), open(path, encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for row in table:
            logit, pixels, bias, epsilon = (
                _finite(row[name])
                for name in ("logit", "relevance_sum", "bias_share", "epsilon_share")
            )
            picture = _within(run.heatmaps(split), row["picture"]) if row["picture"] else None
            explanation = Explanation(
                row["key"], row["class"], logit, pixels, bias, epsilon, picture
            )
            found.setdefault(row["key"], []).append(explanation)
    return found


def _finite(text: str) -> float:
    """Read a number.

    Raises:
        ValueError: it is none, or not a finite one.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _within(directory: Path, name: str) -> Path:
    """Name a file of a directory.

    Raises:
        ValueError: the name leads elsewhere.
    """
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file in {directory.name}/")
    return directory / name


def _known_splits(root: Path) -> list[str]:
    """List the splits that were evaluated or explained, test first."""
    found = {
        file.parent.name
        for name in ("metrics.json", "relevance.csv")
        for file in root.glob(f"*/{name}")
    }
    rank = {split: place for place, split in enumerate(_SPLITS_FIRST)}
    return sorted(found, key=lambda split: (rank.get(split, len(rank)), split))


# What is shown.


def _duration(path: Path, info: Mapping[str, Any]) -> str:
    """Write how long a run took from its start to its end, pauses included."""
    if info["finished"] is None:
        return "not finished"
    with _reading(path, "train"):
        started, finished = (datetime.fromisoformat(info[name]) for name in ("started", "finished"))
        seconds = round((finished - started).total_seconds())
    parts = (seconds // 3600, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")
    shown = [f"{value} {unit}" for value, unit in parts if value] or ["0 s"]
    return " ".join(shown[:2])


def _stage_views(
    run: RunDirectory, info: Mapping[str, Any], recipe: tuple[str, list[str]] | None
) -> list[dict[str, Any]]:
    """Gather each stage in the order of the recipe: what it trained and how it went."""
    epochs = _read_epochs(run.log)
    names = dict.fromkeys([*(recipe[1] if recipe else []), *info["stages"], *epochs])
    views = []
    for place, name in enumerate(names):
        with _reading(run.info, "train"):
            facts = info["stages"].get(name)
            for group in facts["parameter_groups"] if facts else []:
                float(group["lr"]), float(group["weight_decay"])
                count(group["tensors"]), count(group["parameters"]), group["block"]
            best = int(facts["best_epoch"]) if facts else None
            frozen = list(facts["frozen"]) if facts else []
        rows = epochs.get(name, [])
        views.append(
            {
                "name": name,
                "facts": facts,
                "frozen": frozen,
                "best_epoch": best,
                "rows": rows,
                "charts": _stage_charts(f"stage{place}", rows, best) if rows else [],
                "images_per_second": (
                    float(np.nanmedian([row["images_per_second"] for row in rows]))
                    if any(not math.isnan(row["images_per_second"]) for row in rows)
                    else None
                ),
            }
        )
    return views


def _stage_charts(name: str, rows: list[dict[str, Any]], best: int | None) -> list[Markup]:
    """Draw loss and accuracy of one stage."""
    column = {key: [row[key] for row in rows] for key in ("loss", "val_loss", "val_accuracy")}
    epochs = [int(row["epoch"]) for row in rows]
    charts = (
        pictures.loss_chart(f"{name}-loss", epochs, column["loss"], column["val_loss"], best),
        pictures.accuracy_chart(f"{name}-accuracy", epochs, column["val_accuracy"], best),
    )
    return [Markup(chart) for chart in charts]


def _split_view(run: RunDirectory, split: str, element: str) -> dict[str, Any]:
    """Gather all that is shown of one split; what was not made is None.

    Args:
        run: the run directory.
        split: the split.
        element: begins the ids of its elements in the page; unique.

    Raises:
        CxrdistError: a file is broken, or predictions and metrics are of different evaluations.
    """
    metrics = _read_metrics(run.metrics(split))
    samples = _read_predictions(run.predictions(split))
    relevance = _read_relevance(run, split)
    if metrics and samples is not None:
        _check_same_evaluation(run, split, metrics, samples)
    by_key = {sample.key: sample for sample in samples or []}
    mistakes = worst_mistakes(samples or [])
    shown = _gallery(relevance or {}, by_key)
    return {
        "name": split,
        "element": element,
        "metrics": metrics,
        "undefined": _undefined(metrics) if metrics else [],
        "num_correct": int(np.trace(metrics["confusion_matrix"])) if metrics else None,
        "interval": _interval(metrics) if metrics else None,
        "samples": samples,
        "roc": _roc_charts(element, samples, metrics) if samples and metrics else None,
        "num_mistakes": sum(sample.predicted != sample.label for sample in samples or []),
        "mistakes": [_card(run, split, sample.key, by_key, relevance) for sample in mistakes],
        "explained": relevance is not None,
        "ledger": _ledger(relevance or {}),
        "gallery": [
            (label, [_card(run, split, key, by_key, relevance) for key in keys])
            for label, keys in shown.items()
        ],
    }


def _check_same_evaluation(
    run: RunDirectory, split: str, metrics: Mapping[str, Any], samples: list[Sample]
) -> None:
    """Refuse metrics that are not those of the predictions beside them.

    Raises:
        CxrdistError: the confusion matrices differ.
    """
    classes = list(metrics["classes"])
    counted = {(label, predicted): 0 for label in classes for predicted in classes}
    for sample in samples:
        pair = sample.label, sample.predicted
        counted[pair] = counted.get(pair, 0) + 1
    if list(counted.values()) != [n for row in metrics["confusion_matrix"] for n in row]:
        raise CxrdistError(
            f"{run.metrics(split)}: expected the metrics of predictions.csv beside it, but the "
            f"confusion matrices differ; run `cxrdist evaluate --split {split}` again"
        )


def worst_mistakes(samples: Sequence[Sample]) -> list[Sample]:
    """Pick the wrong predictions that the network was surest of, the surest first."""
    wrong = [sample for sample in samples if sample.predicted != sample.label]
    return sorted(wrong, key=lambda sample: (-sample.confidence, sample.key))[:MOST_MISTAKES]


def _gallery(
    relevance: Mapping[str, list[Explanation]], samples: Mapping[str, Sample]
) -> dict[str | None, list[str]]:
    """Pick a few samples of each class that have heat maps, the first ones by the file's order.

    They are not picked by how well the network did, so that they show how it usually looks.
    """
    classes = next(iter(samples.values())).probabilities if samples else {}
    keys: dict[str | None, list[str]] = {name: [] for name in classes}
    for key, explanations in relevance.items():
        if any(explanation.picture for explanation in explanations):
            label = samples[key].label if key in samples else None
            keys.setdefault(label, []).append(key)
    most = max(1, min(MOST_OF_A_CLASS, MOST_IN_GALLERY // max(1, len(keys))))
    return {label: found[:most] for label, found in keys.items() if found}


def _card(
    run: RunDirectory,
    split: str,
    key: str,
    samples: Mapping[str, Sample],
    relevance: Mapping[str, list[Explanation]] | None,
) -> Card:
    """Gather the X-ray and the heat maps of one sample, as far as they were written.

    Of many heat maps those of the truth, of the prediction and of the likeliest classes stay.
    """
    sample = samples.get(key)

    def interest(explanation: Explanation) -> tuple[bool, float]:
        if sample is None:
            return True, 0.0
        target = explanation.target
        return target not in {sample.label, sample.predicted}, -sample.probabilities.get(target, 0)

    with _reading(run.relevance_table(split), "explain"):
        xray = _within(run.heatmaps(split), f"{key}.png")
    drawn = [item for item in (relevance or {}).get(key, []) if item.picture]
    drawn = sorted(drawn, key=interest)[:MOST_MAPS_OF_A_SAMPLE]
    return Card(
        key,
        sample,
        pictures.embed(xray) if xray.is_file() else None,
        [(item, pictures.embed(item.picture)) for item in drawn if item.picture],
    )


def _roc_charts(
    element: str, samples: list[Sample], metrics: Mapping[str, Any]
) -> list[tuple[str, int, Markup | None]]:
    """Draw each class against the rest: name, number of its images, chart (None if undefined)."""
    charts = []
    for place, name in enumerate(metrics["classes"]):
        is_class = np.array([sample.label == name for sample in samples])
        score = np.array([sample.probabilities[name] for sample in samples])
        num_images = int(is_class.sum())
        chart = None
        if 0 < num_images < len(samples):
            chart = Markup(pictures.roc_chart(f"{element}-roc{place}", is_class, score))
        charts.append((name, num_images, chart))
    return charts


def _undefined(metrics: Mapping[str, Any]) -> list[str]:
    """Say of each undefined number of the per-class table why it is one."""
    confusion = np.array(metrics["confusion_matrix"])
    samples = int(metrics["samples"])
    reasons = ["Accuracy: there are no images."] if metrics["accuracy"] is None else []
    for place, (name, values) in enumerate(metrics["classes"].items()):
        num_true, num_predicted = int(confusion[place].sum()), int(confusion[:, place].sum())
        why = {
            "recall": f"it needs an image of this class, and there are {num_true}",
            "precision": f"it needs an image predicted as this, and there are {num_predicted}",
            "f1": "it needs an image of this class or one predicted as it, and there is none",
            "auroc": f"it needs images of this class and of others, and there are {num_true} "
            f"and {samples - num_true}",
        }
        reasons += [
            f"{MEASURES[measure]} of {name}: {why[measure]}."
            for measure in MEASURES
            if values[measure] is None
        ]
    reasons += [
        f"Mean {label}: it needs the number of every class."
        for measure, label in MEASURES.items()
        if metrics["macro"][measure] is None
    ]
    return reasons


def _interval(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """Compute the 95 % interval of the accuracy for images taken as independent (Wilson 1927)."""
    n, z = metrics["samples"], 1.959964
    if not n:
        return None
    p = int(np.trace(metrics["confusion_matrix"])) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _ledger(relevance: Mapping[str, list[Explanation]]) -> list[dict[str, Any]]:
    """Average the ledger over the heat maps of each explained class.

    Shares are of the absolute amounts, since parts of opposite sign make no share of their sum.
    """
    by_class: dict[str, list[Explanation]] = {}
    for explanations in relevance.values():
        for explanation in explanations:
            by_class.setdefault(explanation.target, []).append(explanation)
    rows = []
    for name, found in by_class.items():
        parts = np.array([[item.pixels, item.bias, item.epsilon] for item in found])
        logits = np.array([item.logit for item in found])
        amount = np.abs(parts).sum(axis=0)
        rows.append(
            {
                "name": name,
                "num_maps": len(found),
                "logit": float(logits.mean()),
                "parts": [
                    (float(mean), share(float(part), float(amount.sum())))
                    for mean, part in zip(parts.mean(axis=0), amount, strict=True)
                ],
                "gap": float(np.abs(logits - parts.sum(axis=1)).max()),
            }
        )
    return rows
