"""What the report shows of one split: scores, mistakes, heat maps, ledger."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from cxrdist.data.labels import NOT_STATED
from cxrdist.evaluate.scored import Prediction, read_predictions
from cxrdist.explain.description import RelevanceInfo
from cxrdist.info import ShardsInfo
from cxrdist.report import pictures
from cxrdist.report.calibration import calibration_view
from cxrdist.report.files import Explanation, read_metrics, read_relevance, read_tests, reading
from cxrdist.report.groups import groups_view
from cxrdist.report.mistakes import embed_key, mistakes_view
from cxrdist.report.outside import outside_view
from cxrdist.report.scores import check_same_evaluation, roc_charts, score_view
from cxrdist.report.values import share
from cxrdist.report.view import SplitView, View
from cxrdist.run import RunDirectory, options_of

MOST_OF_A_CLASS = 4
MOST_IN_GALLERY = 24
MOST_MAPS_OF_A_SAMPLE = 4


def split_view(
    run: RunDirectory, split: str, element: str, task: str, classes: Sequence[str] | None = None
) -> SplitView:
    """Gather all values for one split; None for what was not made.

    The ids of its elements begin with `element`. Without the model's `classes` there can be no heat
    maps.

    Raises:
        CxrdistError: a file is damaged, or predictions and metrics are of different evaluations.
    """
    metrics = read_metrics(run.metrics(split), task)
    written = run.predictions(split)
    samples = read_predictions(written, task) if written.is_file() else None
    explained = read_relevance(run, split, classes)
    relevance = explained or {}
    if metrics and samples is not None:
        check_same_evaluation(run, split, metrics, samples)
    # Types cannot tell that lists have equal lengths or that groups exist: errors show up here.
    with reading(run.metrics(split), "evaluate"):
        calibration = calibration_view(element, metrics) if metrics else None
        groups = groups_view(element, metrics) if metrics else None
    by_key = {sample.key: sample for sample in samples or []}
    shown = _gallery(relevance, by_key)
    tests = read_tests(run, split) if relevance else None
    return {
        "name": split.replace("external/", "external set "),
        "subset": split,
        "options": options_of(split),
        "element": element,
        "metrics": metrics,
        "scores": score_view(metrics) if metrics else None,
        "calibration": calibration,
        "samples": samples,
        "roc": roc_charts(element, samples, metrics) if samples and metrics else None,
        "mistakes": (
            None if samples is None else mistakes_view(run, split, samples, task, relevance)
        ),
        "groups": groups,
        "explained": explained is not None,
        "ledger": _ledger(relevance),
        "tests": tests,
        "flipping_chart": tests and _flipping_chart(tests, element),
        "outside": tests and outside_view(run, split, tests["outside"]),
        "gallery": [
            (label, [_card(run, split, key, by_key, relevance) for key in keys])
            for label, keys in shown.items()
        ],
    }


def open_labels(shards: ShardsInfo) -> list[tuple[str, list[int]]]:
    """Count by split the labels that the source does not state: uncertain, missing, assumed absent.

    Returns:
        A row per label; empty if the source states all labels.
    """
    rows = []
    for name in shards["classes"]:
        of_splits = [amounts[name] for amounts in shards["counts"].values()]
        rows.append((name, [amount.get(what, 0) for amount in of_splits for what in NOT_STATED]))
    return rows if any(any(cells) for _, cells in rows) else []


def _gallery(
    relevance: Mapping[str, list[Explanation]], samples: Mapping[str, Prediction]
) -> dict[str | None, list[str]]:
    """Pick the first few samples of each class that have heat maps, in the order of the file.

    The network's success plays no role, so that the gallery shows typical maps. A sample with
    several labels is listed under its first one, one without labels under an empty name, and all
    under None if the split was explained but not evaluated.
    """
    classes = next(iter(samples.values())).probabilities if samples else {}
    keys: dict[str | None, list[str]] = {name: [] for name in classes}
    for key, explanations in relevance.items():
        if any(explanation.picture for explanation in explanations):
            label = next(iter(samples[key].labels), "") if key in samples else None
            keys.setdefault(label, []).append(key)
    most = max(1, min(MOST_OF_A_CLASS, MOST_IN_GALLERY // max(1, len(keys))))
    return {label: of_label[:most] for label, of_label in keys.items() if of_label}


def _card(
    run: RunDirectory,
    split: str,
    key: str,
    samples: Mapping[str, Prediction],
    relevance: Mapping[str, list[Explanation]],
) -> View:
    """Gather the existing X-ray and heat maps of one sample of the gallery.

    The sample is None if the split was explained but not evaluated. The contrast comes first: it
    depends most on the trained weights. Of many heat maps those of the truth, the prediction and
    the likeliest classes are kept.
    """
    sample = samples.get(key)

    def interest(explanation: Explanation) -> tuple[bool, bool, float]:
        # False sorts before True.
        target = explanation.target
        if sample is None:
            return not explanation.is_contrast, True, 0.0
        rank = -sample.logits.get(target, -math.inf)
        is_relevant = target in sample.labels + sample.predicted
        return not explanation.is_contrast, not is_relevant, rank

    drawn = [item for item in relevance[key] if item.picture]
    drawn = sorted(drawn, key=interest)[:MOST_MAPS_OF_A_SAMPLE]
    return {
        "key": key,
        "sample": sample,
        "xray": embed_key(run.heatmaps(split), key, "explain"),
        "maps": [(item, pictures.embed(item.picture)) for item in drawn if item.picture],
    }


def _ledger(relevance: Mapping[str, list[Explanation]]) -> list[View]:
    """Average the ledger over the heat maps of each explained class, if the rules keep one.

    Shares are of the absolute amounts, because parts of opposite sign have no share of their sum.
    """
    by_class: dict[str, list[Explanation]] = {}
    for explanations in relevance.values():
        for explanation in explanations:
            if explanation.bias is None or explanation.is_contrast:
                continue
            by_class.setdefault(explanation.target, []).append(explanation)
    rows: list[View] = []
    for name, maps in by_class.items():
        parts = np.array([[item.pixels, item.bias, item.epsilon] for item in maps])
        logits = np.array([item.logit for item in maps])
        amount = np.abs(parts).sum(axis=0)
        rows.append(
            {
                "name": name,
                "num_maps": len(maps),
                "logit": float(logits.mean()),
                "parts": [
                    (float(mean), share(float(part), float(amount.sum())))
                    for mean, part in zip(parts.mean(axis=0), amount, strict=True)
                ],
                "gap": float(np.abs(logits - parts.sum(axis=1)).max()),
            }
        )
    return rows


def _flipping_chart(tests: RelevanceInfo, element: str) -> Markup | None:
    """Draw the curves of pixel flipping."""
    flipping = tests["pixel_flipping"]
    return flipping and pictures.flipping_chart(
        f"{element}-flipping",
        flipping["covered_share"],
        flipping["relevant_first"],
        flipping["random_order"],
    )
