"""Provenance: what metrics.json says of an external set and of what the network has seen of it."""

from typing import Literal, NotRequired, TypedDict

from cxrdist.documents import Text
from cxrdist.info import Count


class ExternalInfo(TypedDict):
    """What metrics.json says of an external set, under ``external``."""

    name: Text
    shards: Text
    """Where they were."""
    label_map: dict[str, str | None]
    """Their label: the model's, or null where it was left out."""
    classes: list[str]
    """That both have; scores of the others are not defined."""
    other_classes: dict[str, Count]
    """Images that were left out, by a class that the model does not know."""
    images: Count
    """Of the split, without those of other classes."""
    seen: Literal["drop", "report"]
    """Whether images that the network has seen were left out of the scores or marked."""
    seen_images: Count
    reasons: dict[str, Count]
    """Seen images by reason."""
    patients_told: Count
    """Images whose patient was looked for among those of the training; 0 if a side tells none."""
    not_known: NotRequired[Text | None]
    """Why it is not known what the network has seen; None if it is."""
