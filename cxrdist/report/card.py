"""The model card: RUN/model/README.md, in the format of Hugging Face.

A YAML head (huggingface.co/docs/hub/model-cards), then the run's facts about the model.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from cxrdist.evaluate.metrics import headline_means
from cxrdist.files import read_bytes, write_text
from cxrdist.report.evidence import Evidence, gather
from cxrdist.report.files import weights_chain
from cxrdist.report.page import template
from cxrdist.report.values import MEASURES
from cxrdist.report.verdict import gap_lines, seen_words
from cxrdist.report.view import View
from cxrdist.run import RunDirectory

OURS = "<!-- Written by cxrdist report, which overwrites it. Remove this line to keep changes. -->"
MOST_BYTES = 1 << 20  # of a card that is read
# Figures of metrics.json with their names at Hugging Face.
METRICS = {
    "accuracy": "accuracy",
    "auroc": "roc_auc",
    "average_precision": "average_precision",
    "recall": "recall",
    "precision": "precision",
    "f1": "f1",
}
FIGURES = MEASURES["multilabel"] | {"recall": "Sensitivity (recall)"}
POINTS = {"sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV", "npv": "NPV"}


def write_card(evidence: Evidence) -> None:
    """Write ``RUN/model/README.md`` if there is a model, unless the authors keep their own card."""
    if (evidence.model or evidence.members) and not _is_kept(evidence.run):
        write_text(evidence.run.card, _render(evidence))


def read_card(run: RunDirectory) -> str:
    """Read the card that the authors keep, or render one from the run.

    Raises:
        CxrdistError: a file of the run is damaged.
    """
    if _is_kept(run):
        return read_bytes(run.card, MOST_BYTES).decode("utf-8", "replace")
    return _render(gather(run))


def _render(evidence: Evidence) -> str:
    name = evidence.run.root.resolve().name
    head = yaml.safe_dump(_head(name, evidence), sort_keys=False, allow_unicode=True)
    content = {
        "head": head,
        "ours": OURS,
        "name": name,
        "e": evidence,
        "shards": evidence.info["shards"],
        "weights": weights_chain(evidence.info),
        "subsets": [
            (subset_title(subset), metrics, seen_words(metrics))
            for subset, metrics in evidence.metrics.items()
        ],
        "figures": FIGURES,
        "points": POINTS,
        "sources": _sources(evidence),
        "gaps": [(subset_title(subset), gap_lines(m)) for subset, m in evidence.metrics.items()],
    }
    return template("card.md.jinja").render(content)


def _is_kept(run: RunDirectory) -> bool:
    """Return whether the authors keep their own card, which lacks the line `OURS`."""
    if not run.card.is_file():
        return False
    with open(run.card, encoding="utf-8", errors="replace") as file:
        return OURS not in file.read(MOST_BYTES)


def subset_title(subset: str) -> str:
    """Return a readable name for a subset."""
    kind, _, name = subset.partition("/")
    return f"external set {name}" if name else f"{kind} split"


def _head(name: str, evidence: Evidence) -> View:
    """Return the YAML head, by which Hugging Face lists and filters models."""
    results = list(_results(evidence))
    used = {figure["type"] for result in results for figure in result["metrics"]}
    # An ensemble has no architecture of its own.
    network = [evidence.model["architecture"].architecture] if evidence.model else []
    head: View = {
        "library_name": "cxrdist",
        "pipeline_tag": "image-classification",
        # The Hub wants a license_name beside a license that is not in its list.
        "license": "other",
        "license_name": "to-be-stated-by-the-authors",
        "tags": ["chest-x-ray", "medical-imaging", *network, "not-for-diagnosis"],
        "metrics": [kind for kind in METRICS.values() if kind in used],
    }
    if results:
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _results(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Yield the figures of test and external sets with an interval and enough images.

    Means are those of the headline, without the classes that have too few images. A figure has a
    type, a name and a value, as Hugging Face lists it.
    """
    for subset, metrics in evidence.metrics.items():
        scores = metrics["classes"].values()
        enough = sum(not of_class.get("too_few") for of_class in scores)
        if subset in ("val", "train") or not enough:
            continue
        of = "the classes" if enough == len(scores) else f"{enough} of {len(scores)} classes"
        values: dict[str, Any] = {**metrics, **headline_means(metrics)}
        titles: dict[str, str] = {f: f"{title}, mean of {of}" for f, title in FIGURES.items()}
        titles["accuracy"] = "Accuracy"
        seen = seen_words(metrics)
        figures = [
            {
                "type": kind,
                "name": f"{titles[figure]} ({interval[0]:.3f} to {interval[1]:.3f})",
                "value": values[figure],
            }
            for figure, kind in METRICS.items()
            if (interval := values.get(f"{figure}_interval"))
        ]
        if figures:
            yield {
                "task": {"type": "image-classification", "name": "Chest X-ray classification"},
                "dataset": {
                    "type": "chest-x-rays",
                    "name": f"{subset_title(subset)}{f' ({seen})' if seen else ''}",
                    "split": metrics.get("split", "test"),
                },
                "metrics": figures,
            }


def _sources(evidence: Evidence) -> list[tuple[str, int]]:
    """List the images by source, as the audit counted them."""
    sources = evidence.audit["sources"] if evidence.audit else None
    return [(name, row["all"]) for name, row in sources["counts"].items()] if sources else []
