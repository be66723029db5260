"""Progress bars, tables, lists and numbers for the terminal."""

import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from tabulate import tabulate
from tqdm import tqdm


def progress(total: int | None, title: str, unit: str, *, show: bool = True, done: int = 0) -> tqdm:
    """Open a bar with rate and time left on stderr; in a log file it moves every ten seconds.

    Bytes, the unit ``B``, are shown in kB and MB.
    """
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        disable=not show,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


def few(names: Sequence[str], most: int) -> str:
    """Join the first names by commas; add the number of the others, if there are any."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Return a number with its noun, such as "1 image" or, with the ending of the plural, more."""
    return f"{number} {noun}{'' if number == 1 else ending}"


def percentage(share: float) -> str:
    """Return a share (0 to 1) in percent with one decimal, without the sign.

    Terminal, documents and pages all round by this function, so that they show the same digits.
    """
    # From three decimals: rounding the value itself again could give another last digit.
    return f"{Decimal(f'{share:.3f}') * 100:.1f}"


def rounded(value: float | None, digits: int = 3) -> str:
    """Format a figure, or its absence."""
    return "-" if value is None else f"{value:.{digits}f}"


def with_limits(value: float, limits: Sequence[float] | None) -> str:
    """Format a figure and, if it has one, its interval."""
    return f"{value:.3f} ({limits[0]:.3f}-{limits[1]:.3f})" if limits else f"{value:.3f}"


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Format rows for the terminal; numbers keep the text that they were given."""
    return tabulate(rows, headers=list(headers), disable_numparse=True, missingval="-")
