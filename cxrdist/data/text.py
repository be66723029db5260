"""Find burned-in text and markers with RapidOCR's detector (PP-OCRv6 small), at several sizes."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.config import FindTextConfig, SourceConfig
from cxrdist.data.boxes import Box, write_boxes
from cxrdist.data.geometry import scaled
from cxrdist.data.images import read_grey
from cxrdist.data.records import Record
from cxrdist.data.sources import read_source
from cxrdist.data.squares import file_state
from cxrdist.data.workers import image_workers, in_order
from cxrdist.errors import CxrdistError, RunFailedError, require_modules
from cxrdist.files import read_json, refuse_unwritable, remove, write_json
from cxrdist.terminal import progress

# Chosen on 120 images of COVID-19 patients and ChestX-ray14 with 119 marks: no single size finds
# more than three quarters of them, these three find 106. Letters are found best when they are
# small; above 800 px clips, wires and ribs are mistaken for text.
SIDES_PX = (384, 512, 800)
"""Longer sides of the images that the detector gets, each a multiple of its stride of 32 px."""
STRIDE_PX = 32
PIXEL_THRESHOLD, BOX_THRESHOLD = 0.15, 0.3
"""Least probability of a pixel, and mean of a box, to be text (RapidOCR's default: 0.3, 0.5)."""
MOST_HEIGHT = 0.15
"""Largest height of letters, as a fraction of the shorter side; spine and chest are higher."""
MARGIN = 0.15
"""Margin on each side of a box, as a fraction of the letters' height, for their soft edge."""
READ_FROM = 0.5
"""Least certainty of the recogniser; below it the text stays empty."""
PART_SIZE = 16  # images per saved part; a killed part is searched again
SECONDS_PER_IMAGE = 20  # of processor time; an image takes 2 s after a slow start


class Part(NamedTuple):
    """Records that one worker searches together."""

    records: Sequence[Record]

    @property
    def file(self) -> Path:
        """The first image file."""
        return self.records[0].file


def find_text(config: FindTextConfig) -> None:
    """Find text in all images of a source and write a CSV of its boxes.

    A killed search resumes with the missing parts.

    Raises:
        CxrdistError: the source or the options cannot be used, or RapidOCR is not installed.
    """
    work = config.out.with_name(f".{config.out.name}.partial")
    if config.out.exists():
        remove(work)  # a command killed at its end has left it
        raise CxrdistError(f"--out {config.out}: already exists; remove it or choose another name")
    refuse_unwritable(config.out)
    require_extra()
    source = SourceConfig(
        config.source, config.input, allow_outside=config.allow_outside, views="all"
    )
    records = read_source(source, least_classes=1).records
    boxes: dict[str, list[Box]] = {}
    unreadable: list[str] = []
    with progress(len(records), "looking for text", "images") as bar:
        for part in _find_parts(records, work, config.workers):
            for path, rows, reason in part:
                if rows:
                    boxes[path] = [Box(*row) for row in rows]
                unreadable += [reason] if reason else []
            bar.update(len(part))
    write_boxes(config.out, boxes)
    remove(work)
    if unreadable:
        print(f"{len(unreadable)} images could not be read, the first: {unreadable[0]}")
    total = sum(map(len, boxes.values()))
    print(f"{config.out}: {total} boxes in {len(boxes)} of {len(records)} images; review them")


def _find_parts(
    records: Sequence[Record], work: Path, workers: int | None
) -> Iterator[list[list[Any]]]:
    """Yield the parts in order; each image has path, boxes, and why it could not be read."""
    parts = [Part(records[i : i + PART_SIZE]) for i in range(0, len(records), PART_SIZE)]
    find = partial(_find_part, work=work)
    with image_workers(workers, [__name__]) as pool:
        for rows in in_order(pool, find, parts, 1, PART_SIZE * SECONDS_PER_IMAGE):
            if isinstance(rows, CxrdistError):
                raise RunFailedError(
                    f"looking for text in {PART_SIZE} images, the first is {rows}; finished parts "
                    f"are in {work}: run the same command again, with fewer --workers if memory "
                    "ran out"
                )
            yield rows


def _find_part(part: Part, work: Path) -> list[list[Any]]:
    """Search a part, or read the result of an earlier search of the same unchanged files."""
    known = [(record.path, file_state(record)) for record in part.records]
    file = work / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()}.json"
    if not file.is_file():
        write_json(file, [_find_in_record(record) for record in part.records])
    rows: list[list[Any]] = read_json(file)
    return rows


def _find_in_record(record: Record) -> tuple[str, tuple[Box, ...], str]:
    try:
        return record.path, find_in_file(record.file), ""
    except CxrdistError as error:
        return record.path, (), str(error)


