"""Pictures of the report: charts as inline SVG, images as data URIs.

Each function for a chart returns an ``<svg>`` element. Its ids begin with `name`, which is unique
in the page and has only letters, digits and hyphens.
"""

import base64
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from cxrdist.errors import CxrdistError
from cxrdist.files import open_regular

# Placeholders while matplotlib draws: CSS variables replace them, to follow the dark mode.
INK, FIRST, SECOND = "#010203", "#010204", "#010205"
_PAGE_COLOURS = {INK: "currentColor", FIRST: "var(--chart-first)", SECOND: "var(--chart-second)"}
_STYLE = {
    "svg.fonttype": "none",  # text stays text, which can be searched and read aloud
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
_LEGEND: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
_LARGEST_PX = 512  # of an embedded picture, so that the page stays small
MOST_PX = 1 << 26  # of a picture that is read; a heat map has at most 4096 x 4096
_JPEG_QUALITY = 88
_ROC_CELLS = 400  # along each axis; an ROC curve keeps one corner per cell


@dataclass(frozen=True)
class Picture:
    """An image embedded in the page."""

    uri: str
    """``data:`` URI."""
    width: int
    height: int
    """Like the width, in px."""


def embed(path: Path) -> Picture:
    """Encode an image file for the page: JPEG with full colour resolution, at most 512 px wide.

    Raises:
        CxrdistError: the file is not a valid PNG image.
    """
    try:
        with open_regular(path, os.O_RDONLY) as data, Image.open(data, formats=["PNG"]) as file:
            if file.width * file.height > MOST_PX:
                raise ValueError(f"{file.width} x {file.height} px")
            image = file.convert("L" if file.mode in {"1", "L"} else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CxrdistError(
            f"{path}: expected a PNG picture ({error}); write it again with `cxrdist explain`"
        ) from error
    image.thumbnail((_LARGEST_PX, _LARGEST_PX))
    encoded = io.BytesIO()
    # In heat maps red and blue pixels are adjacent: chroma subsampling would smear them.
    image.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    code = base64.b64encode(encoded.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{code}", image.width, image.height)


def loss_chart(
    name: str,
    epochs: Sequence[int],
    train: Sequence[float],
    validation: Sequence[float],
    best_epoch: int | None,
) -> Markup:
    """Draw the training and the validation loss over the epochs, and mark the best epoch.

    Epochs are counted from 0, the start of the stage. Losses are the mean of an epoch's training
    and that of the validation after it; NaN where undefined, as in the training of epoch 0.
    """

    def draw(axes: Axes) -> None:
        axes.plot(epochs, train, color=SECOND, marker="s", linestyle="--", label="training")
        _draw_epochs(axes, "loss", epochs, validation, best_epoch)

    return _chart(name, f"Loss over {epochs[-1]} epochs", draw, (4.6, 2.9))


def score_chart(
    name: str,
    epochs: Sequence[int],
    validation: Sequence[float],
    best_epoch: int | None,
    score: str,
) -> Markup:
    """Draw a validation score (0 to 1) over the epochs; arguments as for `loss_chart`."""

    def draw(axes: Axes) -> None:
        _draw_epochs(axes, score, epochs, validation, best_epoch)
        # matplotlib's margin would put values above 1 on the axis of a score.
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.02))

    return _chart(name, f"Validation {score} over {epochs[-1]} epochs", draw, (4.6, 2.9))


def roc_chart(name: str, is_class: np.ndarray, score: np.ndarray) -> Markup:
    """Draw the ROC curve of one class against the rest.

    The truth `is_class`, bool [N], has both values; `score` is float [N], and equal scores share a
    threshold.
    """
    from sklearn.metrics import roc_curve  # a third of a second to import

    false_rate, true_rate, _ = roc_curve(is_class, score)
    # Tens of thousands of images give as many corners, most of them less than half a px apart.
    cells = np.floor(_ROC_CELLS * np.stack([false_rate, true_rate]))
    first = np.diff(cells, prepend=-1).any(0)  # no cell is -1, so the first corner is kept
    false_rate, true_rate = false_rate[first], true_rate[first]

    def draw(axes: Axes) -> None:
        _draw_diagonal(axes)
        axes.plot(false_rate, true_rate, color=FIRST, clip_on=False)
        axes.fill_between(false_rate, true_rate, color=FIRST, alpha=0.12, linewidth=0)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")

    return _chart(name, "ROC curve, one class against the rest", draw, (3.3, 3.2))


def flipping_chart(
    name: str, covered_share: float, relevant_first: Sequence[float], random_order: Sequence[float]
) -> Markup:
    """Draw the probability over the covered share of the image (pixel flipping).

    The curves have equally spaced points, up to `covered_share` (0 to 1), and begin at 1.
    """
    percent = np.linspace(0, 100 * covered_share, len(relevant_first))

    def draw(axes: Axes) -> None:
        axes.plot(
            percent, random_order, color=SECOND, marker="s", linestyle="--", label="random order"
        )
        axes.plot(percent, relevant_first, color=FIRST, marker="o", label="most relevant first")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="covered part of the image, %", ylabel="probability, first = 1")
        axes.legend(**_LEGEND, ncols=2)

    return _chart(name, "Probability while the image is covered", draw, (4.6, 2.9))


