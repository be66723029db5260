"""A page: one self-contained HTML file; its head and style are those of report.html.jinja."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cxrdist.explain import heatmap
from cxrdist.report import values

FILTERS = (
    *("colour", "number", "percent", "count", "rate", "share", "moment"),
    *("figure", "markdown", "base"),
)


def render(template: str, content: dict[str, Any]) -> str:
    """Fill in a template of this package.

    Args:
        template: its file; what comes from elsewhere is escaped unless it is no page but a text.
        content: by name; a name that the template misses is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in FILTERS:
        environment.filters[name] = getattr(values, name)
    return environment.get_template(template).render(heatmap=heatmap, **content)
