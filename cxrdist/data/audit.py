"""Audit: find what would invalidate results on a data set, before the training starts."""

import base64
import io
import itertools
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.audit_file import (
    AuditFile,
    Baseline,
    Estimate,
    FlatImage,
    FlatKind,
    MaskOrigins,
    Moments,
    Origins,
    Pair,
    Pairs,
    PreTraining,
    SharedPatient,
    Shortcut,
    ShownImage,
)
from cxrdist.data.baseline import measure_baseline
from cxrdist.data.duplicates import FLAT, Duplicates, Near, Pixels, join_groups
from cxrdist.data.fingerprint import Fingerprint, shrink
from cxrdist.data.index import Sample, targets_of
from cxrdist.data.labels import agree, joined, labels_of
from cxrdist.data.masks import describe_masks
from cxrdist.data.records import SPLITS, is_of_nih
from cxrdist.data.shortcut import measure_shortcut
from cxrdist.errors import CxrdistError
from cxrdist.info import Task
from cxrdist.terminal import few, percentage

SAME_THING = 0.5  # of a class's images: above this share, class and source count as confounded
STRONG = 0.5  # Cramér's V of a large effect in a table with two columns (Cohen 1988, chapter 7)
# AUROC of a small effect, of two normal distributions 0.2 standard deviations apart (Rice & Harris
# 2005, Law and Human Behavior 29, 615). In a large set smaller ones are significant as well.
SMALL_AUROC = 0.556
PICTURE_PX = 96  # as the report shows them
MOST_PICTURED = 1000  # pairs; a thumbnail has 3 kB
MOST_LISTED = 10  # in a line of the summary
# Grey levels. X-rays have a standard deviation of 40 to 80; a wrong window or depth leaves few.
FLAT_RANGE = 32  # mean and 3 standard deviations are within this many levels of black or white
UNKNOWN = "unknown"
Model = Literal["logistic_regression", "perceptron"]
MODELS: tuple[Model, ...] = get_args(Model)
FIGURES: tuple[Literal["accuracy", "mean_auroc"], ...] = ("accuracy", "mean_auroc")
PairKind = Literal["exact", "near"]
_WITHIN = "{value:.3f} ({low:.3f} to {high:.3f})"
T = TypeVar("T")
Targets = NDArray[np.int8]


@dataclass(frozen=True)
class Entry:
    """A sample with the size of its original and the fingerprint of its square."""

    sample: Sample
    width_px: int
    height_px: int
    fingerprint: Fingerprint
    mask_share: float | None = None
    """Share of the square that its mask covers; None without a mask."""

    @property
    def unknown(self) -> str:
        """Labels that are uncertain or missing, separated by ``|``."""
        return joined(self.sample.uncertain, self.sample.missing)


