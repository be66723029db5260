"""The report: a run directory, read and checked, as one self-contained HTML file."""

from datetime import datetime
from pathlib import Path

from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.members import FIGURES, read_members
from cxrdist.files import write_text
from cxrdist.info import RunInfo
from cxrdist.report.audit import audit_view
from cxrdist.report.card import write_card
from cxrdist.report.checklist import write_checklist
from cxrdist.report.evidence import gather
from cxrdist.report.external import external_view
from cxrdist.report.files import known_splits, read_resolved, reading, weights_chain
from cxrdist.report.foreign import report_predictions
from cxrdist.report.localisation import localisation_views
from cxrdist.report.outside import outside_lines
from cxrdist.report.page import template
from cxrdist.report.splits import open_labels, split_view
from cxrdist.report.stages import stage_views
from cxrdist.report.text import text_views
from cxrdist.report.verdict import baseline_lines, external_lines, gap_lines, verdict_view
from cxrdist.run import RunDirectory


def report(config: ReportConfig) -> Path:
    """Write ``RUN/report.html``: one file, the same bytes for the same run directory.

    Also write checklist.html and, if there is a model, its card (model/README.md). With
    ``--predictions`` the page describes those, and is written to ``--out``.

    Returns:
        The file.

    Raises:
        CxrdistError: there is no run, or one of its files is damaged.
    """
    if config.predictions is not None and config.out is not None and config.run is None:
        return report_predictions(config.predictions, config.out)
    if config.run is None or config.predictions is not None or config.out is not None:
        raise CxrdistError(
            "report: expected --run RUN, or --predictions FILE.csv with --out DIR; give one of them"
        )
    run = RunDirectory(config.run)
    evidence = gather(run)
    info, recipe = evidence.info, read_resolved(run.recipe)
    shards = info["shards"]
    splits = [
        split_view(run, split, f"split{i}", shards["task"], shards["classes"])
        for i, split in enumerate(known_splits(run.root))
    ]
    # `known_splits` lists test first, whose figure is the headline if there is one.
    headline, metrics = next(((s, s["metrics"]) for s in splits if s["metrics"]), (None, None))
    audit, texts = audit_view(run.audit), text_views(run)
    page = template("report.html.jinja").render(
        without_maps=evidence.without_maps,
        name=run.root.resolve().name,
        info=info,
        launches=evidence.launches,
        network=evidence.model["architecture"] if evidence.model else None,
        weights=weights_chain(info),
        duration=_duration(run.info, info),
        recipe=recipe,
        open_labels=open_labels(shards),
        audit=audit,
        stages=stage_views(run, info, recipe),
        splits=splits,
        external=external_view(splits),
        members=read_members(run),
        figures=FIGURES,
        texts=texts,
        localisations=localisation_views(run),
        headline=headline,
        verdict=verdict_view(headline) if headline else None,
        baselines=baseline_lines(audit),
        remarks=[
            *external_lines(splits),
            *(gap_lines(metrics) if metrics else []),
            *(outside_lines(headline, texts) if headline else []),
        ],
    )
    write_text(run.report, page)
    write_checklist(evidence)
    write_card(evidence)
    print(f"the report: {run.report}")
    return run.report


def _duration(path: Path, info: RunInfo) -> str:
    """Write how long a run took from start to end, pauses included."""
    with reading(path, "train"):
        started = datetime.fromisoformat(info["started"])
        if info["finished"] is None:
            return "not finished"
        finished = datetime.fromisoformat(info["finished"])
        seconds = round((finished - started).total_seconds())
    parts = (seconds // 3600, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")
    shown = [f"{value} {unit}" for value, unit in parts if value] or ["0 s"]
    return " ".join(shown[:2])
