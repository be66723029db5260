"""Provenance: the record of an external set in metrics.json, and which images were seen."""

from typing import Literal, NotRequired, TypedDict

from cxrdist.documents import Text
from cxrdist.info import Count


class ExternalInfo(TypedDict):
    """The member ``external`` of metrics.json."""

    name: Text
    shards: Text
    """Their path."""
    label_map: dict[str, str | None]
    """From a label of the set to the model's, or to null if it was left out."""
    classes: list[str]
    """Classes that both have; scores of the others are undefined."""
    other_classes: dict[str, Count]
    """Number of images left out, by class that the model does not know."""
    images: Count
    """Number of images of the split, without those of other classes."""
    seen: Literal["drop", "report"]
    """Whether images that the network has seen were left out of the scores or marked."""
    seen_images: Count
    reasons: dict[str, Count]
    """Number of seen images by reason."""
    patients_told: Count
    """Images whose patient was searched for among those of the training; 0 if these are unknown."""
    not_known: NotRequired[Text | None]
    """Why it is unknown what the network has seen; None if it is known."""