def audit(
    entries: Sequence[Entry],
    duplicates: Duplicates,
    pixels: Pixels,
    classes: Sequence[str],
    task: Task,
    thumbnails: Pixels | None = None,
) -> AuditFile:
    """Find leaks between splits, and ways to tell a class without looking at the disease.

    Images are numbered by their position in ``entries``. ``pixels`` returns the square of one, and
    ``thumbnails`` the result of `shrink`, which is computed here if None is given.

    Returns:
        The content of audit.json (shards/README.md). A field that cannot be computed is None, with
        the reason in ``not_made``.
    """
    not_made: dict[str, str] = {}

    def attempt(name: str, make: Callable[[], T]) -> T | None:
        return _attempt(name, make, not_made)

    pairs = attempt("duplicates", lambda: _pairs(entries, duplicates))
    features = [_features(entry) for entry in entries]
    samples = [entry.sample for entry in entries]
    targets = targets_of(samples, classes)
    truth = targets, classes
    patients: dict[str, int] = {}
    numbers = [patients.setdefault(s.patient, len(patients)) for s in samples]
    # Copies stay in one fold: a model could recognise in the test fold what it was trained on.
    groups = join_groups(numbers, duplicates.pairs)
    audit_file: AuditFile = {
        "format": "cxrdist-audit-1",
        "task": task,
        "classes": list(classes),
        "images": len(entries),
        "patients": len(patients),
        "duplicates": None if pairs is None else _count_pairs([pair for _, pair in pairs]),
        "patients_in_several_splits": shared_patients(samples, lambda sample: [sample.split]),
        "patients_in_several_classes": (
            shared_patients(samples, lambda sample: labels_of(sample.label))
            if task == "multiclass"
            else []
        ),
        "sources": attempt("sources", lambda: _cross_table([s.source for s in samples], *truth)),
        "views": attempt(
            "views", lambda: _cross_table([s.view or UNKNOWN for s in samples], *truth)
        ),
        "statistics": attempt("statistics", lambda: _statistics(features, *truth)),
        "shortcut": attempt(
            "shortcut", lambda: measure_shortcut(features, targets, groups, classes, task)
        ),
        "baseline": attempt(
            "baseline",
            lambda: measure_baseline(
                thumbnails or (lambda i: shrink(pixels(i))), targets, groups, classes, task
            ),
        ),
        "masks": attempt("masks", lambda: _masks(entries, *truth)),
        "flat": attempt("flat", lambda: _flat(entries)) or [],
        "in_pre_training": attempt("in_pre_training", lambda: _in_pre_training(samples, *truth)),
        "thumbnails": attempt("thumbnails", lambda: _thumbnails(entries, pairs or [], pixels))
        or {},
        "not_made": not_made,
        "warnings": [],
    }
    audit_file["warnings"] = _warnings(audit_file)
    return audit_file


def _attempt(name: str, make: Callable[[], T], not_made: dict[str, str]) -> T | None:
    """Return a field of the audit, or None and record why it could not be computed.

    Every error is caught, even a programming error (recorded with its type and line): shards are
    valid without an audit, and packing them again may take hours.
    """
    try:
        return make()
    except CxrdistError as error:
        not_made[name] = str(error)
    except Exception as error:
        # The innermost frame may be of a library: the last one of this package tells more.
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(__file__).parents[1] in Path(f.filename).parents][-1]
        where = f"{Path(own.filename).name} line {own.lineno}"
        not_made[name] = f"{type(error).__name__} in {where}: {error}; please report this"
    return None


def shared_patients(
    samples: Sequence[Sample], groups_of: Callable[[Sample], list[str]]
) -> list[SharedPatient]:
    """List the patients with images in several groups, with the number of images in each."""
    seen: dict[str, Counter[str]] = {}
    for sample in samples:
        seen.setdefault(sample.patient, Counter()).update(groups_of(sample))
    return [
        {"patient": patient, "images": dict(sorted(counts.items()))}
        for patient, counts in sorted(seen.items())
        if len(counts) > 1
    ]


def _shown(sample: Sample) -> ShownImage:
    return {
        "key": sample.key,
        "path": sample.path,
        "split": sample.split,
        "label": sample.label,
        "patient": sample.patient,
    }


def _pairs(entries: Sequence[Entry], duplicates: Duplicates) -> list[tuple[tuple[int, int], Pair]]:
    """Describe all pairs, with the numbers of their images; those in two splits come first."""

    def describe(near: Near, kind: PairKind) -> tuple[tuple[int, int], Pair]:
        one, other = entries[near.first], entries[near.second]
        return (near.first, near.second), {
            "kind": kind,
            "bits": near.bits,
            "correlation": near.correlation,
            "two_splits": one.sample.split != other.sample.split,
            "two_classes": not agree((e.sample.label, e.unknown) for e in (one, other)),
            "images": [_shown(one.sample), _shown(other.sample)],
        }

    pairs = [describe(near, "near") for near in duplicates.near]
    pairs += [describe(Near(*numbers, 0, 1.0), "exact") for numbers in duplicates.exact]
    return sorted(pairs, key=lambda pair: (-pair[1]["two_splits"], -pair[1]["two_classes"]))


