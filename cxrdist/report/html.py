"""The report: a run directory read and checked, shown as one HTML file that needs nothing else."""

from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cxrdist.config import ReportConfig
from cxrdist.errors import CxrdistError
from cxrdist.evaluate.members import FIGURES, read_members
from cxrdist.explain import heatmap
from cxrdist.info import RunInfo, read_info
from cxrdist.report import values
from cxrdist.report.audit import audit_view
from cxrdist.report.external import external_view
from cxrdist.report.files import (
    known_splits,
    read_stages,
    reading,
    weights_chain,
)
from cxrdist.report.splits import open_labels, split_view
from cxrdist.report.stages import stage_views
from cxrdist.report.text import text_views
from cxrdist.run import RunDirectory, sweep, write_text


def report(config: ReportConfig) -> Path:
    """Write ``RUN/report.html``: one file, the same bytes for the same run directory.

    Returns:
        The file.

    Raises:
        CxrdistError: there is no run, or one of its files is not what its command writes.
    """
    if config.run is None:
        raise CxrdistError("report: --run is missing; give the directory of a run")
    run = RunDirectory(config.run)
    sweep(run.root)
    info = read_info(run)
    recipe = read_stages(run.recipe)
    splits = [
        split_view(run, split, f"split{place}", info["shards"]["task"])
        for place, split in enumerate(known_splits(run.root))
    ]
    page = template("report.html.jinja").render(
        name=run.root.resolve().name,
        info=info,
        weights=weights_chain(info),
        duration=_duration(run.info, info),
        recipe=recipe,
        open_labels=open_labels(info["shards"]),
        audit=audit_view(run.audit),
        stages=stage_views(run, info, recipe),
        splits=splits,
        external=external_view(splits),
        members=read_members(run),
        figures=FIGURES,
        texts=text_views(run),
        headline=next((split for split in splits if split["metrics"]), None),
        heatmap=heatmap,
    )
    write_text(run.report, page)
    print(f"the report: {run.report}")
    return run.report


def template(name: str) -> Template:
    """Load a page; whatever comes from a file is escaped, a name it misses is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        "colour",
        "number",
        "percent",
        "count",
        "rate",
        "share",
        "moment",
        "signed",
        "p_value",
    ):
        environment.filters[function] = getattr(values, function)
    return environment.get_template(name)


def _duration(path: Path, info: RunInfo) -> str:
    """Write how long a run took from its start to its end, pauses included.

    Raises:
        CxrdistError: these are no times.
    """
    with reading(path, "train"):
        started = datetime.fromisoformat(info["started"])
        if info["finished"] is None:
            return "not finished"
        finished = datetime.fromisoformat(info["finished"])
        seconds = round((finished - started).total_seconds())
    parts = (seconds // 3600, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")
    shown = [f"{value} {unit}" for value, unit in parts if value] or ["0 s"]
    return " ".join(shown[:2])
