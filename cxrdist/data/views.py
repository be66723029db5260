"""Views: from where an X-ray was taken, as tags, tables and file names tell it.

A text that is none of the known ones is taken for unknown, and is said.
"""

import re

UNKNOWN = ""
FRONTAL = ("PA", "AP", "FRONTAL")
"""FRONTAL: PA or AP, which of them is not told."""
LATERAL = "LATERAL"
OTHER = "OTHER"
"""Known, and neither frontal nor lateral: oblique, axial, decubitus, ribs."""
VIEWS = (*FRONTAL, LATERAL, OTHER)

# Words of a view's text in capitals; the first rule of which one word is there decides. DICOM's
# ViewPosition (PS3.3, C.8.1.5.1.3), MIMIC-CXR's, PadChest's Projection, Cohen et al.'s view.
RULES = (
    (OTHER, {"OBLIQUE", "RAO", "LAO", "RPO", "LPO", "RLO", "LLO", "AXIAL", "CORONAL", "LORDOTIC"}),
    (OTHER, {"DECUBITUS", "RLD", "LLD", "COSTAL", "RIBS", "EXCLUDE", "SWIMMERS"}),
    (LATERAL, {"LATERAL", "LAT", "LL", "RL", "L"}),
    ("PA", {"PA", "POSTEROANTERIOR", "POSTERO"}),
    ("AP", {"AP", "ANTEROPOSTERIOR", "ANTERO"}),
    ("FRONTAL", {"FRONTAL", "FRONT"}),
)
# In a file's name only whole words tell it: `view2_lateral.jpg`, not `bilateral.jpg`.
NAMED = (
    (LATERAL, re.compile(r"(?<![a-z])lateral(?![a-z])", re.IGNORECASE)),
    ("FRONTAL", re.compile(r"(?<![a-z])frontal(?![a-z])", re.IGNORECASE)),
    (LATERAL, re.compile(r"(?<![A-Za-z])LAT(?![A-Za-z])")),
    ("PA", re.compile(r"(?<![A-Za-z])PA(?![A-Za-z])")),
    ("AP", re.compile(r"(?<![A-Za-z])AP(?![A-Za-z])")),
)


def view_of(text: str) -> str | None:
    """The view that a tag or a cell of a table names.

    Returns:
        One of `VIEWS`; `UNKNOWN` for an empty text; None for a text that names none of them.
    """
    words = set(re.findall(r"[A-Z]+", text.upper()))
    if not words or words <= {"UNKNOWN", "NAN", "NONE", "NULL", "NA", "N", "A"}:
        return UNKNOWN if not re.search(r"\d", text) else None
    return next((view for view, known in RULES if words & known), None)


def view_in_name(name: str) -> str:
    """The view that a file's name tells; `UNKNOWN` if none."""
    return next((view for view, form in NAMED if form.search(name)), UNKNOWN)