def _count_pairs(pairs: list[Pair]) -> Pairs:
    return {
        "exact": sum(pair["kind"] == "exact" for pair in pairs),
        "near": sum(pair["kind"] == "near" for pair in pairs),
        "in_two_splits": sum(pair["two_splits"] for pair in pairs),
        "in_two_classes": sum(pair["two_classes"] for pair in pairs),
        "pairs": pairs,
    }


def _cross_table(names: Sequence[str], targets: Targets, classes: Sequence[str]) -> Origins:
    """Count images per name and class, and measure how closely name and class are related.

    Images whose class is not known are neither in the class nor in the rest; the name `UNKNOWN`
    counts neither for the association nor as a class's own.
    """
    from scipy.stats.contingency import association  # slower to import than the rest of `check`

    known = sorted(set(names))
    row_of = {name: i for i, name in enumerate(known)}
    rows = np.array([row_of[name] for name in names])
    of_class = [np.bincount(rows[target == 1], minlength=len(known)) for target in targets.T]
    # A multilabel source may have no class at all, and an empty list would have one dimension.
    inside = np.array(of_class, np.int64).reshape(-1, len(known))
    outside = [np.bincount(rows[target == 0], minlength=len(known)) for target in targets.T]
    total = np.bincount(rows, minlength=len(known))
    result: Origins = {"counts": {}, "association": {}, "own": {}}
    for name, i in row_of.items():
        by_class = dict(zip(classes, inside[:, i].tolist(), strict=True))
        result["counts"][name] = {**by_class, "all": int(total[i])}
    is_stated = np.array(known) != UNKNOWN
    for label, counts, rest in zip(classes, inside, outside, strict=True):
        # scipy raises ValueError for a row or a column of zeros.
        both = np.stack([counts, rest])[:, is_stated & (counts + rest > 0)]
        comparable = both.shape[1] > 1 and both.sum(axis=1).all()
        v = round(float(association(both, "cramer")), 4) if comparable else None
        # Without an image outside of the class, each of its names would be its own.
        own = counts[is_stated & (rest == 0)].sum() if rest.any() else 0
        result["association"][label] = v
        result["own"][label] = round(int(own) / max(1, int(counts.sum())), 4)
    return result


def _features(entry: Entry) -> dict[str, float]:
    """Return size, border and brightness of an image."""
    return {
        "width_px": entry.width_px,
        "height_px": entry.height_px,
        "width_by_height": entry.width_px / max(1, entry.height_px),
        **entry.fingerprint.statistics,
    }


def _masks(
    entries: Sequence[Entry], targets: Targets, classes: Sequence[str]
) -> MaskOrigins | None:
    """Count images with and without a mask per split and class; None if no image has one.

    If only some classes have masks, a model that uses masks can learn the class from that.
    """
    described = describe_masks([e.mask_share for e in entries if e.mask_share is not None])
    if described is None:
        return None
    have = ["without a mask" if e.mask_share is None else "with a mask" for e in entries]
    counts = Counter(zip((entry.sample.split for entry in entries), have, strict=True))
    return {
        **described,
        "splits": {
            split: {
                "with a mask": counts[split, "with a mask"],
                "without a mask": counts[split, "without a mask"],
            }
            for split in SPLITS
        },
        **_cross_table(have, targets, classes),
    }


def _statistics(
    features: Sequence[dict[str, float]], targets: Targets, classes: Sequence[str]
) -> dict[str, dict[str, Moments | None]]:
    """Return mean and standard deviation of each feature per class; None without images."""

    def moments(values: NDArray[np.float64]) -> Moments | None:
        if not len(values):
            return None
        return {"mean": round(float(values.mean()), 4), "spread": round(float(values.std()), 4)}

    table = np.array([list(row.values()) for row in features])
    return {
        name: {
            label: moments(column[target == 1])
            for label, target in zip(classes, targets.T, strict=True)
        }
        for name, column in zip(features[0], table.T, strict=True)
    }


def _flat(entries: Sequence[Entry]) -> list[FlatImage]:
    """List the squares that show nothing: constant, nearly black or nearly white."""
    return [
        {"kind": kind, **_shown(entry.sample)}
        for entry in entries
        if (kind := _flat_kind(entry.fingerprint.statistics))
    ]


