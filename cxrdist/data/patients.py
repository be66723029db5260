"""Patients: parse patient, sex and age from file names, tables and tags."""

import math
import re

from cxrdist.data.records import own_patient
from cxrdist.errors import CxrdistError

MOST_YEARS = 120.0
# Units of an age string, in years (DICOM PS3.5, section 6.2, AS).
AGE_UNITS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
ROUNDED = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")  # a long number as spreadsheets write it
SEXES = {"m": "M", "male": "M", "f": "F", "female": "F"}


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile ``--patient-pattern``.

    Raises:
        CxrdistError: it is not a regular expression with a group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise CxrdistError(
            f"--patient-pattern {pattern!r}: is not a valid regular expression ({error})"
        ) from error
    if compiled.groups == 0:
        raise CxrdistError(
            f"--patient-pattern {pattern!r}: expected a group around the patient, such as ^(\\d+)_"
        )
    return compiled


def patient_of(path: str, pattern: re.Pattern[str] | None) -> str:
    """Return the first group that the pattern finds in a file's name; else a placeholder."""
    match = pattern.search(path.rsplit("/", 1)[-1]) if pattern else None
    named = next((group for group in match.groups() if group), None) if match else None
    return named or own_patient(path)


def refuse_rounded(where: str, patient: str) -> None:
    """Reject a patient's ID such as 1.23E+15; ``where`` names file and row in the message."""
    if ROUNDED.fullmatch(patient):
        raise CxrdistError(
            f"{where}: patient {patient} was rounded by a spreadsheet and may stand for several "
            "patients; use the original table"
        )


def sex_of(text: str) -> str:
    """Return M, F, or empty for any other text."""
    return SEXES.get(text.strip().casefold(), "")


def stated_age(text: str) -> float | None:
    """Return the age in years; None if the text is empty, NaN if it is not valid."""
    age = age_of(text)
    return math.nan if age is None and text.strip() else age


def age_of(text: str) -> float | None:
    """Return the years of an age such as 45, 45.5, 045Y, 018M, 003W or 010D; else None."""
    match = re.fullmatch(r"(\d{1,6}(?:[.,]\d{1,9})?) ?([YMWD]?)", text.strip().upper())
    if not match:
        return None
    years = float(match[1].replace(",", ".")) * AGE_UNITS[match[2]]
    return years if years <= MOST_YEARS else None
