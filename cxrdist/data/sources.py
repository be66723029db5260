"""Sources: folders, tables and public data sets, read into records."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cxrdist.config import SourceConfig
from cxrdist.data.chestxray14 import read_chestxray14
from cxrdist.data.class_folders import read_class_folders
from cxrdist.data.covid19_radiography import read_covid19_radiography
from cxrdist.data.covidx import read_covidx
from cxrdist.data.image_table import read_image_table
from cxrdist.data.labels import SEPARATOR
from cxrdist.data.masked import folder_of_masks, with_masks
from cxrdist.data.padchest import read_padchest
from cxrdist.data.records import Source
from cxrdist.data.rsna_pneumonia import read_rsna_pneumonia
from cxrdist.data.vindr_cxr import read_vindr_cxr
from cxrdist.errors import CxrdistError


def read_source(config: SourceConfig, besides: Sequence[Path] = ()) -> Source:
    """Read all records of a source, sorted by path: the order of a table's rows tells nothing.

    Args:
        config: the options.
        besides: folders that are not looked into, such as the one that is being written.

    Raises:
        CxrdistError: the source is missing, malformed, or has fewer than two classes.
    """
    for option, only in (
        ("against_rest", "chestxray14"),
        ("drop_unusable", "covid19-radiography"),
        ("allow_outside", "csv"),
    ):
        if getattr(config, option) and config.source != only:
            raise CxrdistError(f"--{option.replace('_', '-')}: is for --source {only} only")
    folder, pattern = config.input, config.patient_pattern
    besides = (*besides, *folder_of_masks(config.masks, folder))
    if config.source == "csv":
        source = read_image_table(
            folder, pattern, allow_outside=config.allow_outside, besides=besides
        )
    elif config.source == "covid19-radiography":
        source = read_covid19_radiography(
            folder, drop_unusable=config.drop_unusable, besides=besides
        )
    elif config.source == "chestxray14":
        source = read_chestxray14(folder, config.against_rest, besides)
    elif config.source == "covidx":
        source = read_covidx(folder, besides)
    elif config.source == "rsna-pneumonia":
        source = read_rsna_pneumonia(folder, besides)
    elif config.source == "padchest":
        source = read_padchest(folder, besides)
    elif config.source == "vindr-cxr":
        source = read_vindr_cxr(folder, besides)
    else:
        source = read_class_folders(folder, pattern, besides)
    _refuse_bad_classes(config.input, source)
    if config.masks is not None:
        source = with_masks(source, config.masks)
    return replace(source, records=sorted(source.records, key=lambda record: record.path))


def _refuse_bad_classes(path: Path, source: Source) -> None:
    least = 1 if source.task == "multilabel" else 2
    if len(source.classes) < least:
        raise CxrdistError(
            f"--input {path}: found {len(source.classes)} class"
            f"{'' if len(source.classes) == 1 else 'es'} "
            f"({', '.join(source.classes) or 'none'}), expected at least {least}"
        )
    bad = next((name for name in source.classes if not name or SEPARATOR in name), None)
    if bad is not None:
        raise CxrdistError(f"--input {path}: class {bad!r}: expected a name without {SEPARATOR!r}")
    _refuse_equal_labels(f"--input {path}", source.classes)


def _refuse_equal_labels(where: str, labels: Iterable[str]) -> None:
    """Make sure that no two class names differ only in case, blanks, or as ``0`` and ``0.0``.

    Raises:
        CxrdistError: two do.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        text = " ".join(unicodedata.normalize("NFKC", label).replace("_", " ").split()).casefold()
        number = re.fullmatch(r"([+-]?\d+)\.0*", text)
        alike[number[1] if number else text].append(label)
    twice = next((names for names in alike.values() if len(names) > 1), None)
    if twice:
        raise CxrdistError(
            f"{where}: the classes {twice[0]!r} and {twice[1]!r} are one name in two spellings; "
            "write it in one way"
        )