def find_in_file(file: Path) -> tuple[Box, ...]:
    """Find text in an image file: boxes in whole px of the original.

    Raises:
        CxrdistError: it is not a readable X-ray, or RapidOCR is not installed.
    """
    grey = read_grey(file, max(SIDES_PX))
    x, y = grey.scale()
    boxes = find_boxes(np.asarray(grey.image))
    return tuple(_whole(scaled(box, 1 / x, 1 / y), grey.width_px, grey.height_px) for box in boxes)


def _whole(box: Box, width_px: int, height_px: int) -> Box:
    """Return the box in whole px, clipped to the image."""
    left = min(max(0, round(box.x)), width_px - 1)
    top = min(max(0, round(box.y)), height_px - 1)
    right = min(width_px, max(left + 1, round(box.x + box.width)))
    bottom = min(height_px, max(top + 1, round(box.y + box.height)))
    return box._replace(x=left, y=top, width=right - left, height=bottom - top)


def find_boxes(pixels: NDArray[np.uint8]) -> list[Box]:
    """Find text in a grey image, uint8 [H, W]: boxes in its px with their text, without overlaps.

    Raises:
        CxrdistError: RapidOCR is not installed.
    """
    image = Image.fromarray(pixels)
    boxes = [box for side in SIDES_PX for box in _detect(image, side)]
    return [_read(image, box) for box in merge(boxes)]


def require_extra() -> None:
    """Raise a CxrdistError if RapidOCR is not installed."""
    require_modules("text", "rapidocr", "onnxruntime")


@cache
def _engine() -> Any:
    """Return RapidOCR, created once per process, with one thread: processes run in parallel."""
    require_extra()
    return import_module("rapidocr").RapidOCR(
        params={
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            # By default the engine enlarges shorter sides below 736 px; `_detect` scales instead.
            "Det.limit_type": "max",
            "Det.limit_side_len": max(SIDES_PX),
            "Det.thresh": PIXEL_THRESHOLD,
            "Det.box_thresh": BOX_THRESHOLD,
        }
    )


def _detect(image: Image.Image, side_px: int) -> list[Box]:
    """Run the detector on the image scaled to a longer side; return boxes in px of the image."""
    scale = side_px / max(image.size)
    size = [max(STRIDE_PX, round(n * scale / STRIDE_PX) * STRIDE_PX) for n in image.size]
    small = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    # The engine remembers these switches between calls, so each call sets all of them.
    pixels = np.asarray(small.convert("RGB"))
    result = _engine()(pixels, use_det=True, use_cls=False, use_rec=False)
    if result.boxes is None:
        return []
    x, y = image.width / size[0], image.height / size[1]
    boxes = []
    for corners, score in zip(result.boxes, result.scores, strict=True):
        # The rectangle may be rotated: its shorter edge is the height of the letters.
        letters = float(np.linalg.norm(corners[1:3] - corners[:2], axis=1).min())
        if letters > MOST_HEIGHT * min(size):
            continue
        (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
        margin = MARGIN * letters
        width, height = right - left + 2 * margin, bottom - top + 2 * margin
        box = Box(left - margin, top - margin, width, height, score=float(score))
        boxes.append(scaled(box, x, y))
    return boxes


def merge(boxes: Sequence[Box]) -> list[Box]:
    """Merge overlapping boxes until none overlaps another, keeping the best score."""
    merged: list[Box] = []
    for box in boxes:
        while (other := next((b for b in merged if _overlap(b, box)), None)) is not None:
            merged.remove(other)
            box = _around(box, other)
        merged.append(box)
    return merged


def _overlap(a: Box, b: Box) -> bool:
    return (
        a.x < b.x + b.width
        and b.x < a.x + a.width
        and a.y < b.y + b.height
        and b.y < a.y + a.height
    )


def _around(a: Box, b: Box) -> Box:
    left, top = min(a.x, b.x), min(a.y, b.y)
    right, bottom = max(a.x + a.width, b.x + b.width), max(a.y + a.height, b.y + b.height)
    return Box(left, top, right - left, bottom - top, "", max(a.score, b.score))


def _read(image: Image.Image, box: Box) -> Box:
    """Return the box with its recognised text."""
    left, top = round(box.x), round(box.y)
    right, bottom = round(box.x + box.width), round(box.y + box.height)
    # The engine fails on an empty image.
    crop = image.crop((left, top, max(left + 1, right), max(top + 1, bottom))).convert("RGB")
    result = _engine()(np.asarray(crop), use_det=False, use_cls=False, use_rec=True)
    text, score = (result.txts[0], result.scores[0]) if result.txts else ("", 0.0)
    return box._replace(text=text if score >= READ_FROM else "")
