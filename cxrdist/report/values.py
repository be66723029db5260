"""How the report calls and writes a value."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from cxrdist.evaluate.metrics import ScoreName

Counted = Literal["positives", "known", "positive_patients", "patients"]
DASH = "\N{EM DASH}"
# The scores of metrics.json by task, in the order of the page.
MEASURES: dict[str, dict[ScoreName, str]] = {
    "multiclass": {
        "recall": "Sensitivity",
        "specificity": "Specificity",
        "precision": "Precision",
        "f1": "F1 score",
        "auroc": "AUROC",
        "average_precision": "Average precision",
    },
    "multilabel": {
        "auroc": "AUROC",
        "average_precision": "Average precision",
        "recall": "Sensitivity",
        "specificity": "Specificity",
        "precision": "Precision",
        "f1": "F1 score",
    },
}
# Columns of counts in the table of classes: those with the class, and all of whom it is known.
COUNTS: dict[str, tuple[Counted, Counted]] = {
    "Images": ("positives", "known"),
    "Patients": ("positive_patients", "patients"),
}


def number(value: float | None) -> str:
    """Write a value with three decimals; what is undefined is a dash."""
    return DASH if value is None or math.isnan(value) else f"{value:.3f}".replace("-", "\u2212")


def grey(value: float) -> str:
    """Write a grey level, a size in px or a share: from ten on without decimals."""
    return number(value) if abs(value) < 10 else f"{value:,.0f}"


def signed(value: float | None) -> str:
    """Write a difference with its sign and three decimals; what is undefined is a dash."""
    if value is None or math.isnan(value):
        return DASH
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\u2212")


def p_value(value: float) -> str:
    """Write a p value; what is below the third decimal is said to be below it."""
    return "< 0.001".replace(" ", "\N{NO-BREAK SPACE}") if value < 0.001 else f"{value:.3f}"


def percent(value: float | None) -> str:
    """Write a share (0 to 1) in percent, from the three decimals that `number` shows."""
    if value is None or math.isnan(value):
        return DASH
    return f"{Decimal(f'{value:.3f}') * 100:.1f} %".replace(" ", "\N{NO-BREAK SPACE}")


def fine(value: float) -> str:
    """Write a probability (0 to 1) in percent with two decimals, below 1 % with four.

    As the paper does (Bassi & Attux 2020, section 4.1).
    """
    shown = f"{value:.4%}" if value < 0.01 else f"{value:.2%}"
    return shown.replace("%", "\N{NO-BREAK SPACE}%")


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


def figure(scores: Mapping[str, Any], name: str) -> str:
    """Write a figure of metrics.json with its interval, or that it has none."""
    value, interval = scores.get(name), scores.get(f"{name}_interval")
    if value is None:
        return "not defined"
    if interval is None:
        return f"{value:.3f} (no interval)"
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def markdown(text: object) -> str:
    """Write a text so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", " ".join(str(text).split()))


def base(source: str) -> str:
    """Write where weights come from without the folders of the machine that they were on."""
    return source.rsplit("/", 1)[-1] if source.startswith("/") else source
