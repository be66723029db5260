"""What the report shows of the probe for words on the images."""

from typing import NamedTuple

from cxrdist.explain.text_file import TextFile, TextPicture, TextRelevance, read_text_file
from cxrdist.report import pictures
from cxrdist.report.files import reading, subsets_with, within
from cxrdist.run import RunDirectory

MOST_SHOWN = 500  # pictures of 50 kB each; the probe draws a few per class


class Shown(NamedTuple):
    """An image with its text boxes: its entry in text.json, its X-ray and its heat map."""

    item: TextPicture
    xray: pictures.Picture
    map: pictures.Picture


class TextView(NamedTuple):
    """The values for a probed split."""

    subset: str
    split: str
    content: TextFile
    found: list[Shown]
    """Images with text."""
    pasted: list[Shown]
    """Images with the word pasted."""

    @property
    def region(self) -> TextRelevance | None:
        """Return the relevance in text for the verdict; None without an interval (old versions)."""
        row = self.content["relevance"]["all"]
        return row if row["images"] and "share_interval" in row else None


def text_views(run: RunDirectory) -> list[TextView]:
    """Gather the values for each probed split, sorted by name.

    Raises:
        CxrdistError: a file is not what `cxrdist probe-text` writes.
    """
    return [_text_view(run, subset) for subset in subsets_with(run.root, "text.json")]


def _text_view(run: RunDirectory, subset: str) -> TextView:
    content, directory = read_text_file(run.text(subset)), run.text_pictures(subset)
    with reading(run.text(subset), "probe-text"):
        shown = [
            Shown(
                item,
                pictures.embed(within(directory, item["xray"])),
                pictures.embed(within(directory, item["map"])),
            )
            for item in content["pictures"][:MOST_SHOWN]
        ]
    return TextView(
        subset,
        subset.replace("external/", "external set "),
        content,
        [one for one in shown if one.item["kind"] == "found"],
        [one for one in shown if one.item["kind"] == "pasted"],
    )
