"""Command compare: two runs on the same images, as terminal table, JSON, CSV and page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from cxrdist.config import CompareConfig
from cxrdist.data.labels import POSITIVE, SEPARATOR
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.compare import Comparison, Difference, aligned, compare_scored
from cxrdist.evaluate.flips import CHANGES, Flip, flips
from cxrdist.evaluate.measure import Settings
from cxrdist.evaluate.members import FIGURES
from cxrdist.evaluate.metrics import Metrics, few_of, list_few
from cxrdist.evaluate.scored import MEND, Scored, read_scored
from cxrdist.files import (
    MEND_OPTIONAL,
    atomic_directory,
    is_free,
    read_document,
    read_recipe,
    write_json,
    write_table,
    write_text,
)
from cxrdist.report import pictures
from cxrdist.report.page import template
from cxrdist.report.values import p_value, signed
from cxrdist.report.view import View
from cxrdist.run import RunDirectory, external_subset, options_of
from cxrdist.terminal import rounded, table

COLUMNS = (
    *("key", "patient", "label", "change", "predicted_a", "predicted_b"),
    *("class", "prob_a", "prob_b"),
)
"""Columns of flipped.csv; probabilities are for `class`, the true class or the flipped label."""
MOST_SHOWN = 10  # flipped images in the terminal
MOST_IN_PAGE = 200


def compare(config: CompareConfig) -> Path:
    """Compare two runs that were evaluated on the same images.

    Returns:
        The directory, with comparison.json, flipped.csv and page.html.

    Raises:
        CxrdistError: a run was not evaluated there, their images differ, or ``out`` is not empty.
    """
    if not is_free(config.out):
        raise CxrdistError(f"--out {config.out}: already exists; name a new or empty directory")
    subset = external_subset(config.name) if config.name else config.split
    runs = RunDirectory(config.run_a), RunDirectory(config.run_b)
    (a, fewest_a), (b, fewest_b) = (_read(run, subset) for run in runs)
    b = aligned(a, b, (str(config.run_a), str(config.run_b)))
    flipped = flips(a, b)
    counted = Counter(flip.change for flip in flipped)
    comparison: Comparison = {
        "format": "cxrdist-comparison-1",
        "runs": {"a": str(config.run_a), "b": str(config.run_b)},
        "place": subset,
        # The stricter of the two evaluations says how many images of a class are enough.
        **compare_scored(a, b, Settings(max(fewest_a, fewest_b))),
        "flipped": {change: counted[change] for change in CHANGES},
        "recipe": changed_fields(*runs),
    }
    rows = [_flipped_row(a, flip) for flip in flipped]
    with atomic_directory(config.out) as directory:
        write_json(directory / "comparison.json", comparison)
        write_table(directory / "flipped.csv", COLUMNS, rows)
        write_text(directory / "page.html", _page(comparison, rows))
    print(_summary(comparison, rows))
    print(f"all figures, all flipped images and a page: {config.out}")
    return config.out


def _read(run: RunDirectory, subset: str) -> tuple[Scored, int]:
    """Read the predictions of a run, and the fewest images of a class that it calls enough."""
    if not run.root.is_dir():
        raise CxrdistError(
            f"{run.root}: no such directory; give that of a finished `cxrdist train`"
        )
    if not (run.metrics(subset).is_file() and run.predictions(subset).is_file()):
        raise CxrdistError(
            f"{run.root}: has no {subset}/predictions.csv with its metrics.json; run `cxrdist "
            f"evaluate --run {run.root} --shards SHARDS {options_of(subset)}`"
        )
    metrics = read_document(run.metrics(subset), Metrics, MEND)
    scored = read_scored(run.predictions(subset), metrics["task"])
    return scored, metrics.get("fewest", Settings().fewest)


def changed_fields(a: RunDirectory, b: RunDirectory) -> list[str] | None:
    """List the fields that differ between two recipes, with their full names.

    Returns:
        Lines with - for the first and + for the second; None if a run has no recipe.
    """
    if not (a.recipe.is_file() and b.recipe.is_file()):
        return None
    first, second = (dict(_fields(read_recipe(run.recipe, MEND_OPTIONAL)[1])) for run in (a, b))
    lines = []
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            pairs = (("-", first), ("+", second))
            lines += [f"{sign} {name}: {side[name]}" for sign, side in pairs if name in side]
    return lines


def _fields(recipe: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value of a recipe by its full name, such as stages.head.epochs.

    The order of the stages is also yielded, because it matters.
    """
    for name, value in recipe.items():
        if isinstance(value, dict):
            if name == "stages":
                yield name, ", ".join(map(str, value))
            yield from _fields(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", str(value)


def _flipped_row(scored: Scored, flip: Flip) -> list[str]:
    """Return a row of flipped.csv."""
    has: NDArray[np.bool_] = scored.targets[flip.position] == POSITIVE
    label = SEPARATOR.join(name for name, own in zip(scored.classes, has, strict=True) if own)
    cells = [scored.keys[flip.position], scored.patients[flip.position], label, flip.change]
    probabilities = [f"{expit(logit):.6g}" for logit in flip.logits]
    return [*cells, *flip.predicted, flip.of, *probabilities]


def _overall(comparison: Comparison) -> list[tuple[str, Difference]]:
    """Return the figures over all classes by name."""
    first = [("Accuracy", comparison["accuracy"])] if "accuracy" in comparison else []
    means = comparison["macro"].items()
    return first + [(f"Mean {_lower(FIGURES[name])}", figure) for name, figure in means]


def _lower(name: str) -> str:
    """Write a name for use within a sentence; abbreviations such as AUROC keep their capitals."""
    return name if name[1].isupper() or name[1].isdigit() else name[0].lower() + name[1:]


def _summary(comparison: Comparison, rows: Sequence[Sequence[str]]) -> str:
    """Format overall figures, AUROC per class, tests, flips and recipes for the terminal."""
    intervals = comparison["intervals"]
    body = [[name, *_cells(figure), ""] for name, figure in _overall(comparison)]
    for name, of_class in comparison["classes"].items():
        shown = _cells(of_class["figures"]["auroc"])
        test = p_value(of_class["delong"]["p_value"]) if of_class["delong"] else "-"
        body.append([f"AUROC, {name}", *shown, "too few to say" if of_class["too_few"] else test])
    headers = ("Figure", "A", "B", "B - A", f"{intervals['level']:.0%} interval", "DeLong p")
    lines = [
        f"A: {comparison['runs']['a']}",
        f"B: {comparison['runs']['b']}",
        f"{comparison['place']}: {comparison['samples']} images of {intervals['patients']} "
        f"patients; intervals by {intervals['unit']}, {intervals['replicates']} replicates",
        table(body, headers),
    ]
    if "mcnemar" in comparison:
        mcnemar = comparison["mcnemar"]
        lines.append(
            f"only A right: {mcnemar['only_a']} images, only B right: {mcnemar['only_b']}; "
            f"McNemar's exact test p {p_value(mcnemar['p_value'])}"
        )
    lines.append("both tests treat images as independent, even those of one patient")
    if left_out := list_few(comparison):
        lines.append(f"the means leave out classes with too few images: {left_out}")
    lines += _flip_lines(comparison, rows)
    lines += _recipe_lines(comparison["recipe"])
    # `p_value` is written for the page, which must not break it.
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def _cells(figure: Difference) -> list[str]:
    shown = [rounded(figure["a"]), rounded(figure["b"])]
    limits = figure["interval"]
    if figure["difference"] is None or limits is None:
        return [*shown, "-", "-"]
    # `signed` writes the typographic minus of the page.
    signs = [signed(value).replace("\u2212", "-") for value in (figure["difference"], *limits)]
    return [*shown, signs[0], f"{signs[1]} to {signs[2]}"]


def _flip_lines(comparison: Comparison, rows: Sequence[Sequence[str]]) -> list[str]:
    counts = ", ".join(f"{change} {count}" for change, count in comparison["flipped"].items())
    lines = [f"\ndecided differently: {len(rows)} ({counts})"]
    if rows:
        lines.append(table(rows[:MOST_SHOWN], COLUMNS))
    if len(rows) > MOST_SHOWN:
        lines.append(f"and {len(rows) - MOST_SHOWN} more: flipped.csv")
    return lines


def _recipe_lines(changed: list[str] | None) -> list[str]:
    if changed is None:
        return ["\nthe recipes: a run has no recipe.yaml"]
    if not changed:
        return ["\nthe recipes are equal"]
    return ["\nthe recipes differ:", *(f"  {line}" for line in changed)]


def _page(comparison: Comparison, rows: Sequence[Sequence[str]]) -> str:
    overall = _overall(comparison)
    drawn = [
        (name, figure["difference"], limits[0], limits[1])
        for name, figure in overall
        if figure["difference"] is not None and (limits := figure["interval"]) is not None
    ]
    return template("compare.html.jinja").render(
        comparison=comparison,
        overall=overall,
        headline=_headline(comparison),
        few=few_of(comparison),
        chart=pictures.differences_chart(drawn) if drawn else None,
        names=FIGURES,
        columns=COLUMNS,
        rows=rows[:MOST_IN_PAGE],
        num_flipped=len(rows),
    )


def _headline(comparison: Comparison) -> View:
    """Choose the main figure of the page, and state the conclusion that its interval allows."""
    name = "accuracy" if "accuracy" in comparison else "auroc"
    figure = comparison["accuracy"] if name == "accuracy" else comparison["macro"]["auroc"]
    limits = figure["interval"]
    verdict = "unknown, because the figure is undefined for one of the runs"
    if name == "auroc" and len(few_of(comparison)) == len(comparison["classes"]):
        verdict = "unknown, because there are too few images of each label"
    if limits and limits[0] <= 0 <= limits[1]:
        verdict = "no difference can be shown with these images"
    elif limits:
        verdict = f"B is {'better' if limits[0] > 0 else 'worse'} than A on images like these"
    what = FIGURES[name] if name == "accuracy" else f"Mean {_lower(FIGURES[name])}"
    return {"name": what, "figure": figure, "verdict": verdict}
