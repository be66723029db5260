"""What the report shows of the audit of the shards."""

from dataclasses import dataclass
from pathlib import Path

from cxrdist.data.audit import FIGURES, MOST_PICTURED, best_model, told_classes
from cxrdist.data.audit_file import AuditFile, Estimate, Origins, Pair, read_audit
from cxrdist.report.values import count


@dataclass(frozen=True)
class AuditView:
    """The values that the page shows of audit.json.

    Attributes:
        content: the content of audit.json.
        pairs: pairs of copies with their pictures; equal images share one picture.
        shared: for `splits` and `classes`, the patients with images in several of them, with the
            number of images in each.
        origins: the existing tables of classes by source, view and mask.
        told: AUROC of the classes that size, border and brightness tell.
        trivial: for the verdict, each baseline without a deep network: its input, the name of its
            score (accuracy or mean_auroc), and the estimate. Empty for audits of older versions,
            and for too few patients.
    """

    content: AuditFile
    pairs: list[tuple[Pair, list[str]]]
    shared: dict[str, list[tuple[str, str]]]
    origins: dict[str, Origins]
    told: dict[str, float]
    trivial: list[tuple[str, str, Estimate]]


def audit_view(path: Path) -> AuditView | None:
    """Gather the values for the page; None if there was no audit when the training began.

    Raises:
        CxrdistError: audit.json is damaged.
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
        told_classes(audit["shortcut"]),
        _trivial(audit),
    )


def _pictured(audit: AuditFile) -> list[tuple[Pair, list[str]]]:
    """Return the first pairs with their base64 thumbnails; pairs without any are left out."""
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
    baselines: list[tuple[str, str, Estimate]] = []
    if shortcut := audit["shortcut"]:
        what = "size, border and brightness alone, without the lungs"
        scores = {name: shortcut.get(name) for name in FIGURES}
        # The accuracy if there is one, else the mean AUROC: the order of `FIGURES`.
        baselines += [(what, name, score) for name, score in scores.items() if score][:1]
    baseline = audit.get("baseline")
    best = best_model(baseline) if baseline else None
    if baseline and best:
        what = f"thumbnails of {count(baseline['size_px'])} px alone, without a deep network"
        baselines.append((what, *best[1:]))
    return baselines
