"""Boxes of burned-in text in the squares of packed images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrdist.data.boxes import Box, inside, read_boxes
from cxrdist.data.geometry import in_square
from cxrdist.data.index import Index
from cxrdist.data.shards import describe_samples
from cxrdist.errors import CxrdistError

SquareBoxes = Mapping[int, Sequence[Box]]
"""By sample number, in px of the square; only of samples that have some."""


def boxes_in_squares(
    index: Index, numbers: NDArray[np.int64], file: Path, option: str
) -> SquareBoxes:
    """Read the CSV of `cxrdist find-text` and convert boxes to px of the squares of some samples.

    ``numbers`` are the sample numbers, int64 [N]; ``option`` names the file in messages.

    Raises:
        CxrdistError: the CSV cannot be read, or none of its images is in the shards.
    """
    boxes = read_boxes(file)
    if boxes and not boxes.keys() & {sample.path for sample in index.samples}:
        raise CxrdistError(
            f"{option} {file}: has no image of the shards; make it with cxrdist find-text of the "
            "source that was packed"
        )
    size_px = index.image_size_px
    of_samples: dict[int, Sequence[Box]] = {}
    wanted = {n for n in numbers.tolist() if index.samples[n].path in boxes}
    for number, facts in describe_samples(index.packed(), wanted):
        mapped = [
            in_square(box, facts["width_px"], facts["height_px"], size_px, index.fit)
            for box in boxes[index.samples[number].path]
        ]
        seen = [box for box in mapped if inside([box], size_px, size_px).any()]
        if seen:
            of_samples[number] = seen
    return of_samples
