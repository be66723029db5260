"""Views: the projection of an X-ray, according to tables, DICOM tags and file names.

A table takes precedence over a DICOM tag, and a tag over a file's name. A text that names no known
view, or both a frontal and a lateral one, counts as unknown and is reported.
"""

import re
from functools import lru_cache

from cxrdist.errors import CxrdistError

UNKNOWN = ""
FRONTAL = ("PA", "AP", "FRONTAL")
"""FRONTAL: PA or AP, it is not known which."""
LATERAL = "LATERAL"
OTHER = "OTHER"
"""Known, and neither frontal nor lateral: oblique, axial, decubitus, ribs."""
VIEWS = (*FRONTAL, LATERAL, OTHER)
PACKED = (*FRONTAL, UNKNOWN)  # the default of --views
NAMES = {
    **{"PA": "PA", "AP": "AP", "FRONTAL": "frontal", LATERAL: "lateral", OTHER: "other"},
    UNKNOWN: "unknown",
}
LEFT_OUT = {view: f"{name} view (--views)" for view, name in NAMES.items()}

# For texts in capitals with one blank between words; the first rule that matches decides. The words
# are from DICOM's View Position (PS3.3, C.8.1.1.1) and View codes (PS3.16, CID 4010), MIMIC-CXR's
# ViewPosition, PadChest's Projection, CheXpert's AP/PA and Cohen et al.'s view (2020). OTHER comes
# first, since AP AXIAL, PA LLD and LATERAL DECUBITUS are not what one of their words says.
_PA = r"\b(PA|POSTERO ?ANTERIOR|POSTERIOR ANTERIOR)\b"
_AP = r"\b(AP|ANTERO ?POSTERIOR|ANTERIOR POSTERIOR)\b"
RULES = (
    (OTHER, re.compile(r"\b(OTHER|OBLIQUE|[RL][AP]O|[RL]LO|SWIMMERS?)\b")),
    (OTHER, re.compile(r"\b(AXIAL|CORONAL|LORDOTIC|DECUBITUS|[RL]LD|COSTAL|RIBS?|EXCLUDE)\b")),
    (LATERAL, re.compile(r"\b(LAT|LATERAL|LATERO ?LATERAL|LL|RL)\b|^L$")),
    ("FRONTAL", re.compile(f"{_PA}.*{_AP}|{_AP}.*{_PA}")),
    ("PA", re.compile(_PA)),
    ("AP", re.compile(_AP)),
    ("FRONTAL", re.compile(r"\bFRONTAL\b")),
)
NOTHING = re.compile(r"(UNK(NOWN)?|NAN?|NONE|NULL|N A)?")
# In a file's name only whole words count: `view2_lateral.jpg`, not `bilateral.jpg`, `PA017.png`.
# BIMCV's names have `vp-ll`.
NAMED = (
    (OTHER, re.compile(r"(?<![a-z])(decubitus|oblique|lordotic)(?![a-z])", re.IGNORECASE)),
    (LATERAL, re.compile(r"(?<![a-z])(lateral|vp-ll)(?![a-z])", re.IGNORECASE)),
    (LATERAL, re.compile(r"(?<![A-Za-z0-9])LAT(?![A-Za-z0-9])")),
    ("PA", re.compile(r"(?<![A-Za-z0-9])PA(?![A-Za-z0-9])|(?<![a-z])vp-pa(?![a-z])")),
    ("AP", re.compile(r"(?<![A-Za-z0-9])AP(?![A-Za-z0-9])|(?<![a-z])vp-ap(?![a-z])")),
    ("FRONTAL", re.compile(r"(?<![a-z])frontal(?![a-z])", re.IGNORECASE)),
)


@lru_cache(maxsize=1024)  # the rows of a table repeat a few texts
def view_of(text: str) -> str | None:
    """Return which of `VIEWS` a tag or a cell of a table names.

    An empty text is `UNKNOWN`. None stands for a text that names no view, or both a frontal and a
    lateral one.
    """
    words = " ".join(re.findall(r"[A-Z0-9]+", text.upper()))
    if NOTHING.fullmatch(words):
        return UNKNOWN
    named = [view for view, form in RULES if form.search(words)]
    return None if _is_both(named) else next(iter(named), None)


def view_in_name(name: str) -> str:
    """Return the view that a file's name contains; `UNKNOWN` if none, or frontal and lateral.

    The names of its folders are ignored: they may be classes.
    """
    named = [view for view, form in NAMED if form.search(name)]
    return UNKNOWN if _is_both(named) else next(iter(named), UNKNOWN)


def _is_both(named: list[str]) -> bool:
    return OTHER not in named and LATERAL in named and len({*named}) > 1


def disagree(one: str, other: str) -> bool:
    """Return whether two views contradict each other; FRONTAL may be PA or AP."""
    both = {one, other}
    if UNKNOWN in both or one == other:
        return False
    return "FRONTAL" not in both or not both <= {*FRONTAL}


def parse_views(text: str | None) -> tuple[str, ...]:
    """Parse ``--views``.

    Raises:
        CxrdistError: it has an unknown view.
    """
    if text is None:
        return PACKED
    names = [name.strip().upper() for name in text.split(",")]
    if names == ["ALL"]:
        return (*VIEWS, UNKNOWN)
    bad = next((name for name in names if name not in (*VIEWS, "UNKNOWN")), None)
    if bad is not None:
        raise CxrdistError(
            f"--views {text}: {bad or 'an empty name'!r} is not a view; expected "
            f"{', '.join(VIEWS)}, UNKNOWN, separated by commas, or all"
        )
    return tuple(UNKNOWN if name == "UNKNOWN" else name for name in dict.fromkeys(names))
