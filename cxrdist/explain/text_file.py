"""text.json: whether a network reads the words on the images; written by `cxrdist probe-text`."""

from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

from cxrdist.bootstrap import Limits
from cxrdist.documents import Between, Real, Share, Text
from cxrdist.evaluate.metrics import Metrics
from cxrdist.files import judging, read_document
from cxrdist.info import Count, Task

CONDITIONS: tuple[Literal["as_it_is", "black", "fill"], ...] = ("as_it_is", "black", "fill")
"""The images as they are, and their text covered with black or filled from its surroundings."""

# Not a class statement, because `class` is a keyword.
ClassText = TypedDict(
    "ClassText",
    {"class": Text, "images": Count, "with_text": Count, "words": list[tuple[Text, Count]]},
)
"""How many images of a class have text, and its most frequent words."""

PastedClass = TypedDict(
    "PastedClass",
    {
        "class": Text,
        "images": Count,
        "before": list[Share] | None,
        "after": list[Share] | None,
        "predicted_otherwise": Count,
    },
)
"""Mean probabilities of all classes over the images of a class; None if it has no images."""

TextRelevance = TypedDict(
    "TextRelevance",
    {
        "class": Text,
        "images": Count,
        "share": Share | None,
        "area": Share | None,
        "times_chance": Real | None,
        "patients": NotRequired[Count],
        "share_interval": NotRequired[Limits],
    },
)
"""Mean share of the relevance and of the area in the boxes; None where no image has text.

Only the row of all images has an interval, and none in documents of older versions.
"""


class TextAmount(TypedDict):
    """How much text the images have."""

    found_in: Text
    """``squares``, or the name of the table of boxes."""
    images: Count
    with_text: Count
    boxes: Count
    classes: list[ClassText]


class Otherwise(TypedDict):
    """Images whose likeliest class changes when the text is covered."""

    black: Count
    fill: Count


class Covering(TypedDict):
    """The metrics of the images in each condition."""

    as_it_is: Metrics
    black: Metrics
    fill: Metrics
    predicted_otherwise: Otherwise


class Pasting(TypedDict):
    """The effect of a word pasted on every image."""

    word: Text
    place: Text
    letters_px: Count
    image_size_px: Count
    classes: list[PastedClass]


class RelevanceInText(TypedDict):
    """Where the relevance of the images with text lies."""

    all: TextRelevance
    classes: list[TextRelevance]


class PaperResults(TypedDict):
    """Results of the paper for each test."""

    covering: Text
    paste: Text
    relevance: Text


class TextPicture(TypedDict):
    """An image with pictures: the files, and the figures shown beside them."""

    kind: Literal["found", "pasted"]
    key: Text
    label: Text
    explained: Text
    share: Share
    area: Share
    relevance_inside: Real
    before: list[Share]
    """Probability of each class."""
    after: list[Share]
    xray: Text
    map: Text


class TextFile(TypedDict):
    """The content of text.json."""

    format: Literal["cxrdist-text-1"]
    split: Text
    task: Task
    classes: Annotated[list[Text], Between(1, 1000)]
    index_sha256: str
    text: TextAmount
    covering: Covering
    paste: Pasting
    relevance: RelevanceInText
    paper: PaperResults
    pictures: list[TextPicture]


def read_text_file(path: Path) -> TextFile:
    """Read text.json.

    Raises:
        CxrdistError: it is damaged, or a table in it lacks a class.
    """
    mend = "run `cxrdist probe-text` again"
    content = read_document(path, TextFile, mend)
    classes = len(content["classes"])
    rows = [*content["paste"]["classes"], *content["pictures"]]
    with judging(path, mend):
        for row in rows:
            if any(values and len(values) != classes for values in (row["before"], row["after"])):
                raise ValueError(f"expected {classes} probabilities before and after")
        for condition in CONDITIONS:
            if set(content["classes"]) - content["covering"][condition]["classes"].keys():
                raise ValueError(f"covering.{condition}: lacks a class")
    return content