def reliability_chart(
    name: str,
    positives: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    probability: Sequence[float],
    calibrated: Sequence[float] | None,
) -> Markup:
    """Draw the share of positives over the mean probability, in bins.

    Per bin there are the share of positives (0 to 1) with its interval, and the means of the
    network's probabilities and of the calibrated ones. If there are calibrated ones, the intervals
    are drawn at their means.
    """
    low, high = _ends(intervals, positives)
    # Without this the bins of a rare class would all be in one corner.
    top = min(1.0, 1.08 * max(*positives, *probability, *(calibrated or ()), 0.01))

    def draw(axes: Axes) -> None:
        _draw_diagonal(axes)
        means = calibrated or probability
        axes.vlines(means, low, high, color=FIRST, alpha=0.5, linewidth=1.2)
        if calibrated:
            axes.plot(
                probability, positives, color=SECOND, marker="s", linestyle="--", label="network"
            )
        label = "calibrated" if calibrated else "network"
        axes.plot(means, positives, color=FIRST, marker="o", label=label)
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal")
        axes.set(xlabel="mean probability", ylabel="share with it")
        axes.legend(**_LEGEND, ncols=2)

    return _chart(name, "Share of positives over the mean probability", draw, (3.3, 3.4))


def decision_chart(
    name: str,
    thresholds: Sequence[float],
    net_benefit: Sequence[float],
    intervals: Sequence[Sequence[float] | None],
    call_all: Sequence[float],
) -> Markup:
    """Draw the net benefit over the probability threshold of the reader.

    Per threshold (0 to 1) there are the net benefit of the model with its interval, and that of
    calling every image.
    """
    low, high = _ends(intervals, net_benefit)
    top = 1.1 * max(*net_benefit, *call_all, *high, 0.001)

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=INK, alpha=0.6, linestyle=":", linewidth=1.2, label="call none")
        axes.plot(thresholds, call_all, color=SECOND, linestyle="--", label="call all")
        axes.fill_between(thresholds, low, high, color=FIRST, alpha=0.15, linewidth=0)
        axes.plot(thresholds, net_benefit, color=FIRST, label="model")
        # Calling all falls to -19 at 0.95 for a rare class, which would flatten the model's curve.
        axes.set(xlim=(0, 1), ylim=(-0.3 * top, top))
        axes.set(xlabel="acts from this probability on", ylabel="net benefit")
        axes.legend(**_LEGEND, ncols=3)

    return _chart(name, "Net benefit over the threshold", draw, (4.0, 3.2))


