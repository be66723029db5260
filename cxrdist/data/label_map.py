"""Label map: rename, merge and drop the labels of a source."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
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
    file = file.resolve() if isinstance(file, Path) else file
    with judging(file, MEND):
        _, content = read_recipe(file, MEND)
        if not content:
            raise ValueError("is empty")
        for theirs, ours in content.items():
            for label in (theirs, *([] if ours is None else [ours])):
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
    parts: dict[str, list[str]] = {}
    for label in source.classes:
        if (ours := labels.get(label, label)) is not None:
            parts.setdefault(ours, []).append(label)
    if not parts:
        raise CxrdistError(f"{where}: drops all labels of {source.name}; keep at least one")
    gone = {label for label in source.classes if labels.get(label, label) is None}
    gone = gone if source.task == "multiclass" else set()
    left_out = [
        LeftOut(record.path, f"class {record.label} (--label-map)")
        for record in source.records
        if record.label in gone
    ]
    seen: dict[tuple[str, ...], LabelCells] = {}
    return replace(
        source,
        records=[_mapped(r, parts, labels, seen) for r in source.records if r.label not in gone],
        classes=list(parts),
        left_out=tuple(sorted((*source.left_out, *left_out))),
    )


def _mapped(
    record: Record,
    parts: Mapping[str, list[str]],
    labels: LabelMap,
    seen: dict[tuple[str, ...], LabelCells],
) -> Record:
    """Return the record with new labels.

    Most records share few combinations of labels, so results are cached in ``seen``.
    """
    cells = (record.label, record.uncertain, record.missing, record.assumed_absent)
    if cells not in seen:
        seen[cells] = combine_cells(parts, *(set(labels_of(cell)) for cell in cells))
    findings = tuple(
        finding._replace(label=ours)
        for finding in record.findings
        if (ours := labels.get(finding.label, finding.label)) is not None
    )
    return replace(record, findings=findings, **seen[cells])


def combine_cells(
    parts: Mapping[str, Iterable[str]],
    present: set[str],
    uncertain: set[str],
    missing: set[str],
    assumed: set[str],
) -> LabelCells:
    """Return the cells of the new labels, as `Record` has them."""
    names_in: dict[str, list[str]] = {name: [] for name in NAMES}
    for ours, theirs in parts.items():
        for name, those in zip(NAMES, (present, uncertain, missing, assumed), strict=True):
            if not those.isdisjoint(theirs):
                names_in[name].append(ours)
                break
    return {
        "label": SEPARATOR.join(names_in["label"]),
        "uncertain": SEPARATOR.join(names_in["uncertain"]),
        "missing": SEPARATOR.join(names_in["missing"]),
        "assumed_absent": SEPARATOR.join(names_in["assumed_absent"]),
    }
