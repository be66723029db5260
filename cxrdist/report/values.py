"""Labels and number formats of the report."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from cxrdist.evaluate.members import FIGURES
from cxrdist.evaluate.metrics import SCORES, TITLES, ScoreName
from cxrdist.terminal import percentage

Counted = Literal["positives", "known", "positive_patients", "patients"]
DASH = "\N{EM DASH}"
# The scores of metrics.json by task, in the order of the page.
MEASURES: dict[str, dict[ScoreName, str]] = {
    "multiclass": {name: FIGURES[name] for name in SCORES},
    "multilabel": {name: FIGURES[name] for name in TITLES},
}
# Columns of the table of classes: the count with the class, and the count whose label is known.
COUNTS: dict[str, tuple[Counted, Counted]] = {
    "Images": ("positives", "known"),
    "Patients": ("positive_patients", "patients"),
}


def number(value: float | None) -> str:
    """Format a value with three decimals; a dash if undefined."""
    # The format z drops the sign of -0.000; U+2212 is the typographic minus.
    return DASH if value is None or math.isnan(value) else f"{value:z.3f}".replace("-", "\u2212")


def grey(value: float) -> str:
    """Format a grey level, a size in px or a share; without decimals from ten on."""
    return number(value) if abs(value) < 10 else f"{value:,.0f}"


def signed(value: float | None) -> str:
    """Format a difference with its sign and three decimals; a dash if undefined."""
    return DASH if value is None or math.isnan(value) else f"{value:+z.3f}".replace("-", "\u2212")


def p_value(value: float) -> str:
    """Format a p value with three decimals, or as < 0.001."""
    return "< 0.001".replace(" ", "\N{NO-BREAK SPACE}") if value < 0.001 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Format a share (0 to 1) in percent, rounded like `number`."""
    if value is None or math.isnan(value):
        return DASH
    return f"{percentage(value)}\N{NO-BREAK SPACE}%"


def interval(
    limits: Sequence[float] | None,
    style: Literal["number", "percent", "signed"] = "number",
    nothing: str = "",
) -> str:
    """Format an interval, each limit by the function `style`; return `nothing` if there is none."""
    write: Callable[[float], str] = {"number": number, "percent": percent, "signed": signed}[style]
    return f"{write(limits[0])} to {write(limits[1])}" if limits else nothing


def cell(
    scores: Mapping[str, Any] | None, name: str, style: Literal["number", "percent"] = "number"
) -> tuple[str, str]:
    """Format a figure and, for the small text below, its interval; a dash where undefined."""
    scores, write = scores or {}, number if style == "number" else percent
    return write(scores.get(name)), interval(scores.get(f"{name}_interval"), style)


def fine(value: float) -> str:
    """Format a probability (0 to 1) in percent with two decimals, below 1 % with four.

    The paper does the same (Bassi & Attux 2020, section 4.1).
    """
    shown = f"{value:.4%}" if value < 0.01 else f"{value:.2%}"
    return shown.replace("%", "\N{NO-BREAK SPACE}%")


def count(value: int | None) -> str:
    """Format an integer with thousands separators."""
    return DASH if value is None else f"{value:,}"


def counted(value: int, noun: str) -> str:
    """Format an integer with its noun, in the plural unless it is 1."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def rate(value: float) -> str:
    """Format a value of any magnitude, such as a learning rate, with three significant digits."""
    return f"{value:.3g}"


def share(part: float, whole: float) -> float | None:
    """Return part / whole; None if the whole is 0."""
    return part / whole if whole else None


def colour(rgb: Sequence[float], opacity: float) -> str:
    """Format a colour (0 to 255 each) with its opacity (0 to 1) for CSS."""
    red, green, blue = rgb
    return f"rgb({red:.0f} {green:.0f} {blue:.0f} / {opacity:g})"


def moment(value: str | None) -> str:
    """Format an ISO time for readers, to the minute, with its zone."""
    if value is None:
        return DASH
    time = datetime.fromisoformat(value)
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()


def figure(scores: Mapping[str, Any], name: str) -> str:
    """Format a figure of metrics.json with its interval, or say that it has none."""
    value, interval = scores.get(name), scores.get(f"{name}_interval")
    if value is None:
        return "not defined"
    if interval is None:
        return f"{value:.3f} (no interval)"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def markdown(text: object) -> str:
    """Escape a text for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", " ".join(str(text).split()))


def base_name(source: str) -> str:
    """Return the source of weights without the folders of a local path."""
    return source.rsplit("/", 1)[-1] if source.startswith("/") else source
