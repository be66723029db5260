"""Chest X-ray classifiers, from folders of images to a report."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Attribution": "cxrdist.explain.attribution",
    "Classifier": "cxrdist.model.densenet",
    "CxrdistError": "cxrdist.errors",
    "Explainer": "cxrdist.explain.relevance",
    "LabelledImage": "cxrdist.data.dataset",
    "Predictions": "cxrdist.model.prediction",
    "ShardDataset": "cxrdist.data.dataset",
    "attribute": "cxrdist.explain.relevance",
    "load_model": "cxrdist.model.published",
    "open_shards": "cxrdist.data.dataset",
    "overlay": "cxrdist.explain.heatmap",
    "read_image": "cxrdist.model.reading",
}
# Repeats _PUBLIC, since type checkers read __all__ only as a list of literals.
__all__ = [
    "Attribution",
    "Classifier",
    "CxrdistError",
    "Explainer",
    "LabelledImage",
    "Predictions",
    "ShardDataset",
    "__version__",
    "attribute",
    "load_model",
    "open_shards",
    "overlay",
    "read_image",
]

if TYPE_CHECKING:  # a type checker cannot see the names that __getattr__ imports
    from cxrdist.data.dataset import LabelledImage, ShardDataset, open_shards
    from cxrdist.errors import CxrdistError
    from cxrdist.explain.attribution import Attribution
    from cxrdist.explain.heatmap import overlay
    from cxrdist.explain.relevance import Explainer, attribute
    from cxrdist.model.densenet import Classifier
    from cxrdist.model.prediction import Predictions
    from cxrdist.model.published import load_model
    from cxrdist.model.reading import read_image
# Hidden from type checkers, which would accept any name of a module with `__getattr__`.
else:

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that importing cxrdist stays instant."""
        if name not in _PUBLIC:
            raise AttributeError(
                f"module 'cxrdist' has no attribute {name!r}; it has {', '.join(_PUBLIC)}"
            )
        return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """List the public names, for tab completion."""
    return [*__all__]