def _flat_kind(statistics: dict[str, float]) -> FlatKind | None:
    mean, spread = statistics["mean"], statistics["spread"]
    # First: a constant square that is black or white would pass the next tests too.
    if spread < FLAT:
        return "constant"
    if mean + 3 * spread < FLAT_RANGE:
        return "nearly black"
    return "nearly white" if mean - 3 * spread > 255 - FLAT_RANGE else None


def _in_pre_training(
    samples: Sequence[Sample], targets: Targets, classes: Sequence[str]
) -> PreTraining:
    """Count images of ChestX-ray14 per split and class: a CheXNet was trained on most of them."""
    counts = {split: dict.fromkeys(("all", *classes), 0) for split in SPLITS}
    for sample, labels in zip(samples, targets == 1, strict=True):
        if is_of_nih(sample.source, sample.path):
            for name in ("all", *itertools.compress(classes, labels)):
                counts[sample.split][name] += 1
    return {"data_set": "ChestX-ray14", "splits": counts}


def _thumbnails(
    entries: Sequence[Entry], pairs: Sequence[tuple[tuple[int, int], Pair]], pixels: Pixels
) -> dict[str, str]:
    """Return small JPEGs of the first pairs, base64 by key; equal images need only one."""
    shown = [numbers[:1] if pair["kind"] == "exact" else numbers for numbers, pair in pairs]
    chosen = dict.fromkeys(number for numbers in shown[:MOST_PICTURED] for number in numbers)
    return {entries[number].sample.key: _thumbnail(pixels(number)) for number in chosen}


