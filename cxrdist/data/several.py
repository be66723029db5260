"""Several: sources that are packed together, listed in a YAML file, one per line.

Example: ``ours: {source: csv, input: clinic/images.csv, label_map: clinic/labels.yaml}``.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

from cxrdist.config import SourceConfig, SourceName, location
from cxrdist.data.found import LeftOut
from cxrdist.data.labels import SEPARATOR, labels_of
from cxrdist.data.records import KNOWN_NAMES, NO_PATIENT, OF_NIH, Record, Source, own_patient
from cxrdist.documents import Text, typed
from cxrdist.errors import CxrdistError, choices
from cxrdist.files import judging, read_recipe
from cxrdist.packaged import LABEL_MAPS, files_in

MEND = (
    "expected NAME: {source: ..., input: ...} for each source, with options of cxrdist pack and "
    "paths relative to this file"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NIH_PATIENT = re.compile(r"(?:RSNA/)?(\d{8})")  # COVIDx has RSNA/ before the number
SINGLE = tuple(name for name in get_args(SourceName) if name != "several")
Reader = Callable[[SourceConfig, Sequence[Path]], Source]


class Entry(TypedDict):
    """A source in the file; fields as in `SourceConfig`."""

    source: str
    input: Text
    patient_pattern: NotRequired[Text]
    against_rest: NotRequired[Text]
    drop_unusable: NotRequired[bool]
    allow_outside: NotRequired[bool]
    views: NotRequired[Text]
    label_map: NotRequired[Text]
    empty_cells: NotRequired[Literal["ignore", "negative"]]
    masks: NotRequired[Text]


def read_several(config: SourceConfig, besides: Sequence[Path], read: Reader) -> Source:
    """Read the sources that a file lists, and merge their records.

    Paths become NAME/path, patients NAME:patient, since the same number in two sets is two people.
    Patients of ChestX-ray14, which several sets contain, are merged if their number is known.
    The classes are those of the first source in their order, then those that the next ones add.
    Labels that a source does not have are missing for its images. Views and empty_cells of the
    configuration, whose input is the file, apply to sources without their own.

    Raises:
        CxrdistError: the file or a source is malformed, or some have one class per image and others
            several labels.
    """
    _refuse_options_of_one(config)
    configs = _read_file(config)
    sources: dict[str, Source] = {}
    for name, one in configs.items():
        try:
            sources[name] = read(one, besides)
        except CxrdistError as error:
            raise CxrdistError(f"{config.input}: {name}: {error}") from error
    _refuse_mixed_tasks(config.input, sources)
    classes = list(dict.fromkeys(label for one in sources.values() for label in one.classes))
    shared = _shared_names(sources)
    records, notes, left_out = list[Record](), list[str](), list[LeftOut]()
    for name, source in sources.items():
        records += _renamed(name, source, classes, shared)
        notes += [f"{name}: {note}" for note in source.notes]
        left_out += [LeftOut(f"{name}/{path}", reason) for path, reason in source.left_out]
    return Source(
        records,
        next(iter(sources.values())).task,
        classes,
        config.input.name,
        (*notes, *_notes(sources)),
        tuple(sorted(left_out)),
        sum(one.num_found for one in sources.values()),
        any(one.dicom for one in sources.values()),
        {name: one.views[""] for name, one in sources.items()},
        frozenset[str]().union(*(one.public for one in sources.values())),
    )


def _refuse_options_of_one(config: SourceConfig) -> None:
    for option in ("patient_pattern", "against_rest", "drop_unusable", "allow_outside", "masks"):
        if getattr(config, option) not in (None, False):
            raise CxrdistError(
                f"--{option.replace('_', '-')}: applies to a single source; give it for that "
                f"source in {config.input}"
            )


def _read_file(config: SourceConfig) -> dict[str, SourceConfig]:
    """Return the options of each source."""
    file = config.input
    with judging(file, MEND):
        # `read_recipe` rejects links in untrusted directories, but this file is the user's own.
        _, content = read_recipe(file.resolve() if isinstance(file, Path) else file, MEND)
        if not content:
            raise ValueError("lists no source")
        entries = {_name(name): _entry(name, value) for name, value in content.items()}
        alike = {name.casefold() for name in entries}
        if len(alike) < len(entries):
            raise ValueError("has names that differ in case only")
    return {name: _config(entry, config) for name, entry in entries.items()}


def _name(name: object) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"the name {name!r:.80}, expected letters, digits, _ - . (64 at most)")
    return name


def _entry(name: str, value: Any) -> Entry:
    entry = typed({name: value}, dict[str, Entry])[name]
    strange = next((field for field in entry if field not in Entry.__annotations__), None)
    if strange is not None:
        known = choices(str(strange), Entry.__annotations__)
        raise ValueError(f"{name}.{strange!s:.80}: is not an option; {known}")
    if entry["source"] not in SINGLE:
        known = choices(entry["source"], SINGLE)
        raise ValueError(f"{name}.source: is {entry['source']!r:.80}, {known}")
    return entry


def _config(entry: Entry, above: SourceConfig) -> SourceConfig:
    options: dict[str, Any] = {"views": above.views, "empty_cells": above.empty_cells, **entry}
    for name in {"input", "label_map", "masks"} & options.keys():
        options[name] = above.input.parent / location(options[name])
    # A file of that path has precedence over one that comes with cxrdist.
    if "label_map" in entry and not options["label_map"].is_file():
        packaged = files_in(LABEL_MAPS)
        options["label_map"] = packaged.get(entry["label_map"], options["label_map"])
    return SourceConfig(**options)


def _refuse_mixed_tasks(file: Path, sources: dict[str, Source]) -> None:
    """Check that all sources have the same task, since one network has one task."""
    # Reversed, so that the first source of each task remains.
    first = {one.task: name for name, one in reversed(sources.items())}
    if len(first) > 1:
        raise CxrdistError(
            f"{file}: {first['multiclass']} has one class per image, {first['multilabel']} several "
            f"labels, and one network learns one of the two; list the images of "
            f"{first['multiclass']} in a table with the column labels (--source csv), or take one "
            "of them out"
        )


def _shared_names(sources: dict[str, Source]) -> set[str]:
    """Return the record sources that several sources share, such as `images`, to rename them.

    Names of public data sets stay as they are.
    """
    users: dict[str, set[str]] = defaultdict(set)
    for name, one in sources.items():
        for source in {record.source for record in one.records}:
            users[source].add(name)
    public = {*KNOWN_NAMES}.union(*(one.public for one in sources.values()))
    return {source for source, names in users.items() if len(names) > 1} - public


def _renamed(
    name: str, source: Source, classes: Sequence[str], shared: set[str]
) -> Iterator[Record]:
    """Yield the records of one of the sources under their new names."""
    lacking = [label for label in classes if label not in source.classes]
    # With one class per image the label says that all other classes are absent.
    lacking = lacking if source.task == "multilabel" else []
    for record in source.records:
        path = f"{name}/{record.path}"
        missing = {*labels_of(record.missing), *lacking}
        yield replace(
            record,
            path=path,
            patient=_patient(name, path, record),
            source=f"{name}/{record.source}" if record.source in shared else record.source,
            missing=SEPARATOR.join(label for label in classes if label in missing),
            origin=name,
        )


def _patient(name: str, path: str, record: Record) -> str:
    """Return the patient's name among all sources."""
    if record.patient.startswith(NO_PATIENT):
        # By the new path, since two sources may have equal paths.
        return own_patient(path)
    number = NIH_PATIENT.fullmatch(record.patient) if record.source in OF_NIH else None
    return f"chestxray14/{number[1]}" if number else f"{name}:{record.patient}"


def _notes(sources: dict[str, Source]) -> Iterator[str]:
    """Warn about images of the same patient that cannot be matched."""
    of_nih = {n: [r for r in one.records if r.source in OF_NIH] for n, one in sources.items()}
    names = [name for name, records in of_nih.items() if records]
    patients = [record.patient for records in of_nih.values() for record in records]
    unknown = sum(not NIH_PATIENT.fullmatch(patient) for patient in patients)
    if len(names) > 1 and unknown:
        yield (
            f"{', '.join(names)} contain X-rays of ChestX-ray14, and the patient of {unknown} of "
            "them is not known: equal images are found (--duplicates), but other images of one "
            "patient may be in two splits"
        )
