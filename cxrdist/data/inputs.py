"""Inputs: image files for a trained model, prepared like the images that `pack` made for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxrdist.data.boxes import Box, cover, read_boxes
from cxrdist.data.depth import source_depth
from cxrdist.data.found import LeftOut, absolute, find_images, refuse_undecodable_name
from cxrdist.data.geometry import scaled
from cxrdist.data.images import decode, read_grey
from cxrdist.data.text import find_in_file
from cxrdist.data.views import view_in_name
from cxrdist.errors import CxrdistError

MOST_SIDE_PX = 2048
"""Longer side of an original in pictures, at most: twice a screen's height, a PNG of a few MB."""


@dataclass(frozen=True)
class Input:
    """An image file for a model."""

    file: Path
    name: str
    """Path relative to the given folder, with slashes; for a given file its name."""
    boxes: tuple[Box, ...] = ()
    """Burned-in text to cover, in px of the original."""


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the square that a model takes."""

    size_px: int
    """Side of the square."""
    fit: str
    """How it becomes square: crop, pad or stretch."""
    depth: int | None
    """Bit depth of images of more than 8 bits that do not declare one; None: the bits they use."""
    cover: str
    """How text is covered: black or fill."""
    finds_text: bool
    """Whether text is searched for, instead of taken from `Input.boxes`."""


@dataclass(frozen=True)
class Prepared:
    """A square for a model."""

    pixels: NDArray[np.uint8]
    """uint8 [S, S]."""
    used_depth: int | None
    """Bits that the image uses if its file does not declare its depth."""
    boxes: tuple[Box, ...]
    """Boxes of the covered text, in px of the original."""
    view: str
    """One of `VIEWS` from a tag or the file's name, or empty."""


def find_inputs(paths: Sequence[Path], besides: Path) -> tuple[list[Input], list[LeftOut]]:
    """List image files, given as files and folders.

    Files are taken whatever they hold; of folders the images that `find_images` selects, sorted,
    except those in the folder ``besides``, such as heat maps of an earlier call.

    Returns:
        The files in the given order, and the files of folders that are not images; each once,
        under the first of its names.

    Raises:
        CxrdistError: a path does not exist, a folder has no image, or a name is not UTF-8.
    """
    inputs: dict[str, Input] = {}
    left_out: dict[str, LeftOut] = {}
    for path in paths:
        if path.is_dir():
            found = find_images(path, [besides])
            if not found.images:
                raise CxrdistError(
                    f"{path}: has no image among its {found.num_files} files; give a folder of "
                    "X-rays"
                )
            for file in found.images:
                name = file.relative_to(path).as_posix()
                inputs.setdefault(absolute(file), Input(file, name))
            for name, reason in found.left_out:
                left_out.setdefault(absolute(path / name), LeftOut(f"{path}/{name}", reason))
        elif path.is_file():
            refuse_undecodable_name(path)
            inputs.setdefault(absolute(path), Input(path, path.name))
        else:
            raise CxrdistError(f"{path}: no such file or folder; give image files or folders")
    # A file that is left out of a folder may be given by itself as well, and is then read.
    return list(inputs.values()), [left_out[name] for name in left_out if name not in inputs]


def with_boxes(inputs: Sequence[Input], table: Path) -> list[Input]:
    """Give each input its boxes of burned-in text.

    Paths in the table are as given on the command line, or relative to the given folder.

    Raises:
        CxrdistError: the table cannot be read, has none of the files, or a name fits two of them.
    """
    boxes = read_boxes(table)
    names = [str(i.file) if str(i.file) in boxes else i.name for i in inputs]
    known: dict[str, Path] = {}
    for name, item in zip(names, inputs, strict=True):
        other = known.setdefault(name, item.file)
        if name in boxes and other != item.file:
            raise CxrdistError(
                f"--text-boxes {table}: {name} is both {other} and {item.file}; write the whole "
                "path in its column path"
            )
    strangers = sorted(boxes.keys() - known.keys())
    if boxes and len(strangers) == len(boxes):
        raise CxrdistError(
            f"--text-boxes {table}: has none of the images ({strangers[0]} is not among them); "
            "its paths are as on the command line, or relative to the folder given there"
        )
    if strangers:
        print(
            f"{table}: {len(strangers)} of its {len(boxes)} images are not among those given, the "
            f"first is {strangers[0]}"
        )
    return [
        replace(item, boxes=boxes.get(name, ())) for name, item in zip(names, inputs, strict=True)
    ]


def prepare(item: Input, how: Preparation) -> Prepared:
    """Read an image file as `pack` does.

    Raises:
        CxrdistError: it is not a readable X-ray.
    """
    boxes = find_in_file(item.file) if how.finds_text else item.boxes
    decoded = decode(item.file, how.size_px, how.fit, boxes, how.cover, how.depth)
    pixels = decoded.pixels if decoded.covered is None else decoded.covered
    view = decoded.view or view_in_name(item.file.name)
    return Prepared(pixels, decoded.used_depth, boxes, view)


def unlike_source(used: Mapping[int, int | None]) -> tuple[int | None, list[int]]:
    """Return `source_depth`, and the images to read again since they were scaled by fewer bits.

    ``used`` has by number of the image the bits that it uses; None if its file declares its depth.
    """
    depth = source_depth(used.values())
    return depth, [number for number, bits in used.items() if bits not in (None, depth)]


def read_original(item: Input, how: Preparation, most_px: int = MOST_SIDE_PX) -> NDArray[np.uint8]:
    """Read the whole image for a picture, with its text covered as in its square.

    It is uint8 [H, W], at most ``most_px`` wide and high.

    Raises:
        CxrdistError: it is not a readable X-ray.
    """
    grey = read_grey(item.file, most_px, how.depth)
    image = grey.image
    if item.boxes:
        here = [scaled(box, *grey.scale()) for box in item.boxes]
        image = Image.fromarray(cover(np.asarray(image), here, how.cover))
    shown = grey.width_px, grey.height_px
    # By the size of the original: a JPEG may have been decoded at a fraction of it.
    smaller = min(1, most_px / max(shown))
    width, height = (max(1, round(side * smaller)) for side in shown)
    whole = (0, 0, shown[0] / grey.reduced, shown[1] / grey.reduced)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, whole, reducing_gap=2.0)
    return np.asarray(image)