def forest_chart(
    name: str,
    rows: Sequence[str],
    figures: Mapping[str, Sequence[tuple[float, float, float] | None]],
) -> Markup:
    """Draw figures of groups with their intervals, one row per group.

    The names of the groups are given from the top, and up to three figures by name: value, low and
    high per group, None where undefined.
    """
    styles = (("D", INK), ("o", FIRST), ("s", SECOND))

    def draw(axes: Axes) -> None:
        steps = np.linspace(-0.24, 0.24, len(figures))
        for step, (marker, colour), (label, points) in zip(
            steps, styles, figures.items(), strict=False
        ):
            drawn = [(y + step, *point) for y, point in enumerate(points) if point]
            y, value, low, high = np.array(drawn).reshape(-1, 4).T
            axes.hlines(y, low, high, color=colour, linewidth=1.4)
            axes.plot(value, y, marker, color=colour, label=label)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
        shown = [
            text if len(text) <= 24 else f"{text[:23]}\N{HORIZONTAL ELLIPSIS}" for text in rows
        ]
        # Names may contain dollar signs, which matplotlib would parse as a formula.
        axes.set_yticks(range(len(rows)), shown, parse_math=False)
        on_the_right = _LEGEND | {"loc": "lower right", "bbox_to_anchor": (1, 1)}
        axes.legend(**on_the_right, ncols=3, handletextpad=0.2, columnspacing=0.8)

    size = (4.6, 0.9 + 0.42 * len(rows))
    return _chart(name, "Figures of each group with their intervals", draw, size)


def differences_chart(rows: Sequence[tuple[str, float, float, float]]) -> Markup:
    """Draw a row per name, difference, lower limit and upper limit, and a line at 0."""
    rows_from_top = np.arange(len(rows))[::-1]
    values, lows, highs = (np.array([row[i] for row in rows]) for i in (1, 2, 3))

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=INK, alpha=0.5, linewidth=1.2)
        axes.hlines(rows_from_top, lows, highs, color=FIRST)
        axes.plot(values, rows_from_top, color=FIRST, marker="o", linestyle="none")
        axes.set_yticks(rows_from_top, [row[0] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("difference, B \u2212 A")

    size = (4.6, 0.7 + 0.28 * len(rows))
    return _chart("differences", "Differences with their intervals", draw, size)


def _draw_epochs(
    axes: Axes, what: str, epochs: Sequence[int], values: Sequence[float], best_epoch: int | None
) -> None:
    """Draw values on validation images over the epochs, and mark that of the kept weights."""
    axes.plot(epochs, values, color=FIRST, marker="o", label="validation")
    if best_epoch is not None and best_epoch in epochs:
        axes.axvline(best_epoch, color=INK, alpha=0.5, linestyle=":", linewidth=1.2)
        best = values[epochs.index(best_epoch)]
        (ring,) = axes.plot(best_epoch, best, "o", linestyle="none", label="best epoch")
        ring.set(markersize=10, markerfacecolor="none", markeredgecolor=INK)
    axes.set(xlabel="epoch", ylabel=what)
    # Less than 1, or the axis would show an epoch that does not exist.
    margin = min(0.9, max(0.5, 0.015 * len(epochs)))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(**_LEGEND, ncols=3, handlelength=1.6, columnspacing=1.2)


def _draw_diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linestyle=":", linewidth=1.2)


def _ends(
    intervals: Sequence[Sequence[float] | None], values: Sequence[float]
) -> NDArray[np.float64]:
    """Return the ends of intervals, [2, N]; those of a value without an interval are the value."""
    pairs = zip(intervals, values, strict=True)
    return np.array([within or (value, value) for within, value in pairs]).T


def _chart(
    name: str, label: str, draw: Callable[[Axes], None], size_inches: tuple[float, float]
) -> Markup:
    """Draw a chart as an ``<svg>`` with the colours and the font of the page.

    The user's matplotlib settings are ignored, so that a run always gives the same bytes.
    """
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": name}]):
        # Not pyplot, which keeps every figure and chooses a backend for the screen.
        figure = Figure(figsize=size_inches, layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return Markup(_inline(text.getvalue(), name, label))


def _inline(svg: str, name: str, label: str) -> str:
    """Turn matplotlib's SVG file into an element; prefix its ids to be unique in the page."""
    svg = svg[svg.index("<svg") :]
    # The metadata has the time of drawing, so that two reports of a run would differ.
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The rule for `*` would hold for the whole page; style.css.jinja has it for the charts.
    svg = re.sub(r"\s*<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    # Without a family, texts have the font of the page.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    # Without a size, the chart is as wide as its column.
    size = r'width="[\d.]+pt" height="[\d.]+pt"'
    return re.sub(size, f'role="img" aria-label="{label}"', svg, count=1)
