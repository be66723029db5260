"""The templates of reports: self-contained HTML pages, and texts in Markdown."""

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cxrdist.evaluate.metrics import headline_means
from cxrdist.explain import heatmap
from cxrdist.report import values

FILTERS = (
    *("colour", "number", "percent", "count", "rate", "share", "moment"),
    *("figure", "markdown", "base_name", "signed", "p_value", "grey", "fine", "interval"),
)


@cache  # to compile them takes as long as to draw a chart
def template(name: str) -> Template:
    """Load a template of this package.

    Values are escaped in HTML templates only; an undefined name is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Texts for Markdown are escaped by the filter `markdown`.
        autoescape=name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"heatmap": heatmap, "headline_means": headline_means}
    for function in FILTERS:
        environment.filters[function] = getattr(values, function)
    return environment.get_template(name)
