"""The audit of the shards as the report shows it."""

from dataclasses import dataclass
from pathlib import Path

from cxrdist.data.audit import FIGURES, MOST_PICTURED, best_model
from cxrdist.data.audit_file import AuditFile, Estimate, Origins, Pair, read_audit
from cxrdist.report.values import count


@dataclass(frozen=True)
class AuditView:
    """What the page shows of audit.json beside what it holds as it is.

    Attributes:
        content: of audit.json.
        pairs: those that have pictures, with these; equal images have one in common.
        shared: patients with images in several splits and classes: who, and how many in each.
        origins: the tables of classes by source, view and mask, those that were made.
        trivial: what is reached without a deep network, for the first line of the page: what is
            looked at, accuracy or mean_auroc, the figure. Empty for audits of older versions, and
            for too few patients.
    """

    content: AuditFile
    pairs: list[tuple[Pair, list[str]]]
    shared: dict[str, list[tuple[str, str]]]
    origins: dict[str, Origins]
    trivial: list[tuple[str, str, Estimate]]


def audit_view(path: Path) -> AuditView | None:
    """Gather what the page shows of an audit; None if there was none when the training began.

    Raises:
        CxrdistError: the file is not what the audit writes.
    """
    if not path.is_file():
        return None
    audit = read_audit(path)
    patients = {
        "splits": audit["patients_in_several_splits"],
        "classes": audit["patients_in_several_classes"],
    }
    tables = {"source": audit["sources"], "view": audit["views"], "mask": audit.get("masks")}
    return AuditView(
        audit,
        _pictured(audit),
        {
            what: [(patient["patient"], _amounts(patient["images"])) for patient in shared]
            for what, shared in patients.items()
        },
        {what: table for what, table in tables.items() if table},
        _trivial(audit),
    )


def _pictured(audit: AuditFile) -> list[tuple[Pair, list[str]]]:
    """Find the thumbnails of the first pairs, base64; leave out pairs that have none."""
    thumbnails, pictured = audit["thumbnails"], []
    for pair in audit["duplicates"]["pairs"][:MOST_PICTURED] if audit["duplicates"] else []:
        keys = [image["key"] for image in pair["images"] if image["key"] in thumbnails]
        if keys:
            keys = keys[:1] if pair["kind"] == "exact" else keys
            pictured.append((pair, [thumbnails[key] for key in keys]))
    return pictured


def _amounts(images: dict[str, int]) -> str:
    return ", ".join(f"{name} {count(number)}" for name, number in images.items())


def _trivial(audit: AuditFile) -> list[tuple[str, str, Estimate]]:
    told: list[tuple[str, str, Estimate]] = []
    if shortcut := audit["shortcut"]:
        what = "size, border and brightness alone, without the lungs"
        scores = {name: shortcut.get(name) for name in FIGURES}
        told += [(what, name, score) for name, score in scores.items() if score][:1]
    baseline = audit.get("baseline")
    best = best_model(baseline) if baseline else None
    if baseline and best:
        what = f"thumbnails of {count(baseline['size_px'])} px alone, without a deep network"
        told.append((what, *best[1:]))
    return told
