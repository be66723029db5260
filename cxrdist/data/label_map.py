"""Label map: rename, merge and drop the labels of a source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from cxrdist.data.found import LeftOut
from cxrdist.data.labels import NOT_STATED, SEPARATOR, labels_of
from cxrdist.data.records import LabelCells, Record, Source
from cxrdist.errors import CxrdistError
from cxrdist.files import judging, read_recipe
from cxrdist.packaged import LABEL_MAPS, path_of

NAMES = ("label", *NOT_STATED)  # fields of a `Record`
LabelMap = dict[str, str | None]
MEND = "expected THEIRS: OURS on each line, or THEIRS: null to leave a label out"


def read_label_map(file: Path) -> LabelMap:
    """Read a YAML file that maps labels, by its path or the name of one that comes with cxrdist.

    Raises:
        CxrdistError: it is missing, empty or malformed.
    """
    file = path_of(LABEL_MAPS, file)
    # `read_recipe` rejects links in untrusted directories, but this file is the user's own.
    file = file.resolve() if isinstance(file, Path) else file
    with judging(file, MEND):
        _, content = read_recipe(file, MEND)
        if not content:
            raise ValueError("is empty")
        for theirs, ours in content.items():
            for label in (theirs, *([] if ours is None else [ours])):
                # YAML reads no and 1 without quotes as false and as a number.
                if not isinstance(label, str):
                    raise ValueError(f"{label!r:.80} is not a text; write it in quotes")
                if not label.strip() or SEPARATOR in label:
                    raise ValueError(
                        f"{label!r:.80} is not a valid label; expected a text without {SEPARATOR}"
                    )
        return {theirs: ours and ours.strip() for theirs, ours in content.items()}


def map_labels(source: Source, labels: LabelMap, where: str) -> Source:
    """Replace the labels of a source's records.

    Several labels may become one: it is present if one of them is; else uncertain if one of them
    is; else absent only if all of them are known to be absent or count as such; else missing. In a
    source with one class per image, images of a dropped class are left out.

    A label that the map does not name stays; one that it maps to None is dropped. ``where`` is the
    origin of the map, for messages.

    Raises:
        CxrdistError: a label is not one of the source, or none is left.
    """
    unknown = next((label for label in labels if label not in source.classes), None)
    if unknown is not None:
        raise CxrdistError(
            f"{where}: {unknown!r:.80} is not a label of {source.name}, which has "
            f"{', '.join(source.classes)}"
        )
    if not labels:
        return source
    # In the order of the source's classes, which is the order of the logits.
    merged: dict[str, list[str]] = {}
    for label in source.classes:
        if (ours := labels.get(label, label)) is not None:
            merged.setdefault(ours, []).append(label)
    if not merged:
        raise CxrdistError(f"{where}: drops all labels of {source.name}; keep at least one")
    gone = {label for label in source.classes if labels.get(label, label) is None}
    gone = gone if source.task == "multiclass" else set()
    left_out = [
        LeftOut(record.path, f"class {record.label} (--label-map)")
        for record in source.records
        if record.label in gone
    ]
    combine = combiner(merged)
    return replace(
        source,
        records=[_mapped(r, combine, labels) for r in source.records if r.label not in gone],
        classes=list(merged),
        left_out=tuple(sorted((*source.left_out, *left_out))),
    )


def _mapped(record: Record, combine: Callable[..., LabelCells], labels: LabelMap) -> Record:
    """Return the record with new labels."""
    cells = combine(record.label, record.uncertain, record.missing, record.assumed_absent)
    findings = tuple(
        finding._replace(label=ours)
        for finding in record.findings
        if (ours := labels.get(finding.label, finding.label)) is not None
    )
    return replace(record, findings=findings, **cells)


def combiner(merged: Mapping[str, Sequence[str]]) -> Callable[..., LabelCells]:
    """Return a function that converts the label, uncertain, missing and assumed_absent of an image.

    ``merged`` has for each new label the old ones that become it; a new label with none is missing.
    Most images share few combinations of labels, so results are cached.
    """

    @cache
    def combine(*texts: str) -> LabelCells:
        cells = {name: set(labels_of(text)) for name, text in zip(NAMES, texts, strict=True)}
        named: dict[str, list[str]] = {name: [] for name in NAMES}
        for ours, theirs in merged.items():
            has = [name for name, labels in cells.items() if not labels.isdisjoint(theirs)]
            # NAMES are in order of precedence: the new label gets the first that an old one has.
            for name in has[:1] if theirs else ["missing"]:
                named[name].append(ours)
        return {
            "label": SEPARATOR.join(named["label"]),
            "uncertain": SEPARATOR.join(named["uncertain"]),
            "missing": SEPARATOR.join(named["missing"]),
            "assumed_absent": SEPARATOR.join(named["assumed_absent"]),
        }

    return combine
