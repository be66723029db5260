"""The probe for words on the images as the report shows it, beside what the paper says."""

from typing import NamedTuple

from cxrdist.explain.text_file import TextFile, TextPicture, TextRelevance, read_text_file
from cxrdist.report import pictures
from cxrdist.report.files import reading, within
from cxrdist.run import RunDirectory

MOST_SHOWN = 500  # pictures, of 50 kB each; the probe draws a few of each class


class Shown(NamedTuple):
    """An image with its boxes: what the probe says of it, its X-ray, and its heat map."""

    item: TextPicture
    xray: pictures.Picture
    map: pictures.Picture


class TextView(NamedTuple):
    """What is shown of a split that was probed, beside what text.json holds as it is."""

    place: str
    split: str
    content: TextFile
    found: list[Shown]
    """Images with text."""
    pasted: list[Shown]
    """Images with the word pasted."""

    @property
    def region(self) -> TextRelevance | None:
        """Where relevance lies for the verdict; None without an interval, as of older versions."""
        row = self.content["relevance"]["all"]
        return row if row["images"] and "share_interval" in row else None


def text_views(run: RunDirectory) -> list[TextView]:
    """Gather what is shown of each split that was probed, by name.

    Raises:
        CxrdistError: a file is not what the probe writes.
    """
    files = [file for name in ("*", "external/*") for file in run.root.glob(f"{name}/text.json")]
    places = sorted(file.parent.relative_to(run.root).as_posix() for file in files)
    return [_text_view(run, place) for place in places]


def _text_view(run: RunDirectory, place: str) -> TextView:
    path, directory = run.text(place), run.text_pictures(place)
    content = read_text_file(path)
    with reading(path, "probe-text"):
        shown = [
            Shown(
                item,
                pictures.embed(within(directory, item["xray"])),
                pictures.embed(within(directory, item["map"])),
            )
            for item in content["pictures"][:MOST_SHOWN]
        ]
    return TextView(
        place,
        place.replace("external/", "external set "),
        content,
        [one for one in shown if one.item["kind"] == "found"],
        [one for one in shown if one.item["kind"] == "pasted"],
    )
