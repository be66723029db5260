"""Sources: folders, tables and public data sets, read into records."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cxrdist.config import SourceConfig
from cxrdist.data.chestxray14 import read_chestxray14
from cxrdist.data.chexpert import read_chexpert
from cxrdist.data.class_folders import read_class_folders
from cxrdist.data.collector import collector_paused
from cxrdist.data.covid19_radiography import read_covid19_radiography
from cxrdist.data.covidx import read_covidx
from cxrdist.data.found import IMAGE_SUFFIXES, LeftOut
from cxrdist.data.image_table import read_image_table
from cxrdist.data.images import DICOM_SUFFIXES
from cxrdist.data.label_map import LabelMap, map_labels, read_label_map
from cxrdist.data.labels import SEPARATOR, joined
from cxrdist.data.masked import folder_of_masks, with_masks
from cxrdist.data.mimic_cxr import read_mimic_cxr
from cxrdist.data.padchest import read_padchest
from cxrdist.data.records import Record, Source
from cxrdist.data.rsna_pneumonia import read_rsna_pneumonia
from cxrdist.data.several import read_several
from cxrdist.data.views import LEFT_OUT, NAMES, UNKNOWN, parse_views, view_in_name, view_of
from cxrdist.data.vindr_cxr import read_vindr_cxr
from cxrdist.documents import CONTROL
from cxrdist.errors import CxrdistError
from cxrdist.terminal import counted, few

ONLY_FOR = {
    "against_rest": ("chestxray14",),
    "drop_unusable": ("covid19-radiography",),
    "allow_outside": ("csv",),
    "patient_pattern": ("folder", "csv"),
}
MOST_NAMED = 3  # texts in a note


@collector_paused()
def read_source(
    config: SourceConfig, besides: Sequence[Path] = (), least_classes: int = 2
) -> Source:
    """Read all records of a source, sorted by path, so that the order of rows does not matter.

    Folders in ``besides``, such as the one that is being written, are skipped. ``least_classes`` is
    for a source with one class per image.

    Raises:
        CxrdistError: the source is missing, malformed, or has fewer classes.
    """
    if config.source == "several":
        labels = _label_map(config)
        source = read_several(config, besides, _read_one)
        source = map_labels(source, labels, f"--label-map {config.label_map}")
    else:
        source = _read_one(config, besides)
    _refuse_no_records(config.input, source)
    _refuse_bad_classes(config.input, source, least_classes)
    return replace(source, records=sorted(source.records, key=lambda record: record.path))


def _read_one(config: SourceConfig, besides: Sequence[Path]) -> Source:
    """Read a source with its own labels and views; reject options that are for other sources."""
    _refuse_options_of_others(config)
    views = parse_views(config.views)
    labels = _label_map(config)
    source = _read(config, besides)
    if config.masks is not None:
        source = with_masks(source, config.masks)
    source = map_labels(source, labels, f"--label-map {config.label_map}")
    # After the label map, so that a class that it drops is not missed among the views.
    source = _with_views(config, source, views)
    # Before several sources are merged: labels that a whole source lacks must stay missing.
    if config.empty_cells == "negative":
        source = assume_absent(source)
    if config.source not in ("folder", "csv"):
        source = replace(source, public=frozenset(r.source for r in source.records))
    return source


def _label_map(config: SourceConfig) -> LabelMap:
    """Return the label map; it is read first, since reading the source may take long."""
    return {} if config.label_map is None else read_label_map(config.label_map)


def _read(config: SourceConfig, besides: Sequence[Path]) -> Source:
    """Read a source as it is."""
    folder, pattern = config.input, config.patient_pattern
    if config.source != "csv" and not folder.is_dir():
        what = "one sub-folder per class" if config.source == "folder" else "the unpacked data set"
        raise CxrdistError(f"--input {folder}: no such folder; expected {what}")
    besides = (*besides, *folder_of_masks(config.masks, folder))
    match config.source:
        case "csv":
            return read_image_table(
                folder, pattern, allow_outside=config.allow_outside, besides=besides
            )
        case "covid19-radiography":
            return read_covid19_radiography(
                folder, drop_unusable=config.drop_unusable, besides=besides
            )
        case "chestxray14":
            return read_chestxray14(folder, config.against_rest, besides)
        case "chexpert":
            return read_chexpert(folder, besides)
        case "covidx":
            return read_covidx(folder, besides)
        case "mimic-cxr":
            return read_mimic_cxr(folder, besides)
        case "padchest":
            return read_padchest(folder, besides)
        case "rsna-pneumonia":
            return read_rsna_pneumonia(folder, besides)
        case "vindr-cxr":
            return read_vindr_cxr(folder, besides)
    return read_class_folders(folder, pattern, besides)


def _refuse_options_of_others(config: SourceConfig) -> None:
    for option, sources in ONLY_FOR.items():
        if getattr(config, option) not in (None, False) and config.source not in sources:
            raise CxrdistError(
                f"--{option.replace('_', '-')}: works only with --source {' and '.join(sources)}"
            )


def _with_views(config: SourceConfig, source: Source, wanted: tuple[str, ...]) -> Source:
    """Set the view of each record from its table or file name, and leave out unwanted views.

    For a DICOM file the tag goes before the name, so `pack` decides once it has read the tag. It is
    an error if no image is left, or none of a class.
    """
    strange = Counter(r.view for r in source.records if view_of(r.view) is None)
    kept: list[Record] = []
    left_out: list[LeftOut] = []
    for record in source.records:
        view = view_of(record.view) or UNKNOWN
        # A file without the suffix of an image may be DICOM too.
        has_tag = record.file.suffix.lower() not in IMAGE_SUFFIXES - DICOM_SUFFIXES
        if view == UNKNOWN and not has_tag:
            view = view_in_name(record.file.name)
        if view in wanted or (view == UNKNOWN and has_tag):
            kept.append(record if record.view == view else replace(record, view=view))
        else:
            left_out.append(LeftOut(record.path, LEFT_OUT[view]))
    _refuse_lost_classes(config, source, kept, wanted)
    return replace(
        source,
        records=kept,
        notes=(*_notes_before_views(source, len(kept)), *_view_notes(strange)),
        left_out=tuple(sorted((*source.left_out, *left_out))),
        views={"": wanted},
    )


def _notes_before_views(source: Source, num_kept: int) -> Iterable[str]:
    """Return the notes of a source; counts say that they include views that are left out."""
    if num_kept == len(source.records):
        return source.notes
    return (f"{n} (before views are chosen)" if n[:1].isdigit() else n for n in source.notes)


def _view_notes(strange: Counter[str]) -> Iterator[str]:
    texts = few([repr(text)[:40] for text, _ in strange.most_common()], MOST_NAMED)
    if strange:
        yield f"{strange.total()} images have a view that cxrdist does not know: {texts}"


def _refuse_lost_classes(
    config: SourceConfig, source: Source, kept: Sequence[Record], wanted: Iterable[str]
) -> None:
    given, there = ({record.label for record in records} for records in (source.records, kept))
    lost = sorted(given - there) if source.task == "multiclass" else []
    if lost or (given and not there):
        what = f"image of class {lost[0]!r}" if there else "image"
        raise CxrdistError(
            f"--input {config.input}: has no {what} of the views that are packed "
            f"({', '.join(NAMES[view] for view in wanted)}); give --views all to pack all"
        )


def assume_absent(source: Source) -> Source:
    """Count missing labels as absent; each record lists them as assumed absent."""
    if not any(record.missing for record in source.records):
        note = "--empty-cells negative: no image has an empty cell"
        return replace(source, notes=(*source.notes, note))
    records = [
        replace(r, missing="", assumed_absent=joined(r.assumed_absent, r.missing))
        if r.missing
        else r
        for r in source.records
    ]
    return replace(source, records=records)


def _refuse_no_records(path: Path, source: Source) -> None:
    if not source.records:
        reasons = Counter(left.reason for left in source.left_out).most_common(MOST_NAMED)
        listed = ", ".join(f"{number} {reason}" for reason, number in reasons) or "it is empty"
        raise CxrdistError(f"--input {path}: no image is left to pack: {listed}")


def _refuse_bad_classes(path: Path, source: Source, least_classes: int) -> None:
    least, number = 1 if source.task == "multilabel" else least_classes, len(source.classes)
    if number < least:
        raise CxrdistError(
            f"--input {path}: found {counted(number, 'class', 'es')} "
            f"({', '.join(source.classes) or 'none'}), expected at least {least}"
            f"{' (1 with --split 0/0/1, for evaluation only)' if least == 2 else ''}"
        )
    bad = re.compile(rf"|.*[{SEPARATOR}{CONTROL}].*", re.DOTALL)
    if (name := next(filter(bad.fullmatch, source.classes), None)) is not None:
        raise CxrdistError(
            f"--input {path}: class {name!r}: expected a name without {SEPARATOR!r} and control "
            "characters"
        )
    if "all" in source.classes:
        raise CxrdistError(
            f"--input {path}: class 'all': the results call all classes together so; give it "
            "another name, for example with --label-map"
        )
    _refuse_equal_labels(f"--input {path}", source.classes)


def _refuse_equal_labels(where: str, labels: Iterable[str]) -> None:
    """Reject class names that differ only in case, blanks, or as ``0`` and ``0.0`` do."""
    alike: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        text = " ".join(unicodedata.normalize("NFKC", label).replace("_", " ").split()).casefold()
        number = re.fullmatch(r"([+-]?\d+)\.0*", text)
        alike[number[1] if number else text].append(label)
    twice = next((names for names in alike.values() if len(names) > 1), None)
    if twice:
        raise CxrdistError(
            f"{where}: the classes {twice[0]!r} and {twice[1]!r} are two spellings of one name; "
            "use one of them"
        )