def _thumbnail(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    small = Image.fromarray(pixels).resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BILINEAR)
    small.save(buffer, "JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()


def _warnings(audit_file: AuditFile) -> list[str]:
    """Return what a reader of the run's results must know, one line each."""
    return [
        *_leaks(audit_file),
        *_empty(audit_file["flat"]),
        *_confounded(audit_file["sources"], "sources"),
        *_confounded(audit_file["views"], "views"),
        *_confounded(audit_file["masks"], "masks"),
        *_shortcuts(audit_file["shortcut"]),
        *_baseline_warning(audit_file["baseline"]),
        *_seen_before(audit_file["in_pre_training"]),
    ]


def _leaks(audit_file: AuditFile) -> Iterator[str]:
    pairs = audit_file["duplicates"]
    counts = {
        "patients with images in several splits": len(audit_file["patients_in_several_splits"]),
        "pairs of the same image in two splits": pairs["in_two_splits"] if pairs else 0,
        "pairs of the same image with different labels": pairs["in_two_classes"] if pairs else 0,
    }
    yield from (f"{what}: {number}" for what, number in counts.items() if number)
    if names := [shared["patient"] for shared in audit_file["patients_in_several_classes"]]:
        yield f"patients with images in several classes: {len(names)} ({few(names, MOST_LISTED)})"


def _empty(flat: Sequence[FlatImage]) -> Iterator[str]:
    for kind in ("constant", "nearly black", "nearly white"):
        if paths := [image["path"] for image in flat if image["kind"] == kind]:
            listed = few(paths, MOST_LISTED)
            yield f"{kind} images: {len(paths)}; check window and bit depth ({listed})"


def _confounded(table: Origins | None, what: str) -> Iterator[str]:
    """Name the classes that source, view or mask identify, at least for most of their images."""
    if table is None:
        return
    for name, share in table["own"].items():
        if share >= SAME_THING:
            yield (
                f"{share:.0%} of the images of {name} have {what} that no other image has: "
                f"the {what[:-1]} alone tells the class"
            )
    for name, v in table["association"].items():
        if (v or 0) >= STRONG and table["own"][name] < SAME_THING:
            yield (
                f"{name} is associated with the {what[:-1]}: Cramér's V is {v:.2f} (0 not at all, "
                "1 fully)"
            )


def is_told(auroc: Estimate) -> bool:
    """Return whether an AUROC is above chance, and no less than that of a small effect."""
    return auroc["low"] > 0.5 and auroc["value"] >= SMALL_AUROC


def told_classes(shortcut: Shortcut | None) -> dict[str, float]:
    """Return the AUROC of the classes that size, border and brightness tell, the largest first."""
    scores = shortcut["auroc"] if shortcut else {}
    told = {name: score["value"] for name, score in scores.items() if score and is_told(score)}
    return dict(sorted(told.items(), key=lambda item: -item[1]))


def _shortcuts(shortcut: Shortcut | None) -> Iterator[str]:
    if told := told_classes(shortcut):
        listed = [f"{name} {value:.2f}" for name, value in told.items()]
        yield (
            "size, border and brightness alone tell classes from the rest, AUROC (chance 0.5): "
            f"{few(listed, MOST_LISTED)}"
        )


def best_model(baseline: Baseline) -> tuple[str, str, Estimate] | None:
    """Return the key of the better model on thumbnails alone, its figure, and its score.

    The figure is ``accuracy`` with one class per image, else ``mean_auroc``. None is returned if no
    model could be trained.
    """
    for figure in FIGURES:
        scores = {name: score for name in MODELS if (score := baseline[name][figure])}
        if scores:
            best = max(scores, key=lambda name: scores[name]["value"])
            return best, figure, scores[best]
    return None


def _baseline_warning(baseline: Baseline | None) -> Iterator[str]:
    """Name the score that a network has to beat, if thumbnails are better than guessing."""
    best = best_model(baseline) if baseline else None
    if baseline is None or best is None:
        return
    _, figure, score = best
    if figure == "accuracy":
        is_better = score["low"] > baseline["largest_class"]
        value, low, high = (percentage(score[name]) for name in ("value", "low", "high"))
        reached = f"are right on {value}% ({low}% to {high}%)"
    else:
        is_better, reached = is_told(score), f"reach a mean AUROC of {_WITHIN.format(**score)}"
    if is_better:
        yield (
            f"thumbnails of {baseline['size_px']} px alone {reached}: "
            "only a higher score of a network means something"
        )


def _baseline_line(baseline: Baseline) -> str:
    """Return the scores of both models on thumbnails, and the number of images."""
    scores = []
    for name in MODELS:
        accuracy, auroc = (baseline[name][figure] for figure in FIGURES)
        figures = [f"accuracy {_WITHIN.format(**accuracy)}"] if accuracy else []
        figures += [f"mean AUROC {_WITHIN.format(**auroc)}"] if auroc else []
        scores.append(f"{name.replace('_', ' ')} {', '.join(figures) or 'has too few patients'}")
    images, all_of_them = baseline["images"], baseline["of_images"]
    drawn = f" drawn from {all_of_them} by patient" if images < all_of_them else ""
    return (
        f"audit: thumbnails of {baseline['size_px']} px alone, {baseline['folds']} folds by "
        f"patient, {images} images{drawn}: {'; '.join(scores)}"
    )


def _seen_before(table: PreTraining | None) -> Iterator[str]:
    seen = {split: counts["all"] for split, counts in table["splits"].items()} if table else {}
    if table and any(seen.values()):
        yield (
            f"{sum(seen.values())} images ({seen['test']} in test) are from {table['data_set']}: a "
            "network that starts from CheXNet may have seen them in its pre-training"
        )


def summary(audit_file: AuditFile) -> str:
    """Return the audit as text for the terminal."""
    pairs, baseline = audit_file["duplicates"], audit_file["baseline"]
    not_made = audit_file["not_made"].items()
    lines = []
    if pairs:
        lines.append(
            f"audit: pairs of equal images: {pairs['exact']}, of altered copies: {pairs['near']}"
        )
    lines += [_baseline_line(baseline)] if baseline else []
    lines += [f"audit: {name} not made: {reason}" for name, reason in not_made]
    lines += [f"audit warning: {line}" for line in audit_file["warnings"]]
    return "\n".join(lines)
