"""Progress bars, tables and lists for the terminal."""

import sys
from collections.abc import Sequence
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


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Format rows for the terminal; numbers keep the text that they were given."""
    return tabulate(rows, headers=list(headers), disable_numparse=True, missingval="-")
