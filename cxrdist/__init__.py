"""Chest X-ray classifiers, from folders of images to a report."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Classifier": "cxrdist.model.densenet",
    "CxrdistError": "cxrdist.errors",
    "attribute": "cxrdist.explain.relevance",
    "load_model": "cxrdist.model.densenet",
}
__all__ = ["Classifier", "CxrdistError", "__version__", "attribute", "load_model"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing cxrdist stays instant."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cxrdist' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
